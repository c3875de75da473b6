"""The driver's end of the control socket: one client at a time, nothing believed, never a wait.

`PortServer` is a state machine around one epoll fd. Whoever owns the event loop waits for `fileno()` and calls
`handle()`, which returns plain events. Nothing a client does makes `handle` raise or block.

    no client ── connect ──► await HELLO ── HELLO ──► await session ── offer ──► await READY ── READY ──► running
        ▲                        │                         │                          │                      │
        └────────────────────────┴──────── hang-up, BYE, rubbish, deadline ───────────┴──────────────────────┘

What may never happen: WELCOME for a session that another client was welcomed to (its memory may still be mapped there);
READY before WELCOME; HELLO twice; while running any message but BYE and a request; a request before the last was
answered.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
from contextlib import ExitStack
from enum import Enum

from netbridge.ipc._record import NamedTuple
from netbridge.ipc.deadline import Deadline
from netbridge.ipc.errors import BadMessage, PortError, Reason
from netbridge.ipc.listener import PortListener
from netbridge.ipc.messages import LONGEST_MESSAGE, Bye, Facts, Hello, Link, Ready, Welcome, common_version, parse
from netbridge.ipc.offloads import ALL_OFFLOADS
from netbridge.ipc.requests import Answer, Filter, Mac, Verdict
from netbridge.ipc.session import PortSession

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

HANDSHAKE_SECONDS = 2.0

# Bounds on what one call of `handle` does, so that a crowd at the door never holds up frames.
_MOST_ACCEPTS = 16
_MOST_MESSAGES = 4

_UCRED = struct.Struct("3i")
_NO_WAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Peer(NamedTuple):
    """Who is at the other end: what the kernel says (SO_PEERCRED, as of connect), and the name it gave itself."""

    pid: int
    uid: int
    name: str = ""

    def __str__(self) -> str:
        return f"client {self.name or '(no name yet)'} (pid {self.pid}, uid {self.uid})"


class ClientWaits(NamedTuple):
    """A client waits for another session than the one that was on offer: for one with the offloads that it can take.
    The offer was withdrawn; make one for `PortServer.asked`."""

    peer: Peer

    def __str__(self) -> str:
        return f"{self.peer} waits for a session with other offloads"


class ClientReady(NamedTuple):
    """The client has mapped everything: frames may flow in `session`."""

    peer: Peer
    session: int

    def __str__(self) -> str:
        return f"{self.peer} is ready, session {self.session}"


class ClientGone(NamedTuple):
    """The connection is closed. `session`: the session it was welcomed to, whose memory must now be replaced; None when
    it never got that far, and then the offer still stands."""

    peer: Peer
    session: int | None
    reason: Reason
    text: str

    def __str__(self) -> str:
        return f"{self.peer} is gone: {self.reason.words}" + (f" ({self.text})" if self.text else "")


class ClientRefused(NamedTuple):
    """Someone was turned away at the door. Nothing has changed; worth a line in the log."""

    peer: Peer
    reason: Reason

    def __str__(self) -> str:
        return f"{self.peer} was refused: {self.reason.words}"


class ClientAsks(NamedTuple):
    """The running client asks for something: `answer` it."""

    peer: Peer
    request: Filter | Mac

    def __str__(self) -> str:
        return f"{self.peer} asks for {type(self.request).__name__.lower()}"


Event = ClientWaits | ClientReady | ClientGone | ClientRefused | ClientAsks


class _State(Enum):
    AWAIT_HELLO = "HELLO"
    AWAIT_SESSION = "nothing before WELCOME"
    AWAIT_READY = "READY"
    RUNNING = "nothing but BYE and requests"


class _Connection:
    """A connected socket and what is known about its other end."""

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self.socket = sock
        self.peer = peer
        self.state = _State.AWAIT_HELLO
        self.session: int | None = None
        # Of HELLO.
        self.offloads = 0
        # Told, or to be told as soon as the socket takes it.
        self.unsent: Facts | None = None
        self.asked: int | None = None  # number of the request that was not answered yet
        self.answer: Answer | None = None  # to be sent as soon as the socket takes it

    def send(self, data: bytes, fds: Collection[int] = ()) -> bool:
        """False when the socket is full at the moment. Raises OSError when it is dead."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.socket.sendmsg([data], rights, _NO_WAIT)
        except BlockingIOError:
            return False
        return True

    def receive(self) -> bytes | None:
        """The next packet, b"" when the client hung up, None when there is nothing. Raises BadMessage, OSError."""
        try:
            try:
                data, flags = self._receive()
            except ConnectionResetError:
                # It left without reading everything; what it said before is still there.
                data, flags = self._receive()
        except BlockingIOError:
            return None
        if flags & socket.MSG_TRUNC:
            raise BadMessage(f"packet longer than any message ({LONGEST_MESSAGE} bytes)")
        if flags & socket.MSG_CTRUNC:
            raise BadMessage("a client sends no file descriptors")
        return data

    def _receive(self) -> tuple[bytes, int]:
        # No room for ancillary data: the kernel drops fds that a client sends, none ever gets into this process.
        data, _, flags, _ = self.socket.recvmsg(LONGEST_MESSAGE, 0, socket.MSG_DONTWAIT)
        return data, flags

    def close(self, bye: Bye | None) -> None:
        with self.socket:
            if bye is not None:
                try:
                    self.send(bye.pack())
                    # Closing with unread packets would show the other side a reset before it shows it the BYE.
                    for _ in range(_MOST_MESSAGES):
                        if not self.socket.recvmsg(0, 0, socket.MSG_DONTWAIT)[2]:
                            break
                except OSError:
                    pass


class PortServer:
    """Serves the port at `path` (or at a listener that someone else opened and keeps) to clients whose uid is in
    `allowed_uids`.

    Put `fileno()` into an event loop; when it is readable call `handle()`. `offer()` a session before or after a client
    has come. `handshake_seconds` bounds how long a client may take for HELLO, and again for READY. `refusal`: every
    client is turned away with NOT_SHARED and these words. `agree`: which of the offloads that a client can take a
    session for it would have, as bit sets; asked only while one is on offer.

    Raises PortInUse or PortUnavailable as PortListener does, OSError when the system gives no more fds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | PortListener,
        allowed_uids: Collection[int],
        facts: Facts,
        *,
        mode: int = 0o666,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        refusal: str = "",
        agree: Callable[[int], int] = lambda _asked: 0,
    ) -> None:
        self.agree = agree
        self.allowed_uids = frozenset(allowed_uids)
        self.refusal = refusal
        self.handshake_seconds = handshake_seconds
        facts.check()
        self._facts = facts
        self._offer: PortSession | None = None
        self._client: _Connection | None = None
        with ExitStack() as stack:
            if isinstance(path, PortListener):
                self._listener = path
            else:
                self._listener = stack.enter_context(PortListener(path, mode=mode))
            self._deadline = Deadline()
            stack.callback(self._deadline.close)
            # Given up for a moment when the process has no fd left, to turn a client away instead of spinning.
            self._spare = os.dup(self._listener.fileno())
            stack.callback(self._close_spare)
            self._epoll = stack.enter_context(select.epoll())
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)
            self._epoll.register(self._deadline.fileno(), select.EPOLLIN)
            self._stack = stack.pop_all()

    def fileno(self) -> int:
        """An epoll fd: readable when `handle` has something to do."""
        return self._epoll.fileno()

    @property
    def client(self) -> Peer | None:
        """Whoever is connected, in whatever state."""
        return self._client.peer if self._client else None

    @property
    def asked(self) -> int | None:
        """The offloads that the client can take who waits for a session; None when nobody waits."""
        waits = self._client is not None and self._client.state is _State.AWAIT_SESSION
        return self._client.offloads if self._client is not None and waits else None

    @property
    def running(self) -> bool:
        """Whether a client is READY, so that frames may flow."""
        return self._client is not None and self._client.state is _State.RUNNING

    def offer(self, session: PortSession) -> None:
        """Gives `session` to the client that waits, or to the next that comes, if it has no offloads but those that the
        client can take. It is welcomed to once and then spent:
        offer a new one after ClientGone with a session. The session stays the caller's to close, after the client is
        gone. Raises PortError while a client has a session."""
        if self._client is not None and self._client.session is not None:
            raise PortError(f"session {self._client.session} is still with {self._client.peer}; dismiss it first")
        self._offer = session
        client = self._client
        if client is not None and client.state is _State.AWAIT_SESSION and not session.offloads & ~client.offloads:
            self._welcome(client, session)

    def withdraw(self) -> None:
        """Takes back an offer that nobody has used: clients wait until the next one."""
        self._offer = None

    def update(self, facts: Facts) -> None:
        """Link, MTU or MAC changed: tells the client, if there is one and something is new."""
        facts.check()
        if facts == self._facts:
            return
        # An announcement is wanted once, and of the client that is here.
        self._facts = facts._replace(announce=False)
        client = self._client
        if client is not None and client.session is not None:
            announce = facts.announce or (client.unsent is not None and client.unsent.announce)
            client.unsent = facts._replace(announce=announce)
            self._tell(client)

    def answer(self, request: Filter | Mac, verdict: Verdict, text: str = "") -> None:
        """Answers what ClientAsks brought; nothing happens when the client is gone meanwhile."""
        client = self._client
        if client is not None and client.asked is not None:
            client.answer = Answer(request.request, verdict, text)
            self._tell(client)

    def handle(self) -> list[Event]:
        """Does what there is to do, without waiting, and says what came of it. Never raises for what a client did."""
        events: list[Event] = []
        # The client that is here first, so that its successor does not find the port busy; and its messages before its
        # deadline, which they may have moved.
        self._serve(events)
        if self._deadline.expired() and self._client is not None:
            self._end(self._client, events, Bye(Reason.TIMEOUT, f"{self._client.state.value} did not come"))
        self._accept(events)
        self._serve(events)
        return events

    def dismiss(self, reason: Reason, text: str = "") -> ClientGone | None:
        """Says BYE to the client and closes its connection. None when there is no client."""
        events: list[Event] = []
        if self._client is not None:
            self._end(self._client, events, Bye(reason, text))
        gone = events[0] if events else None
        assert gone is None or isinstance(gone, ClientGone)
        return gone

    def close(self) -> None:
        """Says BYE (shutdown), closes everything and removes the socket file. More than once does no harm."""
        self.dismiss(Reason.SHUTDOWN)
        self._stack.close()

    def __enter__(self) -> PortServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- At the door

    def _accept(self, events: list[Event]) -> None:
        for _ in range(_MOST_ACCEPTS):
            try:
                sock, _ = self._listener.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    continue
                self._turn_away()
                continue
            self._admit(sock, events)

    def _admit(self, sock: socket.socket, events: list[Event]) -> None:
        pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        connection = _Connection(sock, Peer(pid, uid))
        refusal = None
        if self.refusal:
            refusal = Bye(Reason.NOT_SHARED, self.refusal)
        elif uid not in self.allowed_uids:
            refusal = Bye(Reason.NOT_PERMITTED, f"uid {uid} is not on the driver's list")
        elif self._client is not None:
            refusal = Bye(Reason.BUSY, "one client at a time; try again when it has left")
        if refusal is not None:
            connection.close(refusal)
            events.append(ClientRefused(connection.peer, refusal.reason))
            return
        try:
            self._epoll.register(sock.fileno(), select.EPOLLIN)
        except OSError as error:
            connection.close(Bye(Reason.FAILED, str(error)))
            events.append(ClientRefused(connection.peer, Reason.FAILED))
            return
        self._client = connection
        self._deadline.arm(self.handshake_seconds)

    def _turn_away(self) -> None:
        """Accepts one connection in place of the spare fd and closes it."""
        self._close_spare()
        try:
            self._listener.socket.accept()[0].close()
            self._spare = os.dup(self._listener.fileno())
        except OSError:
            pass

    def _close_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    # ---- The client

    def _serve(self, events: list[Event]) -> None:
        for _ in range(_MOST_MESSAGES):
            client = self._client
            if client is None:
                return
            try:
                data = client.receive()
                if data is None:
                    break
                if not data:
                    self._end(client, events, None)
                    return
                self._take(client, data, events)
            except BadMessage as error:
                self._end(client, events, Bye(error.reason, str(error)))
            except OSError as error:
                self._end(client, events, None, str(error))
        if self._client is not None:
            self._tell(self._client)

    def _take(self, client: _Connection, data: bytes, events: list[Event]) -> None:
        message = parse(data)
        if isinstance(message, Bye):
            self._end(client, events, None, message.text, message.reason)
        elif isinstance(message, Hello) and client.state is _State.AWAIT_HELLO:
            common_version(message)
            client.peer = Peer(client.peer.pid, client.peer.uid, message.name)
            client.state = _State.AWAIT_SESSION
            # The driver's own time to get a session ready is not the client's fault.
            self._deadline.disarm()
            client.offloads = message.offloads & ALL_OFFLOADS
            offer, self._offer = self._offer, None
            if offer is not None and offer.offloads == self.agree(client.offloads):
                self._welcome(client, offer)
            elif offer is not None:
                events.append(ClientWaits(client.peer))
        elif isinstance(message, Ready) and client.state is _State.AWAIT_READY:
            assert client.session is not None
            client.state = _State.RUNNING
            self._deadline.disarm()
            events.append(ClientReady(client.peer, client.session))
        elif isinstance(message, Filter | Mac) and client.state is _State.RUNNING and client.asked is None:
            client.asked = message.request
            events.append(ClientAsks(client.peer, message))
        else:
            raise BadMessage(
                f"{type(message).__name__.upper()} came, but {client.state.value} was awaited", Reason.UNEXPECTED
            )

    def _welcome(self, client: _Connection, session: PortSession) -> None:
        welcome = Welcome(session.number, self._facts, session.geometry, session.offloads, session.queue_pairs)
        # Spent even if sending fails: whether the fds arrived cannot be known.
        self._offer = None
        client.session = session.number
        client.state = _State.AWAIT_READY
        self._deadline.arm(self.handshake_seconds)
        try:
            client.send(welcome.pack(), session.fds())
        except OSError:
            # A dead socket is seen by the next `handle`, one that does not read by the deadline.
            pass

    def _tell(self, client: _Connection) -> None:
        """Sends the newest facts and the answer that is due. A client that does not read is told later: only the newest
        are of interest."""
        if client.unsent is None and client.answer is None:
            return
        try:
            if client.unsent is not None and client.send(Link(client.unsent).pack()):
                client.unsent = None
            if client.answer is not None and client.unsent is None and client.send(client.answer.pack()):
                client.answer = client.asked = None
        except OSError:
            # Its hang-up is seen by the next receive, which makes the event.
            client.unsent = client.answer = None
        waiting = select.EPOLLOUT if client.unsent is not None or client.answer is not None else 0
        self._epoll.modify(client.socket.fileno(), select.EPOLLIN | waiting)

    def _end(
        self,
        client: _Connection,
        events: list[Event],
        bye: Bye | None,
        text: str = "",
        reason: Reason = Reason.UNSPECIFIED,
    ) -> None:
        """Closes the connection: with `bye` if this side ends it; else `reason` and `text` are what the client said."""
        self._epoll.unregister(client.socket.fileno())
        client.close(bye)
        self._client = None
        self._deadline.disarm()
        if bye is not None:
            reason, text = bye.reason, bye.text
        elif reason is Reason.UNSPECIFIED and not text:
            text = "hung up"
        events.append(ClientGone(client.peer, client.session, reason, text))
