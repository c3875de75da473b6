"""Buffers to send: taken from tx_done, checked as the driver would, and sent through tx_active."""

from __future__ import annotations

from netbridge.client.conversation import Conversation
from netbridge.client.receiving import BURST, INDEX_MASK, LEAST_FRAME
from netbridge.datapath._core import ffi, lib
from netbridge.ipc.frames import Buffer
from netbridge.ipc.offloads import HEADER_BYTES, TX_OFFLOADS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from netbridge.client.session import Client


class Sender:
    """The TX side of a session, as `Receiver` is the RX side. `held`: the buffers that are out, by their index."""

    def __init__(self, native: Any, conversation: Conversation) -> None:
        self._native = native
        self._conversation = conversation
        self.held: dict[int, Buffer] = {}
        self._unsent: list[tuple[int, Any, int]] = []
        self._entries = ffi.new("struct nb_piece[]", BURST)

    def allocate(self, client: Client, most: int) -> list[Buffer]:
        """Those that are free, without waiting."""
        pieces = [self._unsent.pop() for _ in range(min(most, len(self._unsent)))]
        count = 0
        if len(pieces) < most:
            count = lib.nb_client_allocate(self._native, self._entries, min(most - len(pieces), BURST))
            if count < 0:
                raise self._conversation.broken("an entry in tx_done that may not be")
        for i in range(count):
            piece = self._entries[i]
            pieces.append((piece.dma_handle, piece.data, piece.len))
        buffers = []
        for piece in pieces:
            index = piece[0] & INDEX_MASK
            if index in self.held:
                raise self._conversation.broken(f"TX buffer {index} came twice")
            buffer = Buffer(client, piece)
            self.held[index] = buffer
            buffers.append(buffer)
        return buffers

    def take_unsent(self, buffer: Buffer) -> None:
        """Keeps a buffer that was given up for the next `allocate`."""
        buffer._invalidate()
        buffer._client = None
        del self.held[buffer._piece[0] & INDEX_MASK]
        self._unsent.append(buffer._piece)

    def send(self, client: Client, frames: Sequence[Buffer | Sequence[Buffer]]) -> None:
        """All of them or, when it raises, none; see `Client.send`."""
        whole = [(frame,) if isinstance(frame, Buffer) else tuple(frame) for frame in frames]
        for pieces in whole:
            _must_be_sendable(client, pieces)
        buffers = [buffer for pieces in whole for buffer in pieces]
        if len(set(buffers)) != len(buffers):
            raise ValueError("the same buffer twice")
        for buffer in buffers:
            buffer._invalidate()
        entries = [entry for pieces in whole for entry in _entries(pieces)]
        for start in range(0, len(entries), BURST):
            chunk = entries[start : start + BURST]
            for i, (buffer, flags, queue) in enumerate(chunk):
                piece = self._entries[i]
                piece.dma_handle, piece.len, piece.flags, piece.queue = buffer._piece[0], buffer.length, flags, queue
                del self.held[buffer._piece[0] & INDEX_MASK]
                buffer._client = None
            lib.nb_client_send(self._native, self._entries, len(chunk))
        if entries:
            lib.nb_client_flush(self._native)


def _must_be_sendable(client: Client, pieces: Sequence[Buffer]) -> None:
    """Raises ValueError for a frame that the driver would refuse."""
    if not 1 <= len(pieces) <= client.most_pieces:
        raise ValueError(f"a frame of {len(pieces)} buffers: wanted 1 to {client.most_pieces}")
    for buffer in pieces:
        if buffer._client is not client:
            raise ValueError("this buffer was sent or released, or belongs to another session")
        least = LEAST_FRAME if len(pieces) == 1 else 1
        if not least <= buffer.length <= buffer.room:
            raise ValueError(f"length {buffer.length} is not between {least} and {buffer.room}")
    length = sum(buffer.length for buffer in pieces)
    if not LEAST_FRAME <= length <= client.largest:
        raise ValueError(f"length {length} is not between {LEAST_FRAME} and {client.largest}")
    if not 0 <= pieces[0].queue < client.queue_pairs:
        raise ValueError(f"queue pair {pieces[0].queue}: there are {client.queue_pairs}, from 0 on")
    if pieces[0].header is not None and not client.offloads & TX_OFFLOADS:
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
