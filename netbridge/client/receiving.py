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
