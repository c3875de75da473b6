"""How a command in a guest has ended, well or not."""

from __future__ import annotations

import contextlib
import shlex
import signal as signals
from dataclasses import dataclass


class CommandError(Exception):
    """A command in the guest did not do what was asked: a failure of what is tested, not of the harness."""


class CommandFailed(CommandError):
    """The command ended with another exit code than 0; `completed` has all of it."""

    def __init__(self, completed: Completed):
        self.completed = completed
        super().__init__(
            f"in the guest, `{shlex.join(completed.argv)}` {_ending(completed.returncode)} "
            f"after {completed.seconds:.1f} s{last_output(completed.stdout, completed.stderr)}"
        )


class CommandTimedOut(CommandError):
    """The command, or what was awaited of it, did not come in time; the message ends with its last output."""


@dataclass(frozen=True)
class Completed:
    """A command that has ended. `returncode` is negative for a signal, as subprocess has it."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    seconds: float


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signals.Signals(-code).name}"
    return f"was ended by signal {-code}"


def last_output(stdout: str, stderr: str, lines: int = 30) -> str:
    parts = []
    for name, text in (("stdout", stdout), ("stderr", stderr)):
        if text.strip():
            parts.append(f"\n--- end of its {name}\n" + "\n".join(text.rstrip().splitlines()[-lines:]))
    return "".join(parts) or " and printed nothing"
