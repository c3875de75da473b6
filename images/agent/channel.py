"""The agent's end of the port, and the loop that waits for it and for everything else."""

from __future__ import annotations

import errno
import os
import select
import sys
import time

from .protocol import BACKLOG, CHUNK, PROTOCOL, Decoder, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Loop:
    """epoll, with the handler of each descriptor."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._interest: dict[int, int] = {}

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        before = self._interest.get(fd)
        if before is None:
            self._epoll.register(fd, events)
        elif before != events:
            self._epoll.modify(fd, events)
        self._interest[fd] = events
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        if self._interest.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            del self._handlers[fd]

    def turn(self, timeout: float) -> None:
        """Handle what has happened; waits up to `timeout` seconds (-1: for ever) until something has."""
        for fd, events in self._epoll.poll(timeout):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)


class Channel:
    """Frames to the host and from it. `fd` is read and written without blocking, and owned.

    What does not fit into the port waits here; those who send much of their own will look at `full` first.
    """

    def __init__(self, fd: int, loop: Loop):
        self.gone = False
        """Whether the host has closed its end."""
        self.on_frame: Callable[[dict[str, Any], bytes], None] = lambda _header, _payload: None
        self.on_room: Callable[[], None] = lambda: None
        self._port = fd
        os.set_blocking(fd, False)
        self._loop = loop
        self._decoder = Decoder()
        self._out: list[memoryview] = []
        self._backlog = 0

    @property
    def full(self) -> bool:
        return self._backlog >= BACKLOG

    def send(self, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        frame = encode(header, payload)
        self._out.append(memoryview(frame))
        self._backlog += len(frame)
        self._flush()

    def _flush(self) -> None:
        while self._out:
            try:
                written = os.write(self._port, self._out[0][:CHUNK])
            except BlockingIOError:
                break
            except OSError as error:
                # EPIPE or ENODEV: the host has closed its end. What it was to read is of no use to the next one.
                if error.errno not in (errno.EPIPE, errno.ENODEV, errno.ECONNRESET):
                    raise
                self._lose_host()
                return
            self._backlog -= written
            if written == len(self._out[0]):
                self._out.pop(0)
            else:
                self._out[0] = self._out[0][written:]
        self._loop.watch(self._port, select.EPOLLIN | (select.EPOLLOUT if self._out else 0), self._on_port)

    def _lose_host(self) -> None:
        self._out.clear()
        self._backlog = 0
        self.gone = True
        self._loop.unwatch(self._port)

    def _on_port(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
            self.on_room()
        if not events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            return
        try:
            data = os.read(self._port, 4 * CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose_host()
            return
        garbage = self._decoder.garbage
        for header, payload in self._decoder.feed(data):
            self.on_frame(header, payload)
        if self._decoder.garbage != garbage:
            self.send({"id": 0, "event": "garbage", "bytes": self._decoder.garbage - garbage})

    def find_host(self) -> bool:
        """Whether to go on without a host: a port waits for its next one (which it has no event for), a socket ends."""
        import stat

        if not stat.S_ISCHR(os.fstat(self._port).st_mode):
            return False
        poll = select.poll()
        poll.register(self._port, select.POLLIN)
        if not any(events & select.POLLHUP for _, events in poll.poll(0)):
            self.gone = False
            self._decoder = Decoder()
            self.greet()
        return True

    def greet(self) -> None:
        system = os.uname()
        self.send(
            {
                "id": 0,
                "event": "hello",
                "protocol": PROTOCOL,
                "pid": os.getpid(),
                "python": ".".join(map(str, sys.version_info[:3])),
                "kernel": system.release,
                "uptime": time.monotonic(),
            }
        )
