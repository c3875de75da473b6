"""A session with the driver, as a program uses it."""

from __future__ import annotations

import os
import time
import warnings

from netbridge.client.conversation import Conversation
from netbridge.client.memory import SessionMemory
from netbridge.client.receiving import BURST, LEAST_FRAME, Receiver
from netbridge.client.sending import Sender
from netbridge.client.waiting import Waiting
from netbridge.datapath._core import lib
from netbridge.ipc.control import ControlSocket
from netbridge.ipc.frames import Buffer, Frame
from netbridge.ipc.messages import FD_NAMES, Welcome
from netbridge.ipc.offloads import Offload, VirtioNetHeader
from netbridge.ipc.requests import Filter, Mac

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence
    from typing import Any


class Client:
    """One session with the driver; made by `connect`. Close it, or use it in a `with`.

    `session`: its number. `mac` (6 bytes), `mtu`, `link_up` and `speed_mbps` (0: not known) are kept up to date by
    every call that looks at the control socket: `check`, and all that wait. `offloads`: those that the session has.
    `queue_pairs`: how many of them frames come from and can be sent on. `room`: what a buffer to send holds; `largest`:
    the longest frame that can be sent, in `most_pieces` buffers or fewer. `rx_limit`: how many RX buffers this client
    may hold before frames are dropped. `rx_writable`: whether received frames may be changed where they are.
    `announcements`: how often the driver has said that the network is to hear of this station (a gratuitous ARP, say).
    """

    def __init__(self, control: ControlSocket, welcome: Welcome, fds: list[int]) -> None:
        """Checks and maps; takes over `control` and `fds` unless it raises (BadGeometry, PortError)."""
        geometry = welcome.geometry
        self.session = welcome.session
        self.room = geometry.tx.stride - geometry.headroom
        self.largest = geometry.tx_largest
        self.most_pieces = geometry.tx_pieces
        self.rx_limit = geometry.rx_limit
        self.rx_writable = not geometry.rx.read_only
        self.offloads = Offload(welcome.offloads)
        self.queue_pairs = welcome.queue_pairs
        memory = SessionMemory(welcome, fds)
        self._native = memory.native
        try:
            self._waiting = Waiting(self._native, control.fileno(), fds[FD_NAMES.index("driver doorbell")])
        except BaseException:
            memory.close()
            raise
        self._conversation = Conversation(control, welcome.facts)
        self._receiver = Receiver(self._native, self._conversation, geometry.rx_limit)
        self._sender = Sender(self._native, self._conversation)
        self._fds = list(fds)
        self._memory: SessionMemory | None = memory

    # ---- What there is to know

    @property
    def mac(self) -> bytes:
        return self._conversation.facts.mac

    @property
    def mtu(self) -> int:
        return self._conversation.facts.mtu

    @property
    def link_up(self) -> bool:
        return self._conversation.facts.link_up

    @property
    def speed_mbps(self) -> int:
        return self._conversation.facts.speed_mbps

    @property
    def announcements(self) -> int:
        return self._conversation.announcements

    @property
    def native(self) -> Any:
        """The `struct nb_client *` for loops in C (netbridge/datapath/core/api.h); good until `close`. While C has it,
        leave `receive`, `allocate` and what came from them alone."""
        return self._native

    @property
    def control_fd(self) -> int:
        """Readable when the driver has something to say: then call `check`."""
        return self._conversation.fileno()

    @property
    def closed(self) -> bool:
        return self._conversation.ended is not None

    def check(self) -> None:
        """Reads what the driver has said, without waiting: brings the facts up to date. Raises PortClosed when the
        session is over."""
        self._conversation.check()

    # ---- What the device is asked for

    def set_filter(self, wanted: Filter, timeout: float = 10.0) -> None:
        """Which frames this client wants, all of it, in the place of what it wanted before (at first: every frame).
        Frames that were on their way may still come. Raises RequestRefused with the driver's reason, ValueError for
        more addresses than a request holds, TimeoutError, PortClosed."""
        conversation = self._conversation
        conversation.ask(wanted._replace(request=conversation.next_request()), timeout)

    def set_mac(self, mac: bytes, timeout: float = 10.0) -> None:
        """Gives the device this MAC address, 6 bytes, until the session ends. Raises as `set_filter`."""
        conversation = self._conversation
        conversation.ask(Mac(conversation.next_request(), mac), timeout)

    # ---- Receiving

    def receive(self, most: int = BURST, timeout: float | None = None) -> list[Frame]:
        """Up to about `most` frames, in order; waits for the first of them at most `timeout` seconds (None: as long as
        it takes, 0: not at all). Empty when none came. Raises PortClosed when the session is over, PortError when every
        RX buffer this client may hold is held already, so that none can come."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._conversation.must_be_open()
            frames = self._receiver.take(self, most)
            if frames or not self._wait(lib.NB_WAIT_RECEIVE, deadline):
                return frames

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until a frame is there to `receive`, at most `timeout` seconds; whether there is one."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._conversation.must_be_open()
        while not self._waiting.frames_wait():
            if not self._wait(lib.NB_WAIT_RECEIVE, deadline):
                return self._waiting.frames_wait()
        return True

    def release(self, frames: Iterable[Frame]) -> None:
        """Gives frames back; those already given back are passed over. Raises BufferError, and gives back none, while
        something cut from one of them is still alive, and ValueError for another session's frame."""
        self._receiver.release(self, frames)

    # ---- Sending

    def allocate(self, most: int = 1, timeout: float | None = None) -> list[Buffer]:
        """Up to `most` buffers to write frames into; waits for the first of them at most `timeout` seconds. Empty when
        there was none. Raises PortClosed when the session is over."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._conversation.must_be_open()
            buffers = self._sender.allocate(self, most)
            if buffers or not self._wait(lib.NB_WAIT_ALLOCATE, deadline):
                return buffers

    def send(self, *frames: Buffer | Sequence[Buffer]) -> None:
        """Sends frames: of each buffer the first `length` bytes; several buffers in a list are one frame. The first
        buffer's `header` and `queue` are the frame's. Never waits; the buffers are the driver's afterwards. Raises
        ValueError for what the driver would refuse, BufferError while something cut from a buffer's `data` is alive;
        then none is sent."""
        self._conversation.must_be_open()
        self._sender.send(self, frames)

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

    def forward(self, frames: Iterable[Frame]) -> None:
        """Sends received frames from where they are, without a copy, in the place of releasing them: each as it stands
        (`Frame.writable_data` changes it), on its `queue`. Never waits; the frames are the driver's afterwards, and
        what the device has not sent yet counts as held (`rx_limit`). Raises ValueError, and sends none, for one that
        was released already, spans several buffers, leaves checksum or segments to be made (`Frame.header`), or has a
        length or queue that cannot be; BufferError while something cut from a frame is alive."""
        self._conversation.must_be_open()
        self._receiver.forward(self, frames)

    # ---- Event loops

    def fileno(self) -> int:
        """Readable when a frame has come after `arm`, or when the driver has something to say. After it became readable
        call `receive(timeout=0)`, then `arm` again."""
        return self._waiting.fileno()

    def arm(self) -> bool:
        """Asks the driver to ring when a frame comes. False: there are frames already, or something was said on the
        control socket; look at those first, no bell will ring for them. Raises PortClosed."""
        self.check()
        self._receiver.must_have_room()
        return self._waiting.arm()

    async def receive_async(self, most: int = BURST) -> list[Frame]:
        """Like `receive` without a timeout, for asyncio."""
        import asyncio

        loop = asyncio.get_running_loop()
        while True:
            self._conversation.must_be_open()
            frames = self._receiver.take(self, most)
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
        memory, self._memory = self._memory, None
        if memory is None:
            return
        survivors = 0
        every: list[Frame | Buffer] = [*self._receiver.held.values(), *self._sender.held.values()]
        for held in every:
            try:
                held._invalidate()
            except BufferError:
                survivors += 1
            held._client = None
        self._receiver.held.clear()
        self._sender.held.clear()
        self._waiting.close()
        self._conversation.close()
        for fd in self._fds:
            os.close(fd)
        memory.close(keep_mapped=survivors > 0)
        if survivors:
            warnings.warn(
                f"{survivors} frames of session {self.session} are still in use; their memory stays mapped",
                ResourceWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_memory", None) is not None:
            warnings.warn(f"session {self.session} was never closed", ResourceWarning, stacklevel=2)
            self.close()

    # ---- Inside

    def _take_unsent(self, buffer: Buffer) -> None:
        self._sender.take_unsent(buffer)

    def _wait(self, wanted: int, deadline: float | None) -> bool:
        """Waits for what is wanted; False when the deadline has passed."""
        self.check()
        if wanted == lib.NB_WAIT_RECEIVE and deadline is None:
            self._receiver.must_have_room()
        return self._waiting.wait(wanted, deadline)


def _wake_once(readable: Any) -> None:
    if not readable.done():
        readable.set_result(None)
