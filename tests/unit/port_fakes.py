"""Both ends of the port for tests, written from docs/port.md and from nothing else.

`RawClient` speaks bytes on the control socket. `FakeRings` is a driver's end of the four rings in plain `struct`: every
offset is a number from the document, so that a test fails when the document and the code part ways. `ServedPort` runs
the real `PortServer` in a thread, for tests of the real client.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from netbridge.ipc.messages import Facts
from netbridge.ipc.requests import Verdict
from netbridge.ipc.server import ClientAsks, Event, PortServer
from netbridge.ipc.session import PortSession

MAC = bytes.fromhex("525400123456")
FACTS = Facts(MAC, mtu=1500, link_up=True, speed_mbps=10_000)
STRIDE = 2048
HEADROOM = 64
CONTINUATION_OFFSET = 52
DEADLINE_SECONDS = 10.0


class SealedMemory:
    """What a session needs of a region's memory, without VFIO."""

    def __init__(self, size: int, *, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL) -> None:
        self.size = size
        self.fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class OfferedSession:
    """A session with its memory."""

    def __init__(
        self,
        number: int = 7,
        *,
        rx_count: int = 8,
        tx_count: int = 4,
        rx_limit: int | None = None,
        rx_read_only: bool = False,
        tx_largest: int = 0,
        tx_pieces: int = 1,
        offloads: int = 0,
        queue_pairs: int = 1,
    ) -> None:
        self.rx = SealedMemory(rx_count * STRIDE, seals=0)
        self.tx = SealedMemory(max(4096, tx_count * STRIDE))
        self.session = PortSession(
            number,
            self.rx,
            self.tx,
            rx_count=rx_count,
            tx_count=tx_count,
            stride=STRIDE,
            rx_limit=rx_limit,
            rx_read_only=rx_read_only,
            tx_largest=tx_largest,
            tx_pieces=tx_pieces,
            offloads=offloads,
            queue_pairs=queue_pairs,
        )

    def close(self) -> None:
        self.session.close()
        self.rx.close()
        self.tx.close()

    def __enter__(self) -> OfferedSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RawClient:
    """A connection to the control socket that says whatever a test wants."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE_SECONDS)
        self.socket.connect(str(path))

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.socket, [data], fds)

    def receive(self) -> tuple[bytes, list[int]]:
        """The next packet and its fds, which the caller owns; b"" when the driver hung up."""
        try:
            data, fds, _, _ = socket.recv_fds(self.socket, 4096, 16)
        except ConnectionResetError:
            data, fds, _, _ = socket.recv_fds(self.socket, 4096, 16)
        return data, fds

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeRing:
    """One ring at a byte offset of the rings region (docs/port.md, "Rings")."""

    def __init__(self, memory: mmap.mmap, offset: int, slots: int) -> None:
        self.memory, self.offset, self.slots = memory, offset, slots
        self.position = 0

    def word(self, at: int) -> int:
        value: int = struct.unpack_from("<I", self.memory, self.offset + at)[0]
        return value

    def set_word(self, at: int, value: int) -> None:
        struct.pack_into("<I", self.memory, self.offset + at, value)

    @property
    def produced(self) -> int:
        return self.word(0)

    @property
    def consumed(self) -> int:
        return self.word(64)

    @property
    def wake(self) -> int:
        return self.word(68)

    def put(self, handle: int, length: int, kind: int, flags: int = 0, queue: int = 0) -> bool:
        """Puts an entry in; True when the other side asked for a doorbell."""
        slot = self.position % self.slots
        struct.pack_into("<QIHBB", self.memory, self.offset + 128 + 16 * slot, handle, length, kind, flags, queue)
        self.position = (self.position + 1) % (1 << 32)
        self.set_word(0, self.position)
        asked = self.wake == 1
        if asked:
            self.set_word(68, 0)
        return asked

    def take(self) -> tuple[int, int, int, int, int] | None:
        """(handle, length, kind, flags, queue) of the next entry, if there is one."""
        if self.produced == self.position:
            return None
        slot = self.position % self.slots
        entry: tuple[int, int, int, int, int] = struct.unpack_from("<QIHBB", self.memory, self.offset + 128 + 16 * slot)
        self.position = (self.position + 1) % (1 << 32)
        self.set_word(64, self.position)
        return entry


class FakeRings:
    """The driver's end of a session's rings: a ledger of one lease for each buffer, and no device behind it."""

    RX_PACKET, TX_PACKET, TX_PACKET_ACK = 1, 2, 3
    MORE, CONTINUATION, HEADER = 1, 2, 4
    RX_REGION, TX_REGION = 1, 2

    def __init__(self, offered: OfferedSession) -> None:
        session = offered.session
        geometry = session.geometry
        memory = session.rings.memory
        self.number = session.number
        self.rx, self.tx = offered.rx.map, offered.tx.map
        self.rx_active = FakeRing(memory, geometry.rx_active.offset, geometry.rx_active.slots)
        self.rx_free = FakeRing(memory, geometry.rx_free.offset, geometry.rx_free.slots)
        self.tx_active = FakeRing(memory, geometry.tx_active.offset, geometry.tx_active.slots)
        self.tx_done = FakeRing(memory, geometry.tx_done.offset, geometry.tx_done.slots)
        self.client_doorbell = session.client_doorbell_fd
        self.driver_doorbell = session.driver_doorbell_fd
        self.free = list(range(geometry.rx.buffers))
        self.lease = 1
        self.forwarded = 0
        # Pieces of a frame whose end has not come yet.
        self.sending: list[tuple[bytes, bytes, int]] = []
        for index in range(geometry.tx.buffers):
            self.acknowledge(index)

    def handle(self, region: int, index: int) -> int:
        return self.number << 48 | self.lease << 32 | region << 24 | index

    def acknowledge(self, index: int) -> None:
        self.ring(self.tx_done.put(self.handle(self.TX_REGION, index), STRIDE - HEADROOM, self.TX_PACKET_ACK))

    def ring(self, asked: bool) -> None:
        if asked:
            os.eventfd_write(self.driver_doorbell, 1)

    def deliver(
        self, frame: bytes, *, piece_bytes: int = STRIDE - HEADROOM, header: bytes = b"", queue: int = 0
    ) -> None:
        """Hands a frame to the client, in as many buffers as pieces of `piece_bytes` need, with the virtio header in
        front if there is one."""
        pieces = [frame[at : at + piece_bytes] for at in range(0, len(frame), piece_bytes)]
        asked = False
        for number, piece in enumerate(pieces):
            index = self.free.pop(0)
            at = index * STRIDE + (CONTINUATION_OFFSET if number else HEADROOM)
            self.rx[at : at + len(piece)] = piece
            flags = (self.CONTINUATION if number else 0) | (self.MORE if number + 1 < len(pieces) else 0)
            if header and not number:
                self.rx[at - len(header) : at] = header
                flags |= self.HEADER
            asked |= self.rx_active.put(self.handle(self.RX_REGION, index), len(piece), self.RX_PACKET, flags, queue)
        self.ring(asked)

    def take_back(self) -> list[int]:
        """Indices of the RX buffers that came back, each checked."""
        back = []
        while (entry := self.rx_free.take()) is not None:
            handle, *rest = entry
            index = handle & 0xFFFFFF
            assert handle == self.handle(self.RX_REGION, index)
            assert rest == [0, self.RX_PACKET, 0, 0]
            assert index not in self.free
            self.free.append(index)
            back.append(index)
        return back

    def take_sent(self) -> list[bytes]:
        """The frames that were sent, whole ones, each of their buffers acknowledged."""
        return [frame for frame, _, _ in self.take_sent_with_headers()]

    def take_sent_with_headers(self) -> list[tuple[bytes, bytes, int]]:
        """The same with each frame's virtio header (empty: none) and its queue pair."""
        frames = []
        while (entry := self.tx_active.take()) is not None:
            handle, length, kind, flags, queue = entry
            index = handle & 0xFFFFFF
            assert kind == self.TX_PACKET
            if handle >> 24 & 0xFF == self.RX_REGION:
                frames.append((self._take_forwarded(handle, length, flags), b"", queue))
                continue
            assert handle == self.handle(self.TX_REGION, index)
            assert bool(flags & self.CONTINUATION) == bool(self.sending)
            at = index * STRIDE + HEADROOM
            header = self.tx[at - 12 : at] if flags & self.HEADER else b""
            self.sending.append((self.tx[at : at + length], header, queue))
            self.acknowledge(index)
            if not flags & self.MORE:
                frames.append((b"".join(piece for piece, _, _ in self.sending), *self.sending[0][1:]))
                assert not any(piece[1] for piece in self.sending[1:])
                self.sending = []
        return frames

    def _take_forwarded(self, handle: int, length: int, flags: int) -> bytes:
        """A frame that is sent from where it was received; its buffer is the driver's again."""
        index = handle & 0xFFFFFF
        assert handle == self.handle(self.RX_REGION, index)
        assert flags == 0
        assert not self.sending
        assert index not in self.free
        self.free.append(index)
        self.forwarded += 1
        return self.rx[index * STRIDE + HEADROOM :][:length]

    def await_sent(self, count: int) -> list[bytes]:
        """`count` frames, waiting on the client's doorbell as docs/port.md, "Sleeping", says."""
        frames: list[bytes] = []
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(frames) < count:
            frames += self.take_sent()
            self.tx_active.set_word(68, 1)
            if self.tx_active.produced == self.tx_active.position and len(frames) < count:
                left = deadline - time.monotonic()
                assert left > 0, f"{len(frames)} of {count} frames came"
                select.select([self.client_doorbell], [], [], left)
            self.tx_active.set_word(68, 0)
            try:
                os.eventfd_read(self.client_doorbell)
            except BlockingIOError:
                pass
        return frames


class ServedPort:
    """A PortServer with its event loop in a thread. Calls into the server from a test go through `call`."""

    def __init__(self, path: Path, **options: object) -> None:
        self.path = path
        self.events: queue.Queue[Event | BaseException] = queue.Queue()
        self.verdict: tuple[Verdict, str] | None = (Verdict.DONE, "")  # for whatever a client asks; None: no answer
        self.server = PortServer(path, {os.geteuid()}, FACTS, **options)  # type: ignore[arg-type]
        self._lock = threading.Lock()
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                readable, _, _ = select.select([self.server.fileno(), self._stop], [], [])
                if self._stop in readable:
                    return
                with self._lock:
                    events = self.server.handle()
                    for event in events:
                        if isinstance(event, ClientAsks) and self.verdict is not None:
                            self.server.answer(event.request, *self.verdict)
                for event in events:
                    self.events.put(event)
        except BaseException as error:
            self.events.put(error)

    @contextmanager
    def paused(self) -> Iterator[PortServer]:
        """The server, for as long as its own thread stays out of it."""
        with self._lock:
            yield self.server

    def await_event(self) -> Event:
        event = self.events.get(timeout=DEADLINE_SECONDS)
        if isinstance(event, BaseException):
            raise event
        return event

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        self.server.close()

    def __enter__(self) -> ServedPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
