"""The client's end of the port, for network stacks in Python: frames are memoryviews straight into DMA memory.

    with connect(name="my-stack") as client:
        for frame in client.receive():
            with frame:
                print(bytes(frame.data[:14]).hex())
        client.send_bytes(b"...")

A frame that is longer than a buffer is in several: `frame.pieces`, and `send` of a list of buffers. Whoever asks for
offloads finds the virtio header of what came in `frame.header`, and sets `buffer.header` for what is sent.

A received frame is this process's until it is released; a buffer to send is, until it is sent. Using either afterwards
raises. There are few of them, so give frames back soon: the driver drops what comes while a client holds its limit.

A `Client` is for one thread. With asyncio use `receive_async` and `async for`; with another event loop, `arm` and
`fileno`. When the driver ends the session every call raises `PortClosed`; `connect` again for a new one (its `wait`
says how long to try), with new memory: nothing of the old session is of use then.

The port itself is described in docs/port.md.
"""

from __future__ import annotations

import os
import select
import time
import warnings
from contextlib import ExitStack

from netbridge.datapath._core import ffi, lib
from netbridge.ipc.control import ControlSocket
from netbridge.ipc.errors import (
    BadGeometry,
    BadMessage,
    PortClosed,
    PortError,
    PortUnavailable,
    Reason,
    RequestRefused,
)
from netbridge.ipc.frames import Buffer, Frame
from netbridge.ipc.messages import DEFAULT_SOCKET, Bye, Facts, Hello, Link, Ready, Welcome
from netbridge.ipc.offloads import HEADER_BYTES, NO_OFFLOADS, TX_OFFLOADS, Offload, VirtioNetHeader
from netbridge.ipc.regions import Mapping, place_rings, verify_sealed
from netbridge.ipc.requests import Answer, Filter, Mac, Verdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence
    from typing import Any

__all__ = [
    "Buffer",
    "Client",
    "Filter",
    "Frame",
    "Offload",
    "PortClosed",
    "PortError",
    "PortUnavailable",
    "Reason",
    "RequestRefused",
    "Verdict",
    "VirtioNetHeader",
    "connect",
]

LEAST_FRAME = 14
_BURST = 64
_INDEX_MASK = 0xFFFFFF
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.01, 0.25


def connect(
    path: str | os.PathLike[str] = DEFAULT_SOCKET,
    *,
    name: str = "client",
    offloads: Offload = NO_OFFLOADS,
    timeout: float = 5.0,
    wait: float = 0.0,
) -> Client:
    """Connects to the driver that listens at `path` and takes the port over.

    `name`: what the driver's log and counters call this client; 1 to 32 letters, digits, '.', '_' or '-'. `offloads`:
    those this client can take; the session has as many of them as the device does. `timeout`: seconds for the
    handshake. `wait`: seconds to keep trying while no driver listens, or while it is busy.

    Raises PortUnavailable when nobody listens, PortClosed with the driver's reason when it says no, BadGeometry when
    what it offers does not hold together, PortError for everything else.
    """
    give_up = time.monotonic() + wait
    pause = _FIRST_RETRY_SECONDS
    while True:
        try:
            return _connect_once(os.fspath(path), Hello(name, offloads=offloads), timeout)
        except PortError as error:
            may_pass = isinstance(error, PortUnavailable) or (isinstance(error, PortClosed) and error.reason.may_pass)
            left = give_up - time.monotonic()
            if not may_pass or left <= 0:
                raise
        # There is nothing to wait for: no file descriptor becomes readable when somebody starts to listen at a path.
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, _LAST_RETRY_SECONDS)


def _connect_once(path: str, hello: Hello, timeout: float) -> Client:
    deadline = time.monotonic() + timeout
    packed = hello.pack()
    with ExitStack() as stack:
        control = ControlSocket(path, timeout)
        stack.callback(control.close)
        control.send(packed)
        welcome, fds = control.await_welcome(deadline)
        with ExitStack() as received:
            for fd in fds:
                received.callback(os.close, fd)
            try:
                if welcome.offloads & ~hello.offloads:
                    raise BadGeometry(
                        f"offloads {welcome.offloads:#x}, of which only {hello.offloads:#x} were asked for"
                    )
                client = Client(control, welcome, fds)
            except BadGeometry as error:
                control.send(Bye(Reason.GEOMETRY, str(error)).pack())
                raise BadGeometry(f"the driver's offer does not hold together: {error}") from None
            except PortError as error:
                control.send(Bye(Reason.FAILED, str(error)).pack())
                raise
            received.pop_all()
        stack.pop_all()
    try:
        control.send(Ready().pack())
        client.check()
    except BaseException:
        client.close()
        raise
    return client


class Client:
    """One session with the driver; made by `connect`. Close it, or use it in a `with`.

    `session`: its number. `mac` (6 bytes), `mtu`, `link_up` and `speed_mbps` (0: not known) are kept up to date by
    every call that looks at the control socket: `check`, and all that wait. `offloads`: those that the session has.
    `queue_pairs`: how many of them frames come from and can be sent on. `room`: what a buffer to send holds; `largest`:
    the longest frame that can be sent, in `most_pieces` buffers or fewer. `rx_limit`: how many RX buffers this client
    may hold before frames are dropped. `announcements`: how often the driver has said
    that the network is to hear of this station (a gratuitous ARP, say).
    """

    def __init__(self, control: ControlSocket, welcome: Welcome, fds: list[int]) -> None:
        """Checks and maps; takes over `control` and `fds` unless it raises (BadGeometry, PortError)."""
        geometry = welcome.geometry
        rings_fd, rx_fd, tx_fd, client_doorbell_fd, driver_doorbell_fd = fds
        geometry.check()
        sizes = (geometry.rings_size, geometry.rx.size, geometry.tx.size)
        for fd, size, what in zip((rings_fd, rx_fd, tx_fd), sizes, ("rings", "rx", "tx"), strict=True):
            verify_sealed(fd, size, f"{what} region")
        self.session = welcome.session
        self.room = geometry.tx.stride - geometry.headroom
        self.largest = geometry.tx_largest
        self.most_pieces = geometry.tx_pieces
        self.rx_limit = geometry.rx_limit
        self.announcements = 0
        self.offloads = Offload(welcome.offloads)
        self.queue_pairs = welcome.queue_pairs
        self._set_facts(welcome.facts)
        self._control = control
        self._closed: PortError | None = None
        self._requests = 0
        self._answer: Answer | None = None
        self._frames: dict[int, Frame] = {}
        self._buffers: dict[int, Buffer] = {}
        self._unsent: list[tuple[int, Any, int]] = []
        # Pieces of a frame whose end has not come yet, and the indices of all RX buffers that are here.
        self._partial: list[tuple[int, Any, int]] = []
        self._partial_has_header = False
        self._rx_here: set[int] = set()
        # `arm` was called, so somebody may be waiting on `fileno`.
        self._armed = False
        self._pieces = ffi.new("struct nb_piece[]", _BURST)
        with ExitStack() as stack:
            if os.get_blocking(client_doorbell_fd):
                raise BadGeometry("client doorbell: not opened with O_NONBLOCK")
            # A copy, since this object closes what it has.
            self._doorbell = stack.enter_context(select.epoll.fromfd(os.dup(driver_doorbell_fd)))
            self._poller = stack.enter_context(select.epoll())
            self._poller.register(control.fileno(), select.EPOLLIN)
            # Makes `fileno` readable for frames whose bell was quietened by another wait.
            self._reminder = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(os.close, self._reminder)
            self._poller.register(self._reminder, select.EPOLLIN)
            try:
                self._doorbell.poll(0)
                self._poller.register(self._doorbell.fileno(), select.EPOLLIN)
            except OSError as error:
                raise BadGeometry(f"driver doorbell: no epoll instance ({error.strerror})") from None
            mappings = []
            for fd, size, writable in (
                (rings_fd, geometry.rings_size, True),
                (rx_fd, geometry.rx.size, not geometry.rx.read_only),
                (tx_fd, geometry.tx.size, True),
            ):
                try:
                    mapping = Mapping(fd, size, writable=writable)
                except OSError as error:
                    raise PortError(f"cannot map {size} bytes of the driver's memory: {error.strerror}") from None
                stack.callback(mapping.close)
                mappings.append(mapping)
            rings, rx, tx = (mapping.pointer(ffi) for mapping in mappings)
            self._native = native = ffi.new("struct nb_client *")
            place_rings(ffi, rings, geometry, native)
            native.rx_base, native.tx_base = rx, tx
            native.rx_count, native.tx_count = geometry.rx.buffers, geometry.tx.buffers
            native.rx_stride, native.tx_stride = geometry.rx.stride, geometry.tx.stride
            native.headroom, native.continuation_offset = geometry.headroom, geometry.continuation_offset
            native.tx_largest_frame, native.tx_max_pieces = geometry.tx_largest, geometry.tx_pieces
            native.queue_pairs, native.offloads = welcome.queue_pairs, welcome.offloads
            native.client_doorbell_fd, native.driver_doorbell_fd = client_doorbell_fd, driver_doorbell_fd
            if lib.nb_client_init(native) != 0:
                raise BadGeometry("refused by the data path")
            stack.pop_all()
        self._mappings: list[Mapping] | None = mappings
        self._fds = list(fds)

    # ---- What there is to know

    @property
    def native(self) -> Any:
        """The `struct nb_client *` for loops in C (netbridge/datapath/core/api.h); good until `close`. While C has it,
        leave `receive`, `allocate` and what came from them alone."""
        return self._native

    @property
    def control_fd(self) -> int:
        """Readable when the driver has something to say: then call `check`."""
        return self._control.fileno()

    @property
    def closed(self) -> bool:
        return self._closed is not None

    def check(self) -> None:
        """Reads what the driver has said, without waiting: brings the facts up to date. Raises PortClosed when the
        session is over."""
        self._must_be_open()
        try:
            while (message := self._control.receive()) is not None:
                if isinstance(message, Link):
                    self._set_facts(message.facts)
                elif isinstance(message, Answer):
                    self._answer = message
                elif isinstance(message, Bye):
                    raise PortClosed(message.reason, message.text)
                else:
                    raise BadMessage(f"{type(message).__name__.upper()} in a running session", Reason.UNEXPECTED)
        except PortClosed as error:
            self._closed = error
            raise
        except BadMessage as error:
            raise self._broken(f"on the control socket: {error}", error.reason) from None

    # ---- What the device is asked for

    def set_filter(self, wanted: Filter, timeout: float = 10.0) -> None:
        """Which frames this client wants, all of it, in the place of what it wanted before (at first: every frame).
        Frames that were on their way may still come. Raises RequestRefused with the driver's reason, ValueError for
        more addresses than a request holds, TimeoutError, PortClosed."""
        self._ask(wanted._replace(request=self._next_request()), timeout)

    def set_mac(self, mac: bytes, timeout: float = 10.0) -> None:
        """Gives the device this MAC address, 6 bytes, until the session ends. Raises as `set_filter`."""
        self._ask(Mac(self._next_request(), mac), timeout)

    def _next_request(self) -> int:
        self._requests = (self._requests + 1) % (1 << 32)
        return self._requests

    def _ask(self, request: Filter | Mac, timeout: float) -> None:
        self.check()
        deadline = time.monotonic() + timeout
        poller = select.poll()
        poller.register(self.control_fd, select.POLLIN)
        self._control.send(request.pack())
        while self._answer is None or self._answer.request != request.request:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise TimeoutError(f"the driver did not answer a request within {timeout:g} s")
            self.check()
        answer, self._answer = self._answer, None
        if answer.verdict is not Verdict.DONE:
            raise RequestRefused(answer.verdict, answer.text)

    # ---- Receiving

    def receive(self, most: int = _BURST, timeout: float | None = None) -> list[Frame]:
        """Up to about `most` frames, in order; waits for the first of them at most `timeout` seconds (None: as long as
        it takes, 0: not at all). Empty when none came. Raises PortClosed when the session is over, PortError when every
        RX buffer this client may hold is held already, so that none can come."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            frames = self._receive_now(most)
            if frames or not self._wait(lib.NB_WAIT_RECEIVE, deadline):
                return frames

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until a frame is there to `receive`, at most `timeout` seconds; whether there is one."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._must_be_open()
        while not self._frames_wait():
            if not self._wait(lib.NB_WAIT_RECEIVE, deadline):
                return self._frames_wait()
        return True

    def release(self, frames: Iterable[Frame]) -> None:
        """Gives frames back; those already given back are passed over. Raises BufferError, and gives back none, while
        something cut from one of them is still alive, and ValueError for another session's frame."""
        frames = [frame for frame in dict.fromkeys(frames) if frame._client is not None]
        for frame in frames:
            if frame._client is not self:
                raise ValueError("this frame belongs to another session")
            frame._invalidate()
        pieces = [piece for frame in frames for piece in frame._pieces]
        for frame in frames:
            del self._frames[frame._pieces[0][0]]
            frame._client = None
        for start in range(0, len(pieces), _BURST):
            chunk = pieces[start : start + _BURST]
            for i, (handle, _, _) in enumerate(chunk):
                self._pieces[i].dma_handle = handle
                self._rx_here.discard(handle & _INDEX_MASK)
            lib.nb_client_release(self._native, self._pieces, len(chunk))
        if pieces:
            lib.nb_client_flush(self._native)

    # ---- Sending

    def allocate(self, most: int = 1, timeout: float | None = None) -> list[Buffer]:
        """Up to `most` buffers to write frames into; waits for the first of them at most `timeout` seconds. Empty when
        there was none. Raises PortClosed when the session is over."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            buffers = self._allocate_now(most)
            if buffers or not self._wait(lib.NB_WAIT_ALLOCATE, deadline):
                return buffers

    def send(self, *frames: Buffer | Sequence[Buffer]) -> None:
        """Sends frames: of each buffer the first `length` bytes; several buffers in a list are one frame. The first
        buffer's `header` and `queue` are the frame's. Never waits; the buffers are the driver's afterwards. Raises
        ValueError for what the driver would refuse, BufferError while something cut from a buffer's `data` is alive;
        then none is sent."""
        self._must_be_open()
        whole = [(frame,) if isinstance(frame, Buffer) else tuple(frame) for frame in frames]
        for pieces in whole:
            self._must_be_sendable(pieces)
        buffers = [buffer for pieces in whole for buffer in pieces]
        if len(set(buffers)) != len(buffers):
            raise ValueError("the same buffer twice")
        for buffer in buffers:
            buffer._invalidate()
        entries = [entry for pieces in whole for entry in _entries(pieces)]
        for start in range(0, len(entries), _BURST):
            chunk = entries[start : start + _BURST]
            for i, (buffer, flags, queue) in enumerate(chunk):
                piece = self._pieces[i]
                piece.dma_handle, piece.len, piece.flags, piece.queue = buffer._piece[0], buffer.length, flags, queue
                del self._buffers[buffer._piece[0] & _INDEX_MASK]
                buffer._client = None
            lib.nb_client_send(self._native, self._pieces, len(chunk))
        if entries:
            lib.nb_client_flush(self._native)

    def send_bytes(
        self,
        frame: bytes | bytearray | memoryview,
        timeout: float | None = None,
        *,
        header: VirtioNetHeader | None = None,
        queue: int = 0,
    ) -> None:
        """Copies a frame into as many buffers as it takes and sends it. Raises ValueError when it is too short or too
        long, TimeoutError when buffers did not come free in `timeout` seconds."""
        if not LEAST_FRAME <= len(frame) <= self.largest:
            raise ValueError(f"a frame of {len(frame)} bytes: wanted {LEAST_FRAME} to {self.largest}")
        deadline = None if timeout is None else time.monotonic() + timeout
        needed = -(-len(frame) // self.room)
        buffers: list[Buffer] = []
        try:
            while len(buffers) < needed:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                more = self.allocate(needed - len(buffers), left)
                if not more:
                    raise TimeoutError(f"in {timeout} s {len(buffers)} of {needed} TX buffers came free")
                buffers += more
            for number, buffer in enumerate(buffers):
                buffer.write(frame[number * self.room : (number + 1) * self.room])
            buffers[0].header, buffers[0].queue = header, queue
            self.send(buffers)
        except BaseException:
            for buffer in buffers:
                buffer.release()
            raise

    # ---- Event loops

    def fileno(self) -> int:
        """Readable when a frame has come after `arm`, or when the driver has something to say. After it became readable
        call `receive(timeout=0)`, then `arm` again."""
        return self._poller.fileno()

    def arm(self) -> bool:
        """Asks the driver to ring when a frame comes. False: there are frames already, or something was said on the
        control socket; look at those first, no bell will ring for them. Raises PortClosed."""
        self.check()
        self._must_have_room()
        self._doorbell.poll(0)
        _quieten(self._reminder)
        self._armed = True
        self._native.rx_active.header.wake = 1
        # It has the full fence that must stand between asking and looking; that it may ring the driver does no harm.
        lib.nb_client_flush(self._native)
        return not self._frames_wait()

    async def receive_async(self, most: int = _BURST) -> list[Frame]:
        """Like `receive` without a timeout, for asyncio."""
        import asyncio

        loop = asyncio.get_running_loop()
        while True:
            frames = self._receive_now(most)
            if frames:
                return frames
            if not self.arm():
                continue
            readable = loop.create_future()
            loop.add_reader(self.fileno(), _wake_once, readable)
            try:
                await readable
            finally:
                loop.remove_reader(self.fileno())

    async def __aiter__(self) -> AsyncIterator[Frame]:
        """Frames one by one, until PortClosed ends the loop. Each is released when the next one is asked for."""
        while True:
            for frame in await self.receive_async():
                with frame:
                    yield frame

    # ---- The end

    def close(self) -> None:
        """Says BYE, gives everything back and unmaps it. Frames and buffers that are still held become unusable. More
        than once does no harm."""
        if self._mappings is None:
            return
        mappings, self._mappings = self._mappings, None
        if self._closed is None:
            self._control.send(Bye(Reason.SHUTDOWN).pack())
            self._closed = PortError("this client was closed")
        survivors = 0
        every: list[Frame | Buffer] = [*self._frames.values(), *self._buffers.values()]
        for held in every:
            try:
                held._invalidate()
            except BufferError:
                survivors += 1
            held._client = None
        self._frames.clear()
        self._buffers.clear()
        self._poller.close()
        os.close(self._reminder)
        self._doorbell.close()
        self._control.close()
        for fd in self._fds:
            os.close(fd)
        if survivors:
            # Unmapping now would turn the next look at one of them into a crash.
            _KEPT_MAPPED.extend(mappings)
            warnings.warn(
                f"{survivors} frames of session {self.session} are still in use; their memory stays mapped",
                ResourceWarning,
                stacklevel=2,
            )
        else:
            for mapping in mappings:
                mapping.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_mappings", None) is not None:
            warnings.warn(f"session {self.session} was never closed", ResourceWarning, stacklevel=2)
            self.close()

    # ---- Inside

    def _set_facts(self, facts: Facts) -> None:
        self.mac, self.mtu, self.link_up, self.speed_mbps, announce = facts
        self.announcements += announce

    def _frames_wait(self) -> bool:
        return bool(self._native.rx_active.header.produced != self._native.rx_active_taken)

    def _must_be_open(self) -> None:
        if self._closed is not None:
            raise self._closed

    def _must_have_room(self) -> None:
        if len(self._rx_here) >= self.rx_limit:
            raise PortError(
                f"all {self.rx_limit} RX buffers a client may hold are held; release frames before waiting for more"
            )

    def _broken(self, what: str, reason: Reason = Reason.RING_FAULT) -> PortError:
        """The driver did what no driver may: says so to it, ends the session, and returns the error to raise."""
        self._control.send(Bye(reason, what).pack())
        self._closed = PortError(f"the driver broke the port's protocol: {what}")
        return self._closed

    def _receive_now(self, most: int) -> list[Frame]:
        self._must_be_open()
        count = lib.nb_client_receive(self._native, self._pieces, min(most, _BURST))
        if count < 0:
            raise self._broken("an entry in rx_active that may not be, or a frame's pieces out of order")
        frames = []
        for i in range(count):
            piece = self._pieces[i]
            handle, flags = piece.dma_handle, piece.flags
            index = handle & _INDEX_MASK
            if index in self._rx_here:
                raise self._broken(f"RX buffer {index} came twice")
            self._rx_here.add(index)
            if not self._partial:
                self._partial_has_header = bool(flags & lib.NB_HEADER)
            self._partial.append((handle, piece.data, piece.len))
            if not flags & lib.NB_MORE:
                frame = Frame(self, self._partial, has_header=self._partial_has_header, queue=piece.queue)
                self._frames[self._partial[0][0]] = frame
                frames.append(frame)
                self._partial = []
        return frames

    def _allocate_now(self, most: int) -> list[Buffer]:
        self._must_be_open()
        unsent = [self._unsent.pop() for _ in range(min(most, len(self._unsent)))]
        count = 0
        if len(unsent) < most:
            count = lib.nb_client_allocate(self._native, self._pieces, min(most - len(unsent), _BURST))
            if count < 0:
                raise self._broken("an entry in tx_done that may not be")
        for i in range(count):
            piece = self._pieces[i]
            unsent.append((piece.dma_handle, piece.data, piece.len))
        buffers = []
        for handle, pointer, room in unsent:
            if handle & _INDEX_MASK in self._buffers:
                raise self._broken(f"TX buffer {handle & _INDEX_MASK} came twice")
            buffer = Buffer(self, (handle, pointer, room))
            self._buffers[handle & _INDEX_MASK] = buffer
            buffers.append(buffer)
        return buffers

    def _take_unsent(self, buffer: Buffer) -> None:
        buffer._invalidate()
        buffer._client = None
        del self._buffers[buffer._piece[0] & _INDEX_MASK]
        self._unsent.append(buffer._piece)

    def _wait(self, wanted: int, deadline: float | None) -> bool:
        """Waits for what is wanted; False when the deadline has passed."""
        self.check()
        if wanted == lib.NB_WAIT_RECEIVE and deadline is None:
            self._must_have_room()
        timeout_ms = -1
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            timeout_ms = min(int(left * 1000) + 1, 1 << 30)
        found = lib.nb_client_wait(self._native, wanted | lib.NB_WAIT_CONTROL, self.control_fd, timeout_ms)
        if found & lib.NB_WAIT_FAILED:
            raise PortError(f"cannot wait for the driver: {os.strerror(ffi.errno)}")
        if self._armed:
            self._arm_again()
        return True

    def _arm_again(self) -> None:
        """After a wait of another kind: it has answered the doorbell, which may have rung for `arm`, and has withdrawn
        the wish to be woken if it was waiting for frames too. Whoever waits on `fileno` must not miss what came."""
        self._native.rx_active.header.wake = 1
        lib.nb_client_flush(self._native)
        if self._frames_wait():
            os.eventfd_write(self._reminder, 1)

    def _must_be_sendable(self, pieces: Sequence[Buffer]) -> None:
        """Raises ValueError for a frame that the driver would refuse."""
        if not 1 <= len(pieces) <= self.most_pieces:
            raise ValueError(f"a frame of {len(pieces)} buffers: wanted 1 to {self.most_pieces}")
        for buffer in pieces:
            if buffer._client is not self:
                raise ValueError("this buffer was sent or released, or belongs to another session")
            least = LEAST_FRAME if len(pieces) == 1 else 1
            if not least <= buffer.length <= buffer.room:
                raise ValueError(f"length {buffer.length} is not between {least} and {buffer.room}")
        length = sum(buffer.length for buffer in pieces)
        if not LEAST_FRAME <= length <= self.largest:
            raise ValueError(f"length {length} is not between {LEAST_FRAME} and {self.largest}")
        if not 0 <= pieces[0].queue < self.queue_pairs:
            raise ValueError(f"queue pair {pieces[0].queue}: there are {self.queue_pairs}, from 0 on")
        if pieces[0].header is not None and not self.offloads & TX_OFFLOADS:
            raise ValueError("a header, but the session has no offloads on the transmit side")


def _entries(pieces: Sequence[Buffer]) -> list[tuple[Buffer, int, int]]:
    """A frame's buffers with the flags and the queue of their entries; puts its header in front of it."""
    first = pieces[0]
    flags = 0
    if first.header is not None:
        ffi.buffer(first._piece[1] - HEADER_BYTES, HEADER_BYTES)[:] = first.header.pack()
        flags = lib.NB_HEADER
    entries = []
    for number, buffer in enumerate(pieces, 1):
        entries.append((buffer, flags | (lib.NB_MORE if number < len(pieces) else 0), first.queue))
        flags = lib.NB_CONTINUATION
    return entries


def _quieten(eventfd: int) -> None:
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        pass


def _wake_once(readable: Any) -> None:
    if not readable.done():
        readable.set_result(None)


# Mappings that something still looks into after its client was closed.
_KEPT_MAPPED: list[Mapping] = []
