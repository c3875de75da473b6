"""The client's end of the control socket: messages and file descriptors in, messages out.

Every file descriptor that arrives is either handed on or closed, whatever the message around it was.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time

from netbridge.ipc.errors import BadMessage, PortClosed, PortError, PortUnavailable, Reason
from netbridge.ipc.messages import FD_NAMES, LONGEST_MESSAGE, Bye, Message, Welcome, parse


class ControlSocket:
    """Connects to the driver at `path`. Raises PortUnavailable when nobody listens there, PortError for the rest."""

    def __init__(self, path: str, timeout: float) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            # From here on nothing waits in recvmsg: with a timeout Python would, whatever MSG_DONTWAIT says.
            self._socket.setblocking(False)
        except (FileNotFoundError, ConnectionRefusedError):
            self._socket.close()
            raise PortUnavailable(f"no driver listens at {path}; start one, or wait for it") from None
        except TimeoutError:
            self._socket.close()
            raise PortUnavailable(f"the driver at {path} does not take connections; is it stopped?") from None
        except PermissionError:
            self._socket.close()
            raise PortError(
                f"cannot connect to {path}: permission denied; is this user (uid {os.geteuid()}) one that the driver "
                "serves? netbridge run --service-uid names them"
            ) from None
        except OSError as error:
            self._socket.close()
            raise PortError(f"cannot connect to {path}: {error.strerror}") from None

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """A dead or full socket is no error here: why the driver left is found by reading."""
        try:
            self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            pass

    def receive(self) -> Message | None:
        """The next message, None when there is none. Raises BadMessage, and PortClosed when the driver hung up."""
        message, fds = self._receive()
        if fds:
            _close_all(fds)
            raise BadMessage("file descriptors where none belong")
        return message

    def await_welcome(self, deadline: float) -> tuple[Welcome, list[int]]:
        """The answer to HELLO; the caller owns the fds. Raises PortError."""
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or not poller.poll(left * 1000):
                    raise PortUnavailable(f"the driver at {self._path} did not answer in time; is its device ready?")
                message, fds = self._receive()
                if message is not None:
                    break
        except BadMessage as error:
            self.send(Bye(error.reason, str(error)).pack())
            raise PortError(f"what answers at {self._path} is no driver: {error}") from None
        if isinstance(message, Welcome) and len(fds) == len(FD_NAMES):
            return message, fds
        _close_all(fds)
        if isinstance(message, Bye):
            raise PortClosed(message.reason, message.text)
        what = f"{type(message).__name__.upper()} with {len(fds)} file descriptors"
        self.send(Bye(Reason.UNEXPECTED, what).pack())
        raise PortError(f"what answers at {self._path} is no driver: {what} instead of WELCOME with {len(FD_NAMES)}")

    def close(self) -> None:
        self._socket.close()

    def _receive(self) -> tuple[Message | None, list[int]]:
        try:
            try:
                data, ancillary, flags = self._receive_raw()
            except ConnectionResetError:
                # The driver left without reading everything; what it said before is still there.
                data, ancillary, flags = self._receive_raw()
        except BlockingIOError:
            return None, []
        except OSError as error:
            raise PortClosed(Reason.UNSPECIFIED, error.strerror or "") from None
        fds = _received_fds(ancillary)
        try:
            if not data and not fds:
                raise PortClosed(Reason.UNSPECIFIED, "it hung up")
            if flags & socket.MSG_TRUNC:
                raise BadMessage(f"packet longer than any message ({LONGEST_MESSAGE} bytes)")
            if flags & socket.MSG_CTRUNC:
                raise BadMessage("more file descriptors than any message brings, or more than this process may have")
            return parse(data), fds
        except PortError:
            _close_all(fds)
            raise

    def _receive_raw(self) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
        space = socket.CMSG_SPACE(len(FD_NAMES) * array.array("i").itemsize)
        data, ancillary, flags, _ = self._socket.recvmsg(
            LONGEST_MESSAGE, space, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
        return data, ancillary, flags


def _received_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
