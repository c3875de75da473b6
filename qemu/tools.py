"""The host's programs that images are built with, and what to install when one is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal as signals
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qemu.errors import ImageBuildFailed, ToolMissing

PACKAGES = {
    "apt-get": "apt",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "gcc": "gcc",
    "make": "make",
    "lz4": "lz4",
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "nice": "coreutils",
    "readelf": "binutils",
    "setpriv": "util-linux",
    "tar": "tar",
    "zstd": "zstd",
}
"""The Debian and Ubuntu package that brings each program."""

TAIL_LINES = 20


def find_tool(name: str) -> str:
    """The program's path. Raises ToolMissing, with the package to install."""
    # Some of them live where only root's PATH leads.
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        package = PACKAGES.get(os.path.basename(name))  # noqa: PTH119 - a name, not a path
        hint = f"install it: apt-get install {package}" if package else "is the path right?"
        raise ToolMissing(f"{name} is needed to build a guest and is not installed; {hint}")
    return path


def run_tool(argv: Sequence[str], *, doing: str, input_data: bytes | None = None) -> bytes:
    """Run a program that takes seconds at most, and return its output.

    Raises ToolMissing, or ImageBuildFailed with `doing` and the end of what it said.
    """
    done = subprocess.run([find_tool(argv[0]), *argv[1:]], input=input_data, capture_output=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise ImageBuildFailed(f"{doing}: {argv[0]} ended with {done.returncode}:\n{last_lines(said)}")
    return done.stdout


def watch_tool(
    argv: Sequence[str],
    *,
    doing: str,
    on_line: Callable[[str], bool],
    asking: signals.Signals,
    patience: float,
    environment: Mapping[str, str],
    directory: Path | None = None,
) -> None:
    """Run a program that takes long. `on_line` is told each line when it comes, and whether that may be of interest
    when it fails is what it returns.

    The program ends when this process does. When this call is interrupted it is sent the signal `asking`, has
    `patience` seconds to tidy up, and is killed then with all that it has started. Raises ToolMissing, or
    ImageBuildFailed with `doing` and the end of what it said.
    """
    tail: deque[str] = deque(maxlen=200)
    began = time.monotonic()
    with subprocess.Popen(
        # In a session of its own, so that Ctrl-C reaches it once and from here.
        [find_tool("setpriv"), "--pdeathsig", asking.name.removeprefix("SIG"), *argv],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if on_line(line.rstrip("\n")):
                    tail.append(line.rstrip())
            code = process.wait()
        except BaseException:
            _stop(process, asking, patience)
            raise
    if code != 0:
        raise ImageBuildFailed(
            f"{doing} ended with {code} after {time.monotonic() - began:.1f} s; the end of what it said:\n"
            + last_lines("\n".join(tail))
        )


def _stop(process: subprocess.Popen[str], asking: signals.Signals, patience: float) -> None:
    _signal(process, asking)
    deadline = time.monotonic() + patience
    # What it prints meanwhile has to be read; and it may have left something running that holds its output open.
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=0.1)
    _signal(process, signals.SIGKILL)
    process.communicate()


def _signal(process: subprocess.Popen[str], number: signals.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def last_lines(text: str, count: int = TAIL_LINES) -> str:
    """The end of a program's output, indented for an error message."""
    lines = text.strip().splitlines()[-count:]
    return "\n".join(f"    {line}" for line in lines) or "    (it said nothing)"
