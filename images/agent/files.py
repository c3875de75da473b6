"""Files on their way to the host and from it."""

from __future__ import annotations

import os

from .protocol import CHUNK, WINDOW, Refused, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .channel import Channel


class Reading:
    """A file on its way to the host."""

    def __init__(self, ident: int, fd: int):
        self.id = ident
        self.fd = fd
        self.credit = WINDOW


class Writing:
    """A file on its way from the host; it appears under its name only when it is whole."""

    def __init__(self, path: str, partial: str, fd: int, mode: int):
        self.path = path
        self.partial = partial
        self.fd = fd
        self.mode = mode


class Files:
    """Those under way. pump() is to be called whenever there may be room or credit."""

    def __init__(self, channel: Channel):
        self._channel = channel
        self._readings: dict[int, Reading] = {}
        self._writings: dict[int, Writing] = {}

    def get(self, request: Request) -> None:
        path = str(request.header["path"])
        if os.path.isdir(path):
            raise Refused(f"{path} is a directory of the guest")
        # Not to be held up by a FIFO or a device that has nothing to say.
        self._readings[request.id] = Reading(request.id, os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        self._send(self._readings[request.id])

    def acknowledge(self, ident: int, count: int) -> None:
        if ident in self._readings:
            self._readings[ident].credit += count

    def pump(self) -> None:
        for reading in list(self._readings.values()):
            self._send(reading)

    def _send(self, reading: Reading) -> None:
        while reading.credit > 0 and not self._channel.full and not self._channel.gone:
            problem = None
            try:
                data = os.read(reading.fd, CHUNK)
            except BlockingIOError:
                data = b""
            except OSError as error:
                data, problem = b"", error
            if data:
                reading.credit -= len(data)
                self._channel.send({"id": reading.id, "event": "output", "stream": "file"}, data)
                continue
            os.close(reading.fd)
            del self._readings[reading.id]
            if problem is not None:
                self._channel.send({"id": reading.id, "event": "error", "message": str(problem)})
            else:
                self._channel.send({"id": reading.id, "event": "result"})
            return

    def put(self, request: Request) -> None:
        path = str(request.header["path"])
        if os.path.isdir(path):
            raise Refused(f"{path} is a directory of the guest; give the full path of the file")
        os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
        partial = f"{path}.part{request.id}"
        # A device or an attribute of sysfs is written in place: there is nothing to rename onto it.
        in_place = (os.path.exists(path) and not os.path.isfile(path)) or path.startswith(("/sys/", "/proc/"))
        if in_place:
            partial = path
        flags = os.O_WRONLY | os.O_CLOEXEC | (0 if in_place else os.O_CREAT | os.O_TRUNC)
        fd = os.open(partial, flags, 0o600)
        self._writings[request.id] = Writing(path, partial, fd, int(request.header.get("mode", 0o644)))

    def data(self, request: Request) -> dict[str, Any] | None:
        writing = self._writings.get(request.id)
        if writing is None:
            return None  # the put was refused; the host learns of it from that answer
        try:
            view = memoryview(request.payload)
            while view:
                view = view[os.write(writing.fd, view) :]
            if not request.header.get("eof"):
                return None
            if writing.partial != writing.path:
                os.fchmod(writing.fd, writing.mode)
                os.rename(writing.partial, writing.path)
        except OSError:
            del self._writings[request.id]
            os.close(writing.fd)
            if writing.partial != writing.path:
                os.unlink(writing.partial)
            raise
        del self._writings[request.id]
        os.close(writing.fd)
        return {}
