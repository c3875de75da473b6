"""The host's end of the agent in the guest: run commands there, stream their output, move files, ask Python.

The channel is any connected stream socket; in a guest it is the host's end of a virtio-serial port. A thread reads
it and hands each frame to the request it answers, so that any number of threads can have requests under way. What
a command prints is always taken off the channel: each stream keeps its last bytes in memory and can be written to
a file whole, so a flood costs a fixed amount of memory.

The framing is described, once, in images/agent.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal as signals
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from images.agent import CHUNK, PROTOCOL, WINDOW, Decoder, encode
from qemu.errors import AgentError, GuestLost, HarnessError

KEEP = 8 << 20
"""Bytes of each output stream kept in memory by default; older ones are dropped (and still go to the log file)."""
SEND_SECONDS = 60.0
BULK = ("output", "stdin", "data", "ack")
LONGEST_NOTE = 4096
ANSWER_SECONDS = 60.0
"""How long the agent may take over a request that only costs it milliseconds, on a host that has far too much to do."""


class CommandError(Exception):
    """A command in the guest did not do what was asked: a failure of what is tested, not of the harness."""


class CommandFailed(CommandError):
    """The command ended with another exit code than 0; `completed` has all of it."""

    def __init__(self, completed: Completed):
        self.completed = completed
        super().__init__(
            f"in the guest, `{shlex.join(completed.argv)}` {_ending(completed.returncode)} "
            f"after {completed.seconds:.1f} s{_last_output(completed.stdout, completed.stderr)}"
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


def _last_output(stdout: str, stderr: str, lines: int = 30) -> str:
    parts = []
    for name, text in (("stdout", stdout), ("stderr", stderr)):
        if text.strip():
            parts.append(f"\n--- end of its {name}\n" + "\n".join(text.rstrip().splitlines()[-lines:]))
    return "".join(parts) or " and printed nothing"


class _Request:
    """One request under way; every field is guarded by the agent's condition."""

    def __init__(self, ident: int, what: str):
        self.id = ident
        self.what = what
        self.done = False
        self.answer: dict[str, Any] = {}
        self.error: Exception | None = None

    def on_event(self, header: dict[str, Any], payload: bytes) -> int:  # noqa: ARG002 - for those that take output
        """Take one frame; returns the bytes of output in it that may be acknowledged."""
        if header.get("event") == "error":
            trace = f"\n{header['trace']}" if header.get("trace") else ""
            self.error = AgentError(f"{self.what}: {header.get('message')}{trace}")
            self.done = True
        elif header.get("event") == "result":
            self.answer = header
            self.done = True
        return 0

    def lose(self, reason: str) -> None:
        """There will be no more frames."""
        self.error = GuestLost(reason)
        self.done = True


class _Fetch(_Request):
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


class _Stream:
    """What came out of one pipe: its last bytes, with the position of the first one kept."""

    def __init__(self, keep: int):
        self.keep = keep
        self.start = 0
        self.data = bytearray()
        self.searched = 0

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def append(self, data: bytes) -> None:
        self.data += data
        surplus = len(self.data) - self.keep
        # Dropped in large steps: moving the rest up for each chunk would cost far more than the memory.
        if surplus > self.keep // 4:
            del self.data[:surplus]
            self.start += surplus

    def text(self) -> str:
        return self.data.decode(errors="replace")

    def line_at(self, position: int, ended: bool) -> tuple[str, int] | None:
        """The line that starts there and the position behind it; None while it is not complete."""
        position = max(position, self.start)
        offset = position - self.start
        newline = self.data.find(b"\n", offset)
        if newline < 0:
            if not ended or offset >= len(self.data):
                return None
            newline = len(self.data)
        line = self.data[offset:newline].decode(errors="replace").rstrip("\r")
        return line, self.start + min(newline + 1, len(self.data))


class GuestProcess(_Request):
    """A command in the guest. As a context manager it is killed, if it still runs, at the end."""

    def __init__(self, agent: Agent, ident: int, argv: Sequence[str], keep: int, log: IO[bytes] | None):
        super().__init__(ident, f"in the guest, `{shlex.join(argv)}`")
        self.argv = tuple(argv)
        self.pid: int | None = None
        self.halted = False
        self.returncode: int | None = None
        self._agent = agent
        self._changed = agent.changed
        self._streams = {"stdout": _Stream(keep), "stderr": _Stream(keep)}
        self._log = log
        self._stdin_credit = WINDOW
        self._began = time.monotonic()
        self._ended = 0.0

    def on_event(self, header: dict[str, Any], payload: bytes) -> int:
        event = header.get("event")
        if event == "output":
            self._streams.get(str(header.get("stream")), self._streams["stdout"]).append(payload)
            if self._log is not None:
                self._log.write(payload)
                self._log.flush()
            return len(payload)
        if event == "started":
            self.pid = header.get("pid")
        elif event == "halted":
            self.halted = True
        elif event == "ack":
            self._stdin_credit += int(header.get("count", 0))
        elif event == "exit":
            self.returncode = int(header["code"])
            self.done = True
        else:
            super().on_event(header, payload)
        if self.done:
            self._ended = time.monotonic()
            if self._log is not None:
                self._log.close()
        return 0

    def lose(self, reason: str) -> None:
        super().lose(reason)
        if self._log is not None:
            self._log.close()

    @property
    def stdout(self) -> str:
        """What it has printed so far; the beginning is missing once that is more than was to be kept."""
        with self._changed:
            return self._streams["stdout"].text()

    @property
    def stderr(self) -> str:
        with self._changed:
            return self._streams["stderr"].text()

    @property
    def running(self) -> bool:
        return not self.done

    def dropped(self, stream: str = "stdout") -> int:
        """Bytes of that stream that are no longer in memory."""
        with self._changed:
            return self._streams[stream].start

    def wait(self, timeout: float | None = 30.0) -> int:
        """Its exit code, negative for a signal. Raises CommandTimedOut, leaving it running, or GuestLost."""
        self._await(lambda: self.done, timeout, "has not ended")
        assert self.returncode is not None
        return self.returncode

    def kill(self, signal: int = signals.SIGKILL) -> None:
        """Signal its whole process group; nothing happens when it has ended already."""
        if not self.done:
            self._agent.tell({"id": self.id, "op": "kill", "signal": int(signal)})

    def wait_halted(self, timeout: float = 30.0) -> None:
        """Wait until it stands still at what start() was given as `halt_at`; go_on() lets it run again.

        Raises CommandTimedOut, or CommandFailed when it ends before.
        """
        self._await(lambda: self.halted or self.done, timeout, "has not come to where it is to be halted")
        if not self.halted:
            raise CommandFailed(self.completed())

    def go_on(self) -> None:
        self.kill(signals.SIGCONT)

    def write(self, data: bytes, timeout: float = 30.0) -> None:
        """Give it input, as fast as it reads; what it never read when it ends is dropped."""
        view = memoryview(data)
        while view:
            self._await(lambda: self._stdin_credit > 0 or self.done, timeout, "does not read its input")
            if self.done:
                return
            with self._changed:
                part = view[: min(CHUNK, self._stdin_credit)]
                self._stdin_credit -= len(part)
            self._agent.tell({"id": self.id, "op": "stdin"}, part)
            view = view[len(part) :]

    def close_stdin(self) -> None:
        if not self.done:
            self._agent.tell({"id": self.id, "op": "stdin", "eof": True})

    def resize(self, rows: int, columns: int) -> None:
        """Tell a command on a terminal the new size of it."""
        if not self.done:
            self._agent.tell({"id": self.id, "op": "resize", "pty": [rows, columns]})

    def read(self, position: int, stream: str = "stdout", timeout: float | None = None) -> tuple[bytes, int]:
        """Bytes from `position` on and the position behind them; waits until there are any, b"" at the end."""
        kept = self._streams[stream]
        self._await(lambda: kept.end > position or self.done, timeout, "has printed nothing more")
        with self._changed:
            position = max(position, kept.start)
            return bytes(kept.data[position - kept.start :]), kept.end

    def lines(self, stream: str = "stdout", timeout: float | None = 30.0) -> Iterator[str]:
        """Its lines from the first kept on, each as soon as it is complete, until it ends; `timeout` is per line."""
        kept = self._streams[stream]
        position = 0

        def ready() -> bool:
            return self.done or kept.line_at(position, False) is not None

        while True:
            self._await(ready, timeout, "has printed no further line")
            with self._changed:
                line = kept.line_at(position, self.done)
            if line is None:
                return
            position = line[1]
            yield line[0]

    def wait_for_line(self, pattern: str | re.Pattern[str], timeout: float = 30.0) -> re.Match[str]:
        """The next line, of either stream, that `pattern` is found in; lines before it count as seen.

        Raises CommandTimedOut, or CommandFailed when the command ends without such a line.
        """
        wanted = re.compile(pattern)
        found: list[re.Match[str]] = []

        def look() -> bool:
            for kept in self._streams.values():
                while (line := kept.line_at(kept.searched, self.done)) is not None:
                    kept.searched = line[1]
                    if match := wanted.search(line[0]):
                        found.append(match)
                        return True
            return self.done

        self._await(look, timeout, f"has printed no line with /{wanted.pattern}/")
        if found:
            return found[0]
        failed = CommandFailed(self.completed())
        failed.add_note(f"a line with /{wanted.pattern}/ was awaited of it")
        raise failed

    def completed(self) -> Completed:
        """What it did, once it has ended."""
        if self.returncode is None:
            raise ValueError(f"{self.what} is still running")
        return Completed(self.argv, self.returncode, self.stdout, self.stderr, self._ended - self._began)

    def _await(self, condition: Callable[[], bool], timeout: float | None, failing: str) -> None:
        with self._changed:
            met = self._changed.wait_for(lambda: self.error is not None or condition(), timeout)
            if self.error is not None:
                raise self.error
            if not met:
                out, err = (self._streams[name].text() for name in ("stdout", "stderr"))
                raise CommandTimedOut(f"{self.what} {failing} within {timeout:g} s{_last_output(out, err)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.error is None and not self.done:
            self.kill()
            self.wait(ANSWER_SECONDS)


class Agent:
    """The guest's agent as seen from here; owns the socket. Every method may be called from any thread."""

    def __init__(
        self,
        channel: socket.socket,
        on_hello: Callable[[], None] = lambda: None,
        why_closed: Callable[[], str] = lambda: "QEMU has closed the agent's port",
        transcript: Path | None = None,
    ):
        """`transcript` is a file that gets a line for each frame but those that only carry data."""
        self.changed = threading.Condition()
        self.hello: dict[str, Any] | None = None
        """What the agent said of itself: protocol, pid, python, kernel, uptime (s). None while it is not there."""
        self.garbage = 0
        """Bytes that one of the two ends could not make sense of."""
        self._transcript = transcript.open("w", encoding="utf-8") if transcript is not None else None
        self._channel = channel
        self._on_hello = on_hello
        self._why_closed = why_closed
        self._sending = threading.Lock()
        self._requests: dict[int, _Request] = {}
        self._next = 1
        self._lost: str | None = None
        self._final = False
        self._closed = False
        self._reader = threading.Thread(target=self._read, name="agent reader", daemon=True)
        self._reader.start()

    # Life

    def wait_ready(self, timeout: float) -> dict[str, Any]:
        """Wait for the agent's greeting. Raises GuestLost when it does not come or speaks another protocol."""
        with self.changed:
            self.changed.wait_for(lambda: self.hello is not None or self._final, timeout)
            if self.hello is None:
                before = f" (before that: {self._lost})" if self._lost and not self._final else ""
                late = f"the guest's agent has not greeted within {timeout:g} s{before}"
                raise GuestLost(self._lost if self._lost and self._final else late)
            if self.hello.get("protocol") != PROTOCOL:
                raise HarnessError(
                    f"the guest's agent speaks protocol {self.hello.get('protocol')}, this harness {PROTOCOL}: "
                    "build the image anew"
                )
            return self.hello

    @property
    def ready(self) -> bool:
        return self.hello is not None and self._lost is None

    def lose(self, reason: str, final: bool = True) -> None:
        """The agent is known to be gone: every request under way fails with GuestLost and that reason.

        So does every later one, until an agent greets anew; unless `final`, there may be one that does.
        """
        with self.changed:
            self._final |= final
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        self.hello = None
        self._lost = reason
        for request in self._requests.values():
            request.lose(f"{request.what}: {reason}")
        self._requests.clear()
        self.changed.notify_all()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._channel.close()
        if self._transcript is not None:
            self._transcript.close()

    def _note(self, direction: str, header: Mapping[str, Any], payload: bytes | memoryview) -> None:
        if self._transcript is None or header.get("event", header.get("op")) in BULK:
            return
        # Of payloads only programs are text.
        text = payload[:LONGEST_NOTE] if header.get("op") in ("eval", "call") else b""
        shown = bytes(text).decode(errors="replace")
        line = json.dumps({**header, **({"payload": shown} if shown else {})})
        with contextlib.suppress(ValueError):  # it is closed, and what comes now interests nobody
            self._transcript.write(f"{time.time():.6f} {direction} {line}\n")
            self._transcript.flush()

    def _read(self) -> None:
        decoder = Decoder()
        while True:
            try:
                data = self._channel.recv(8 * CHUNK)
            except OSError:
                data = b""
            if not data:
                self.lose("the harness has closed the channel" if self._closed else self._why_closed())
                return
            acknowledge: dict[int, int] = {}
            with self.changed:
                for header, payload in decoder.feed(data):
                    count = self._dispatch(header, payload)
                    if count:
                        acknowledge[header["id"]] = acknowledge.get(header["id"], 0) + count
                self.garbage += decoder.garbage
                decoder.garbage = 0
                self.changed.notify_all()
            for ident, count in acknowledge.items():
                with contextlib.suppress(HarnessError):  # then nobody is there to be told
                    self.tell({"id": ident, "op": "ack", "count": count})

    def _dispatch(self, header: dict[str, Any], payload: bytes) -> int:
        ident, event = header.get("id"), header.get("event")
        self._note("<-", header, payload)
        if ident == 0:
            if event == "hello":
                if self._requests:
                    self._lose("the agent in the guest died and was started anew")
                if not self._final:
                    self.hello = header
                    self._lost = None
                self._on_hello()
            elif event == "garbage":
                self.garbage += int(header.get("bytes", 0))
            return 0
        request = self._requests.get(ident) if isinstance(ident, int) else None
        if request is None:
            return 0
        count = request.on_event(header, payload)
        if request.done:
            del self._requests[request.id]
        return count

    def summon(self) -> None:
        """Ask for the greeting: for a guest that is restored, whose agent has greeted somebody else long ago."""
        self.tell({"id": -1, "op": "hello"})

    def begin(self) -> list[str]:
        """Give a guest that has just greeted the time and randomness of its own; returns what it has mounted then.

        It may be a copy of one that others are copies of, too, with the clock and the random numbers of all of them.
        """
        header = {"op": "begin", "time_ns": time.time_ns()}
        return list(self._ask("begin", header, os.urandom(64))["mounted"])

    # Requests

    def tell(self, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        """Send one frame. Raises GuestLost when the guest takes nothing for SEND_SECONDS or is gone."""
        view = memoryview(encode(header, payload))
        deadline = time.monotonic() + SEND_SECONDS
        poll = select.poll()
        with self._sending:
            if self._lost is not None:
                raise GuestLost(self._lost)
            self._note("->", header, payload)
            try:
                poll.register(self._channel, select.POLLOUT)
                while view:
                    try:
                        view = view[self._channel.send(view, socket.MSG_DONTWAIT) :]
                    except BlockingIOError:
                        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                            # Half a frame may be under way: nothing sent after it would be understood.
                            self._channel.shutdown(socket.SHUT_RDWR)
                            raise GuestLost(f"the guest's agent has taken no data for {SEND_SECONDS:g} s") from None
            except OSError as error:
                raise GuestLost(f"the channel to the guest's agent is gone: {error}") from error

    def _open(self, make: Callable[[int], _Request]) -> _Request:
        with self.changed:
            if self._lost is not None or self.hello is None:
                raise GuestLost(self._lost or "the guest's agent has not greeted yet")
            request = make(self._next)
            self._requests[self._next] = request
            self._next += 1
            return request

    def _await(self, request: _Request, timeout: float) -> dict[str, Any]:
        with self.changed:
            if not self.changed.wait_for(lambda: request.done, timeout):
                self._requests.pop(request.id, None)
                raise GuestLost(f"{request.what}: the guest's agent has not answered within {timeout:g} s")
            if request.error is not None:
                raise request.error
            return request.answer

    def _ask(
        self, what: str, header: dict[str, Any], payload: bytes = b"", timeout: float = ANSWER_SECONDS
    ) -> dict[str, Any]:
        request = self._open(lambda ident: _Request(ident, what))
        self.tell({"id": request.id, **header}, payload)
        return self._await(request, timeout)

    def ping(self, timeout: float = ANSWER_SECONDS) -> float:
        """Seconds for one round trip to the agent."""
        began = time.perf_counter()
        self._ask("ping", {"op": "ping"}, timeout=timeout)
        return time.perf_counter() - began

    def eval(self, source: str, timeout: float = 20.0) -> Any:
        """Run Python in the agent's interpreter, where names stay from call to call; under a millisecond.

        Returns the value of a last expression, which has to be JSON. Raises AgentError with the traceback. While
        it runs the agent serves nobody else, hence the deadline: for anything slow, run a command.
        """
        what = f"in the guest's interpreter, {source.strip().splitlines()[-1] if source.strip() else 'nothing'!r}"
        header = {"op": "eval", "timeout": timeout}
        return self._ask(what, header, source.encode(), timeout + ANSWER_SECONDS).get("value")

    def call(self, function: str, *args: Any, timeout: float = 20.0, **kwargs: Any) -> Any:
        """Call "module:function" in the agent's interpreter with JSON arguments; as eval() otherwise."""
        arguments = json.dumps({"args": args, "kwargs": kwargs}).encode()
        header = {"op": "call", "function": function, "timeout": timeout}
        return self._ask(f"in the guest's interpreter, {function}()", header, arguments, timeout + ANSWER_SECONDS).get(
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
        process = self._open(lambda ident: GuestProcess(self, ident, [str(word) for word in words], keep, file))
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
            process._await(lambda: process.done, ANSWER_SECONDS, "does not die of SIGKILL")
            out, err = process.stdout, process.stderr
            raise CommandTimedOut(
                f"{process.what} has not ended within {timeout:g} s and was killed{_last_output(out, err)}"
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
        request = self._open(lambda ident: _Request(ident, f"put {target}"))
        self.tell({"id": request.id, "op": "put", "path": target, "mode": mode})
        for chunk in chunks:
            if request.done:
                break
            self.tell({"id": request.id, "op": "data"}, chunk)
        self.tell({"id": request.id, "op": "data", "eof": True})
        self._await(request, timeout)

    def get(self, path: str, to: Path | None = None, limit: int = 256 << 20, timeout: float = 60.0) -> bytes:
        """The content of a file in the guest; with `to` it is written there and b"" returned.

        Raises AgentError when the guest cannot read it or it is larger than `limit`.
        """
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(to.open("wb")) if to is not None else None
            request = self._open(lambda ident: _Fetch(ident, f"get {path}", limit, file))
            assert isinstance(request, _Fetch)
            self.tell({"id": request.id, "op": "get", "path": path})
            self._await(request, timeout)
        if request.size > limit and to is None:
            raise AgentError(f"get {path}: it has {request.size} bytes, more than the {limit} asked for; give to=")
        return b"".join(request.chunks)
