"""What a client holds: received frames and buffers to send, each with an end that cannot be overlooked.

A buffer that was given back shows another frame soon after. So a view of it is ended when its owner ends, and a view
that was cut from that one, which Python cannot end, keeps the buffer from being given back.
"""

from __future__ import annotations

import weakref

from netbridge.datapath._core import ffi
from netbridge.ipc.offloads import HEADER_BYTES, VirtioNetHeader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from netbridge.client import Client


_RELEASED = "this frame was released or forwarded; its buffer may hold another frame by now"


class Frame:
    """A received frame, in one DMA buffer or (when it is longer than one holds) in several. `queue`: the queue pair
    that it came from; before `forward`, the one to send it on."""

    __slots__ = ("__weakref__", "_client", "_has_header", "_lent", "_pieces", "queue")

    def __init__(self, client: Client, pieces: list[tuple[int, Any, int]], *, has_header: bool, queue: int) -> None:
        self._client: Client | None = client
        self._has_header = has_header
        self.queue = queue
        # (handle, pointer, length) of each piece.
        self._pieces = pieces
        # A view of each piece, and a writable one of the first.
        self._lent: list[_Lent | None] = [None] * (len(pieces) + 1)

    @property
    def data(self) -> memoryview:
        """The frame's bytes, read-only. Raises ValueError after release, and when the frame spans several buffers: then
        use `pieces`, or `bytes(frame)` for a copy."""
        views = self.pieces
        if len(views) > 1:
            raise ValueError(f"this frame spans {len(views)} buffers; use pieces, or bytes(frame) for a copy")
        return views[0]

    @property
    def pieces(self) -> tuple[memoryview, ...]:
        """The frame's bytes, one read-only view for each buffer it spans. Raises ValueError after release."""
        if self._client is None:
            raise ValueError(_RELEASED)
        return tuple(_view(self._lent, i, piece, writable=False) for i, piece in enumerate(self._pieces))

    @property
    def writable_data(self) -> memoryview:
        """The same bytes, to be changed before `forward`. Raises ValueError as `data` does, and when the driver lets
        clients only read received frames (`Client.rx_writable`)."""
        if self._client is not None and not self._client.rx_writable:
            raise ValueError("received frames can only be read in this session; copy what is to be changed")
        _ = self.data
        return _view(self._lent, -1, self._pieces[0], writable=True)

    @property
    def header(self) -> VirtioNetHeader | None:
        """What the device says of the frame, as it says it: check before you rely on it. None when the session has no
        offloads on the receive side. Raises ValueError after release."""
        if self._client is None:
            raise ValueError(_RELEASED)
        if not self._has_header:
            return None
        return VirtioNetHeader.unpack(bytes(ffi.buffer(self._pieces[0][1] - HEADER_BYTES, HEADER_BYTES)))

    def __len__(self) -> int:
        return sum(length for _, _, length in self._pieces)

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)

    def release(self) -> None:
        """Gives the buffers back to the driver. Once is enough; more do no harm. Raises BufferError while something cut
        from `data` or `pieces` is still alive: it would show another frame later. `Client.release` gives many back at
        once, which is faster."""
        if self._client is not None:
            self._client.release((self,))

    def forward(self) -> None:
        """Sends the frame from where it is, without a copy; see `Client.forward`, which sends many at once. Raises
        ValueError after release."""
        if self._client is None:
            raise ValueError(_RELEASED)
        self._client.forward((self,))

    def __enter__(self) -> Frame:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _invalidate(self) -> None:
        _end_all(self._lent)


class Buffer:
    """A DMA buffer to write a frame, or a piece of one, into and send. `data` is all the room it has."""

    __slots__ = ("__weakref__", "_client", "_lent", "_piece", "header", "length", "queue")

    def __init__(self, client: Client, piece: tuple[int, Any, int]) -> None:
        self._client: Client | None = client
        self._piece = piece
        self._lent: list[_Lent | None] = [None]
        self.length = 0
        """How many bytes of `data` are the frame: set it before sending."""
        self.header: VirtioNetHeader | None = None
        """Of a frame's first buffer: what the device is to do with the frame, as far as offloads were agreed on."""
        self.queue = 0
        """Of a frame's first buffer: the queue pair to send it on."""

    @property
    def room(self) -> int:
        return self._piece[2]

    @property
    def data(self) -> memoryview:
        """All of the buffer's room, writable. Raises ValueError once it was sent or released."""
        if self._client is None:
            raise ValueError("this buffer was sent or released; allocate another one")
        return _view(self._lent, 0, self._piece, writable=True)

    def write(self, frame: bytes | bytearray | memoryview) -> Buffer:
        """Copies a whole frame, or a piece of one, in and sets `length`. Raises ValueError when it is too long."""
        size = len(frame)
        if size > self.room:
            raise ValueError(f"a frame of {size} bytes does not fit a buffer of {self.room}")
        self.data[:size] = frame
        self.length = size
        return self

    def release(self) -> None:
        """Gives the buffer up without sending it. More than once does no harm."""
        if self._client is not None:
            self._client._take_unsent(self)

    def _invalidate(self) -> None:
        _end_all(self._lent)


class _Lent:
    """A memoryview of DMA memory that can be ended for sure: what was cut from it is noticed."""

    __slots__ = ("_exporter", "_writable", "view")

    def __init__(self, pointer: Any, length: int, *, writable: bool) -> None:
        exporter = ffi.buffer(pointer, length)
        # Every view cut from `view` keeps the exporter alive, so its death shows that there are none.
        self._exporter = weakref.ref(exporter)
        self._writable = writable
        self.view = self._new_view(exporter)

    def end(self) -> None:
        """Raises BufferError, and changes nothing, while something cut from `view` is alive."""
        self.view.release()
        exporter = self._exporter()
        if exporter is not None:
            self.view = self._new_view(exporter)
            raise BufferError("something cut from this frame's data is still in use; release or drop it first")

    def _new_view(self, exporter: Any) -> memoryview:
        view = memoryview(exporter)
        return view if self._writable else view.toreadonly()


def _view(lent: list[_Lent | None], i: int, piece: tuple[int, Any, int], *, writable: bool) -> memoryview:
    """The view of a piece, made when it is first asked for."""
    one = lent[i]
    if one is None:
        one = lent[i] = _Lent(piece[1], piece[2], writable=writable)
    return one.view


def _end_all(lent: list[_Lent | None]) -> None:
    for i, one in enumerate(lent):
        if one is not None:
            one.end()
            lent[i] = None
