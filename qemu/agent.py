"""The guest's agent as seen from here: run commands there, stream their output, move files, ask Python."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from images.agent.protocol import CHUNK
from qemu.channel import ANSWER_SECONDS, Channel, Request
from qemu.completed import CommandFailed, CommandTimedOut, Completed, last_output
from qemu.errors import AgentError, GuestLost, HarnessError
from qemu.guest_process import GuestProcess

KEEP = 8 << 20
"""Bytes of each output stream kept in memory by default; older ones are dropped (and still go to the log file)."""


class _Fetch(Request):
    def __init__(self, ident: int, what: str, limit: int, file: IO[bytes] | None):
        super().__init__(ident, what)
        self.limit = limit
        self.file = file
        self.size = 0
        self.chunks: list[bytes] = []

    def on_event(self, header: dict[str, Any], payload: bytes) -> int:
        if header.get("event") != "output":
            return super().on_event(header, payload)
        self.size += len(payload)
        if self.file is not None:
            self.file.write(payload)
        elif self.size <= self.limit:
            self.chunks.append(payload)
        return len(payload)


class Agent(Channel):
    """A channel with the verbs that the agent understands."""

    def ping(self, timeout: float = ANSWER_SECONDS) -> float:
        """Seconds for one round trip to the agent."""
        began = time.perf_counter()
        self.ask("ping", {"op": "ping"}, timeout=timeout)
        return time.perf_counter() - began

    def eval(self, source: str, timeout: float = 20.0) -> Any:
        """Run Python in the agent's interpreter, where names stay from call to call; under a millisecond.

        Returns the value of a last expression, which has to be JSON. Raises AgentError with the traceback. While
        it runs the agent serves nobody else, hence the deadline: for anything slow, run a command.
        """
        what = f"in the guest's interpreter, {source.strip().splitlines()[-1] if source.strip() else 'nothing'!r}"
        header = {"op": "eval", "timeout": timeout}
        return self.ask(what, header, source.encode(), timeout + ANSWER_SECONDS).get("value")

    def call(self, function: str, *args: Any, timeout: float = 20.0, **kwargs: Any) -> Any:
        """Call "module:function" in the agent's interpreter with JSON arguments; as eval() otherwise."""
        arguments = json.dumps({"args": args, "kwargs": kwargs}).encode()
        header = {"op": "call", "function": function, "timeout": timeout}
        return self.ask(f"in the guest's interpreter, {function}()", header, arguments, timeout + ANSWER_SECONDS).get(
            "value"
        )

    def start(
        self,
        argv: Sequence[str],
        *,
        user: str | int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bool = False,
        merge: bool = False,
        pty: tuple[int, int] | None = None,
        keep: int = KEEP,
        log: Path | None = None,
        halt_at: str | None = None,
    ) -> GuestProcess:
        """Start a command in its own session and return once it runs.

        `stdin` opens its input for write(), which is /dev/null otherwise; `merge` puts stderr into stdout; `pty`
        (rows, columns) gives it a terminal; `log` is a file here that gets all it prints; when it prints `halt_at` it
        is stopped, with all it has started: see GuestProcess.wait_halted(). Raises AgentError when there is no such
        command or user.
        """
        words = [argv] if isinstance(argv, str) else list(argv)
        if isinstance(argv, str) or not words:
            raise TypeError(f"a command is a list of words, such as ['ip', 'link'], not {argv!r}")
        file = log.open("wb") if log is not None else None
        process = self.open(lambda ident: GuestProcess(self, ident, [str(word) for word in words], keep, file))
        assert isinstance(process, GuestProcess)
        self.tell(
            {
                "id": process.id,
                "op": "run",
                "argv": list(process.argv),
                "user": user,
                "env": dict(env or {}),
                "cwd": cwd,
                "stdin": stdin,
                "merge": merge,
                "pty": pty,
                "halt_at": halt_at,
            }
        )
        with self.changed:
            if not self.changed.wait_for(lambda: process.pid is not None or process.done, ANSWER_SECONDS):
                raise GuestLost(f"{process.what}: the agent has not started it within {ANSWER_SECONDS:g} s")
            if process.error is not None:
                raise process.error
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        stdin: bytes | str | None = None,
        user: str | int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> Completed:
        """Run a command to its end. One that is not done in time is killed, in the guest, with all it started.

        Raises CommandFailed (if `check`) on an exit code other than 0, CommandTimedOut, AgentError, GuestLost;
        and AgentError when it prints more than is kept, as part of an answer is no answer.
        """
        process = self.start(argv, user=user, env=env, cwd=cwd, stdin=stdin is not None)
        deadline = time.monotonic() + timeout
        try:
            if stdin is not None:
                process.write(stdin.encode() if isinstance(stdin, str) else stdin, timeout)
                process.close_stdin()
            process.wait(max(0.0, deadline - time.monotonic()))
        except CommandTimedOut:
            process.kill()
            process.wait_until(lambda: process.done, ANSWER_SECONDS, "does not die of SIGKILL")
            out, err = process.stdout, process.stderr
            raise CommandTimedOut(
                f"{process.what} has not ended within {timeout:g} s and was killed{last_output(out, err)}"
            ) from None
        except BaseException:
            with contextlib.suppress(HarnessError):
                process.kill()
            raise
        completed = process.completed()
        for stream in ("stdout", "stderr"):
            if process.dropped(stream):
                raise AgentError(f"{process.what} printed more than {KEEP} bytes on {stream}: start() it with a log")
        if check and completed.returncode != 0:
            raise CommandFailed(completed)
        return completed

    # Files

    def put(self, source: bytes | Path, target: str, mode: int | None = None, timeout: float = 60.0) -> None:
        """Write bytes, or a file or directory of the host given as a Path, to that path in the guest.

        A file appears under its name when it is complete, with `mode` or that of the host's file; parent
        directories are made. Raises AgentError when the guest cannot write it.
        """
        if isinstance(source, str):
            raise TypeError("put() takes bytes for data and a Path for a file of the host, not a str")
        if isinstance(source, Path) and source.is_dir():
            for file in sorted(path for path in source.rglob("*") if path.is_file()):
                self.put(file, f"{target.rstrip('/')}/{file.relative_to(source)}", mode, timeout)
            return
        if isinstance(source, Path):
            with source.open("rb") as opened:
                permissions = os.fstat(opened.fileno()).st_mode & 0o7777
                chunks = iter(lambda: opened.read(CHUNK), b"")
                self._put(chunks, target, permissions if mode is None else mode, timeout)
            return
        view = memoryview(source)
        parts = (bytes(view[start : start + CHUNK]) for start in range(0, len(view), CHUNK))
        self._put(parts, target, 0o644 if mode is None else mode, timeout)

    def _put(self, chunks: Iterator[bytes], target: str, mode: int, timeout: float) -> None:
        request = self.open(lambda ident: Request(ident, f"put {target}"))
        self.tell({"id": request.id, "op": "put", "path": target, "mode": mode})
        for chunk in chunks:
            if request.done:
                break
            self.tell({"id": request.id, "op": "data"}, chunk)
        self.tell({"id": request.id, "op": "data", "eof": True})
        self.await_answer(request, timeout)

    def get(self, path: str, to: Path | None = None, limit: int = 256 << 20, timeout: float = 60.0) -> bytes:
        """The content of a file in the guest; with `to` it is written there and b"" returned.

        Raises AgentError when the guest cannot read it or it is larger than `limit`.
        """
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(to.open("wb")) if to is not None else None
            request = self.open(lambda ident: _Fetch(ident, f"get {path}", limit, file))
            assert isinstance(request, _Fetch)
            self.tell({"id": request.id, "op": "get", "path": path})
            self.await_answer(request, timeout)
        if request.size > limit and to is None:
            raise AgentError(f"get {path}: it has {request.size} bytes, more than the {limit} asked for; give to=")
        return b"".join(request.chunks)
