"""An eventfd: what an interrupt arrives on. Works with poll, epoll and asyncio alike. See eventfd(2)."""

from __future__ import annotations

import os
import select
import time

from vfio.errors import VfioError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio


class EventFd:
    """A counter in the kernel that is readable while it is not zero. Non-blocking, closed on exec.

    Owns its file descriptor: `close()` it, or use it as a context manager. An interrupt that was handed this eventfd
    keeps working on the kernel's own reference until it is disabled, even when this object is closed.
    Pass it wherever the interrupt calls of `vfio.Device.irqs` want a file descriptor, or its `fileno()`.
    As with files, using a closed one is a ValueError.
    """

    def __init__(self, initial: int = 0) -> None:
        self._fd = -1
        self._waiter: asyncio.Future[None] | None = None
        try:
            self._fd = os.eventfd(initial, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as error:
            fix = "close file descriptors, or raise the limit (ulimit -n)"
            raise VfioError("cannot make an eventfd", errno=error.errno, fix=fix) from None

    def fileno(self) -> int:
        """The file descriptor, still owned by this object. ValueError once closed."""
        if self._fd < 0:
            raise ValueError("this eventfd is closed")
        return self._fd

    def signal(self, count: int = 1) -> None:
        """Add `count`, as the kernel does when the interrupt comes."""
        os.eventfd_write(self.fileno(), count)

    def drain(self) -> int:
        """Take the count and set it to zero; 0 when nothing came since. Never blocks."""
        try:
            return os.eventfd_read(self.fileno())
        except BlockingIOError:
            return 0

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the count is not zero, and take it. `timeout` in seconds, None for no limit; 0 if it runs out."""
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        deadline = None if timeout is None else time.monotonic() + timeout
        while poller.poll(None if deadline is None else max(0, deadline - time.monotonic()) * 1000):
            if count := self.drain():
                return count
            # Somebody else who waits for it was faster.
        return 0

    async def wait_async(self) -> int:
        """Wait within the running asyncio loop until the count is not zero, and take it. One task at a time: a second
        one is refused with `VfioError`. ValueError when it is closed meanwhile."""
        import asyncio

        loop = asyncio.get_running_loop()
        while not (count := self.drain()):
            if self._waiter is not None:
                raise VfioError(f"another task waits for {self!r}", fix="give each task an eventfd of its own")
            self._waiter = loop.create_future()
            loop.add_reader(self._fd, _resolve, self._waiter)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if self._fd >= 0:
                    loop.remove_reader(self._fd)
        return count

    def close(self) -> None:
        """Close the file descriptor. Doing it twice is harmless. A task that waits for it gets a ValueError."""
        if self._waiter is not None:
            # While the number is still this file's: the loop would go on to watch whatever gets it next.
            self._waiter.get_loop().remove_reader(self._fd)
            _resolve(self._waiter)  # and its next look finds it closed
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> EventFd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EventFd {self._fd if self._fd >= 0 else 'closed'}>"


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
