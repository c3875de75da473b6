"""One connection to a vhost-user back-end: a request goes out, its answer comes in, both by a deadline.

The back-end is another process that may be broken or hostile. An answer must be the one that was asked for, of exactly
the length it has, and bring no files; what comes unasked is not read but ends the connection, as does everything else
that is wrong. Errors name the socket and the request.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from collections.abc import Sequence

from netbridge.errors import DeviceError
from netbridge.virtio.errors import Gone, Misbehaved
from netbridge.virtio.vhost_user import messages
from netbridge.virtio.vhost_user.messages import ANSWERS, HEADER, NEED_REPLY, U64, VERSION, Header, Request

ANSWER_SECONDS = 5.0
_MOST_FDS = 16  # room for what no back-end may send, so that it can be closed


class Refused(DeviceError):
    """The back-end answered a request with an error of its own."""


class Connection:
    """Owns `stream`, a connected stream socket. `name` is for messages. `answer_seconds`: how long a request and its
    answer may take. Once an error was raised (but Refused), the connection is closed."""

    def __init__(self, stream: socket.socket, name: str, answer_seconds: float = ANSWER_SECONDS) -> None:
        stream.setblocking(False)
        self._stream = stream
        self._name = name
        self._answer_seconds = answer_seconds
        self._poller = select.poll()
        self.acknowledged = False  # REPLY_ACK was agreed

    @property
    def closed(self) -> bool:
        return self._stream.fileno() < 0

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()

    def ask(self, request: Request, payload: bytes = b"", size: int | None = None) -> bytes:
        """Makes a request that has an answer, and returns the answer's payload of `size` bytes (by default what
        `ANSWERS` says). Raises Gone or Misbehaved."""
        return self._converse(request, payload, (), ANSWERS[request] if size is None else size)

    def tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Makes a request that has no answer but, where REPLY_ACK is agreed, whether it was carried out; then that is
        awaited. Raises Gone, Misbehaved, and Refused when the back-end says that it did not."""
        if not self.acknowledged:
            self._converse(request, payload, fds, None)
            return
        (code,) = U64.unpack(self._converse(request, payload, fds, U64.size, NEED_REPLY))
        if code:
            raise Refused(
                f"{self._name}: the back-end refused {request.name} (it answered {code}); its own log may say why"
            )

    def ask_u64(self, request: Request) -> int:
        (value,) = U64.unpack(self.ask(request))
        return int(value)

    def look(self) -> None:
        """Whether the back-end is still there, without waiting. Raises Gone when it hung up, and Misbehaved when it
        said something: it has nothing to say but answers."""
        try:
            self._require_silence()
        except DeviceError as error:
            self.close()
            raise type(error)(f"{self._name}: {error}") from None

    # ---- The wire

    def _converse(
        self, request: Request, payload: bytes, fds: Sequence[int], size: int | None, flags: int = 0
    ) -> bytes:
        deadline = time.monotonic() + self._answer_seconds
        if self.closed:
            raise Gone(f"{self._name}: there is no back-end to take {request.name}")
        try:
            self._require_silence()
            self._send(Header(request, VERSION | flags, len(payload)).pack() + payload, fds, deadline)
            if size is None:
                return b""
            head = self._receive(HEADER.size, deadline)
            messages.parse_answer(head, request, size)
            return self._receive(size, deadline)
        except DeviceError as error:
            self.close()
            raise type(error)(f"{self._name}: {request.name}: {error}") from None
        except OSError as error:
            self.close()
            raise Gone(f"{self._name}: {request.name}: the back-end is gone: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def _send(self, data: bytes, fds: Sequence[int], deadline: float) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            try:
                sent = self._stream.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._await(select.POLLOUT, deadline, "did not take it")
                continue
            data = data[sent:]
            ancillary = []

    def _receive(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            self._await(select.POLLIN, deadline, "did not answer")
            try:
                piece, fds, cut = self._receive_piece(size - len(data))
            except BlockingIOError:
                continue
            for fd in fds:
                os.close(fd)
            if fds or cut:
                raise Misbehaved("its answer brings files, where none belong")
            if not piece:
                raise Gone("the back-end hung up instead of answering")
            data += piece
        return data

    def _receive_piece(self, size: int) -> tuple[bytes, list[int], bool]:
        fds = array.array("i")
        room = socket.CMSG_SPACE(_MOST_FDS * fds.itemsize)
        data, ancillary, flags, _ = self._stream.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        return data, fds.tolist(), bool(flags & socket.MSG_CTRUNC)

    def _await(self, event: int, deadline: float, failing: str) -> None:
        self._poller.register(self._stream, event)
        left = deadline - time.monotonic()
        if left <= 0 or not self._poller.poll(left * 1000):
            raise Gone(f"the back-end {failing} within {self._answer_seconds:g} s; is it stopped?")

    def _require_silence(self) -> None:
        try:
            waiting = self._stream.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError as error:
            raise Gone(f"the back-end is gone: {error.strerror}") from None
        if waiting:
            raise Misbehaved("the back-end said something that nobody asked for")
        raise Gone("the back-end hung up")
