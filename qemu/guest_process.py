"""A command under way in a guest, and what it has printed.

Each of its streams keeps its last bytes in memory and can be written to a file whole, so a flood costs a fixed amount
of memory.
"""

from __future__ import annotations

import re
import shlex
import signal as signals
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Self

from images.agent.protocol import CHUNK, WINDOW
from qemu.channel import ANSWER_SECONDS, Channel, Request
from qemu.completed import CommandFailed, CommandTimedOut, Completed, last_output


class Stream:
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


class GuestProcess(Request):
    """A command in the guest. As a context manager it is killed, if it still runs, at the end."""

    def __init__(self, channel: Channel, ident: int, argv: Sequence[str], keep: int, log: IO[bytes] | None):
        super().__init__(ident, f"in the guest, `{shlex.join(argv)}`")
        self.argv = tuple(argv)
        self.pid: int | None = None
        self.halted = False
        self.returncode: int | None = None
        self._channel = channel
        self._changed = channel.changed
        self._streams = {"stdout": Stream(keep), "stderr": Stream(keep)}
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
        self.wait_until(lambda: self.done, timeout, "has not ended")
        assert self.returncode is not None
        return self.returncode

    def kill(self, signal: int = signals.SIGKILL) -> None:
        """Signal its whole process group; nothing happens when it has ended already."""
        if not self.done:
            self._channel.tell({"id": self.id, "op": "kill", "signal": int(signal)})

    def wait_halted(self, timeout: float = 30.0) -> None:
        """Wait until it stands still at what start() was given as `halt_at`; go_on() lets it run again.

        Raises CommandTimedOut, or CommandFailed when it ends before.
        """
        self.wait_until(lambda: self.halted or self.done, timeout, "has not come to where it is to be halted")
        if not self.halted:
            raise CommandFailed(self.completed())

    def go_on(self) -> None:
        self.kill(signals.SIGCONT)

    def write(self, data: bytes, timeout: float = 30.0) -> None:
        """Give it input, as fast as it reads; what it never read when it ends is dropped."""
        view = memoryview(data)
        while view:
            self.wait_until(lambda: self._stdin_credit > 0 or self.done, timeout, "does not read its input")
            if self.done:
                return
            with self._changed:
                part = view[: min(CHUNK, self._stdin_credit)]
                self._stdin_credit -= len(part)
            self._channel.tell({"id": self.id, "op": "stdin"}, part)
            view = view[len(part) :]

    def close_stdin(self) -> None:
        if not self.done:
            self._channel.tell({"id": self.id, "op": "stdin", "eof": True})

    def resize(self, rows: int, columns: int) -> None:
        """Tell a command on a terminal the new size of it."""
        if not self.done:
            self._channel.tell({"id": self.id, "op": "resize", "pty": [rows, columns]})

    def read(self, position: int, stream: str = "stdout", timeout: float | None = None) -> tuple[bytes, int]:
        """Bytes from `position` on and the position behind them; waits until there are any, b"" at the end."""
        kept = self._streams[stream]
        self.wait_until(lambda: kept.end > position or self.done, timeout, "has printed nothing more")
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
            self.wait_until(ready, timeout, "has printed no further line")
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

        self.wait_until(look, timeout, f"has printed no line with /{wanted.pattern}/")
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

    def wait_until(self, condition: Callable[[], bool], timeout: float | None, failing: str) -> None:
        with self._changed:
            met = self._changed.wait_for(lambda: self.error is not None or condition(), timeout)
            if self.error is not None:
                raise self.error
            if not met:
                out, err = (self._streams[name].text() for name in ("stdout", "stderr"))
                raise CommandTimedOut(f"{self.what} {failing} within {timeout:g} s{last_output(out, err)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.error is None and not self.done:
            self.kill()
            self.wait(ANSWER_SECONDS)
