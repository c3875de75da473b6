"""Received frames: entries of rx_active turned into `Frame`s, and given back through rx_free."""

from __future__ import annotations

from netbridge.client.conversation import Conversation
from netbridge.datapath._core import ffi, lib
from netbridge.ipc.errors import PortError
from netbridge.ipc.frames import Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from netbridge.client.session import Client

BURST = 64
LEAST_FRAME = 14
INDEX_MASK = 0xFFFFFF


class Receiver:
    """The RX side of a session. `held`: the frames that are out, by their first handle. Its methods are given the
    client that they belong to: kept, it would be in a ring of references, and nobody would notice it was forgotten."""

    def __init__(self, native: Any, conversation: Conversation, rx_limit: int) -> None:
        self._native = native
        self._conversation = conversation
        self._limit = rx_limit
        self.held: dict[int, Frame] = {}
        # Pieces of a frame whose end has not come yet, and the indices of all RX buffers that are here.
        self._partial: list[tuple[int, Any, int]] = []
        self._partial_has_header = False
        self._here: set[int] = set()
        self._entries = ffi.new("struct nb_piece[]", BURST)

    def take(self, client: Client, most: int) -> list[Frame]:
        """Those that are there, without waiting."""
        count = lib.nb_client_receive(self._native, self._entries, min(most, BURST))
        if count < 0:
            raise self._conversation.broken("an entry in rx_active that may not be, or a frame's pieces out of order")
        frames = []
        for i in range(count):
            piece = self._entries[i]
            handle, flags = piece.dma_handle, piece.flags
            index = handle & INDEX_MASK
            if index in self._here:
                raise self._conversation.broken(f"RX buffer {index} came twice")
            self._here.add(index)
            if not self._partial:
                self._partial_has_header = bool(flags & lib.NB_HEADER)
            self._partial.append((handle, piece.data, piece.len))
            if not flags & lib.NB_MORE:
                frame = Frame(client, self._partial, has_header=self._partial_has_header, queue=piece.queue)
                self.held[self._partial[0][0]] = frame
                frames.append(frame)
                self._partial = []
        return frames

    def must_have_room(self) -> None:
        """Raises PortError when all buffers that a client may hold are held, so that no frame can come."""
        if len(self._here) >= self._limit:
            raise PortError(
                f"all {self._limit} RX buffers a client may hold are held; release frames before waiting for more"
            )

    def release(self, client: Client, frames: Iterable[Frame]) -> None:
        """Gives frames back; see `Client.release`."""
        frames = [frame for frame in dict.fromkeys(frames) if frame._client is not None]
        for frame in frames:
            if frame._client is not client:
                raise ValueError("this frame belongs to another session")
            frame._invalidate()
        pieces = [piece for frame in frames for piece in frame._pieces]
        for frame in frames:
            del self.held[frame._pieces[0][0]]
            frame._client = None
        for start in range(0, len(pieces), BURST):
            chunk = pieces[start : start + BURST]
            for i, (handle, _, _) in enumerate(chunk):
                self._entries[i].dma_handle = handle
                self._here.discard(handle & INDEX_MASK)
            lib.nb_client_release(self._native, self._entries, len(chunk))
        if pieces:
            lib.nb_client_flush(self._native)

    def forward(self, client: Client, frames: Iterable[Frame]) -> None:
        """Sends frames from where they are: all of them or, when it raises, none; see `Client.forward`."""
        frames = list(frames)
        for frame in frames:
            _must_be_forwardable(client, frame)
        if len(set(frames)) != len(frames):
            raise ValueError("the same frame twice")
        for frame in frames:
            frame._invalidate()
        for start in range(0, len(frames), BURST):
            chunk = frames[start : start + BURST]
            for piece, frame in zip(self._entries, chunk, strict=False):
                ((piece.dma_handle, piece.data, piece.len),) = frame._pieces
                piece.flags, piece.queue = 0, frame.queue
                del self.held[piece.dma_handle]
                self._here.discard(piece.dma_handle & INDEX_MASK)
                frame._client = None
            lib.nb_client_forward(self._native, self._entries, len(chunk))
        if frames:
            lib.nb_client_flush(self._native)


def _must_be_forwardable(client: Client, frame: Frame) -> None:
    """Raises ValueError for a frame that cannot be sent from where it is."""
    if frame._client is not client:
        raise ValueError("this frame was released or forwarded, or belongs to another session")
    if len(frame._pieces) > 1:
        raise ValueError(
            f"this frame spans {len(frame._pieces)} buffers, and only frames of one can be forwarded; copy it"
        )
    header = frame.header
    if header is not None and header.leaves_work:
        raise ValueError(
            "this frame is to be cut yet, or its checksum to be made; copy it, and send it with its header"
        )
    if not LEAST_FRAME <= len(frame) <= client.largest:
        raise ValueError(f"length {len(frame)} is not between {LEAST_FRAME} and {client.largest}")
    if not 0 <= frame.queue < client.queue_pairs:
        raise ValueError(f"queue pair {frame.queue}: there are {client.queue_pairs}, from 0 on")
