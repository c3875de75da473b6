"""A vhost-user back-end that moves no frames, written from the specification (QEMU's docs/interop/vhost-user.rst) and
from nothing else: numbers and layouts are its, so that a test fails when the front-end and the document part ways.

It runs in a thread, records what it is told, maps the memory it is handed, and lies when a test tells it to.
"""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
NET_SET_MTU, GET_CONFIG, RESET_DEVICE, SET_STATUS, GET_STATUS = 20, 24, 34, 39, 40

F_PROTOCOL_FEATURES, F_VERSION_1, F_ACCESS_PLATFORM = 1 << 30, 1 << 32, 1 << 33
F_MTU, F_MAC, F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_MQ, F_RING_PACKED = (1 << n for n in (3, 5, 15, 16, 17, 22, 34))
P_MQ, P_LOG_SHMFD, P_REPLY_ACK, P_NET_MTU, P_CONFIG, P_RESET_DEVICE, P_STATUS = (
    1 << n for n in (0, 1, 3, 4, 9, 13, 16)
)

# What DPDK 22.11 offers, give or take an offload.
OFFERED = F_PROTOCOL_FEATURES | F_VERSION_1 | F_MTU | F_MRG_RXBUF | F_CTRL_VQ | F_MQ
PROTOCOL = P_MQ | P_LOG_SHMFD | P_REPLY_ACK | P_NET_MTU | P_STATUS


@dataclass
class Vring:
    size: int = 0
    base: int | None = None
    descriptors: int = 0
    used: int = 0
    available: int = 0
    kick: int = -1
    call: int = -1
    error: int = -1
    enabled: bool = False

    def close(self) -> None:
        for fd in (self.kick, self.call, self.error):
            if fd >= 0:
                os.close(fd)


@dataclass
class Region:
    guest: int
    size: int
    user: int
    map: mmap.mmap


@dataclass
class FakeBackEnd:
    """`connect` or `start` begin, and it ends when either side hangs up; then `join`. Switches first, then what it
    saw."""

    offered: int = OFFERED
    protocol: int = PROTOCOL
    pairs: int = 1
    config: bytes = b""
    refuses: tuple[int, ...] = ()  # requests acknowledged with 1
    silent_on: tuple[int, ...] = ()  # requests never answered
    hangs_up_on: tuple[int, ...] = ()
    keeps_features_ok: bool = True
    # Answers as they go out, by request: (header and payload) -> what is sent instead, and the files with it.
    lies: dict[int, Callable[[bytes], tuple[bytes, list[int]]]] = field(default_factory=dict)
    unasked: bytes = b""  # sent after the first answer

    requests: list[tuple[int, bytes]] = field(default_factory=list)
    tables: list[list[tuple[int, int]]] = field(default_factory=list)
    features: int = 0
    agreed_protocol: int = 0
    status: int = 0
    mtu: int = 0
    regions: list[Region] = field(default_factory=list)
    vrings: dict[int, Vring] = field(default_factory=dict)
    failure: BaseException | None = None
    started: threading.Event = field(default_factory=threading.Event)  # both rings were enabled

    def names(self) -> list[int]:
        return [request for request, _ in self.requests]

    # ---- The connection

    def connect(self) -> socket.socket:
        """The front-end's end of a new connection, served by a thread."""
        ours, theirs = socket.socketpair()
        self.start(ours)
        return theirs

    def start(self, stream: socket.socket) -> None:
        """Serves a connection in a thread. Takes it over."""
        self.stream = stream
        self.thread = threading.Thread(target=self.serve, args=(stream,), daemon=True)
        self.thread.start()

    def serve(self, stream: socket.socket) -> None:
        try:
            with stream:
                while self._one(stream):
                    pass
        except (BrokenPipeError, ConnectionResetError):
            pass  # the front-end hung up
        except BaseException as error:
            self.failure = error
        finally:
            self._let_go()

    def await_kick(self, seconds: float) -> None:
        """Until the first ring is kicked, with which a driver's bring-up ends."""
        assert self.started.wait(seconds), "the rings were never enabled"
        poller = select.poll()
        poller.register(self.vrings[0].kick, select.POLLIN)
        assert poller.poll(seconds * 1000), "the first ring was never kicked"

    def die(self) -> None:
        self.stream.shutdown(socket.SHUT_RDWR)
        self.join()

    def join(self) -> None:
        self.thread.join(10)
        assert not self.thread.is_alive(), "the back-end never saw the end of the connection"
        if self.failure is not None:
            raise self.failure

    def _let_go(self) -> None:
        while self.regions:
            self.regions.pop().map.close()
        while self.vrings:
            self.vrings.popitem()[1].close()

    def _read(self, stream: socket.socket, size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            piece, ancillary, flags, _ = stream.recvmsg(size - len(data), socket.CMSG_SPACE(8 * 4))
            assert not flags & socket.MSG_CTRUNC
            for _, _, content in ancillary:
                fds += array.array("i", content)
            if not piece:
                return b""
            data += piece
        return data

    def _one(self, stream: socket.socket) -> bool:
        fds: list[int] = []
        head = self._read(stream, 12, fds)
        if not head:
            return False
        request, flags, size = struct.unpack("=III", head)
        assert flags & 3 == 1, "version 1"
        assert not flags & ~0b1011, "no flag but version and need_reply"
        assert size <= 4096
        payload = self._read(stream, size, fds) if size else b""
        self.requests.append((request, payload))
        if request in self.hangs_up_on:
            for fd in fds:
                os.close(fd)
            return False
        answer = self._carry_out(request, payload, fds)
        if answer is None and flags & 8:
            assert self.agreed_protocol & P_REPLY_ACK, "need_reply without REPLY_ACK"
            answer = struct.pack("=Q", request in self.refuses)
        if answer is None or request in self.silent_on:
            return True
        message = struct.pack("=III", request, 1 | 4, len(answer)) + answer
        files: list[int] = []
        if request in self.lies:
            message, files = self.lies[request](message)
        socket.send_fds(stream, [message + self.unasked], files)
        self.unasked = b""
        return True

    # ---- What it is told

    def _carry_out(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        expected = {SET_VRING_KICK: 1, SET_VRING_CALL: 1, SET_VRING_ERR: 1}.get(request, 0)
        if request == SET_MEM_TABLE:
            (expected,) = struct.unpack_from("=I", payload)
        assert len(fds) == expected, f"{len(fds)} files with request {request}"
        if request in (GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_STATUS):
            assert not payload
            values = {1: self.offered, 15: self.protocol, 17: self.pairs, 40: self.status}
            return struct.pack("=Q", values[request])
        if request == GET_CONFIG:
            offset, size, _ = struct.unpack_from("=III", payload)
            return struct.pack("=III", offset, size, 0) + self.config[offset : offset + size]
        if request == GET_VRING_BASE:
            index, _ = struct.unpack("=II", payload)
            ring = self.vrings.pop(index)
            ring.close()
            return struct.pack("=II", index, ring.base or 0)
        if request == SET_MEM_TABLE:
            self._take_memory(payload, fds)
        elif request == SET_VRING_ADDR:
            index, flags, descriptors, used, available, _ = struct.unpack("=IIQQQQ", payload)
            assert flags == 0
            ring = self._ring(index)
            ring.descriptors, ring.used, ring.available = descriptors, used, available
            for address in (descriptors, used, available):
                self.at(address, 4)
        elif request in (SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE):
            index, value = struct.unpack("=II", payload)
            name = {SET_VRING_NUM: "size", SET_VRING_BASE: "base", SET_VRING_ENABLE: "enabled"}[request]
            setattr(self._ring(index), name, value)
            if sum(ring.enabled for ring in self.vrings.values()) == 2:
                self.started.set()
        elif request in (SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR):
            (index,) = struct.unpack("=Q", payload)
            assert index < 256, "a file came, and the flag says none"
            name = {SET_VRING_KICK: "kick", SET_VRING_CALL: "call", SET_VRING_ERR: "error"}[request]
            setattr(self._ring(index), name, fds[0])
        elif request in (SET_FEATURES, SET_PROTOCOL_FEATURES, NET_SET_MTU, SET_STATUS):
            (value,) = struct.unpack("=Q", payload)
            if request == SET_FEATURES:
                assert value & ~self.offered == 0, "accepted what was not offered"
                self.features = value
            elif request == SET_PROTOCOL_FEATURES:
                assert value & ~self.protocol == 0
                self.agreed_protocol = value
            elif request == NET_SET_MTU:
                self.mtu = value
            else:
                assert self.agreed_protocol & P_STATUS
                self.status = value if self.keeps_features_ok else value & ~8
        else:
            assert request in (SET_OWNER, RESET_DEVICE), f"request {request} is none that this back-end agreed to"
        return None

    def _ring(self, index: int) -> Vring:
        return self.vrings.setdefault(index, Vring())

    def _take_memory(self, payload: bytes, fds: list[int]) -> None:
        assert not any(ring.enabled for ring in self.vrings.values()), "memory changed under a running ring"
        while self.regions:
            self.regions.pop().map.close()
        count, _ = struct.unpack_from("=II", payload)
        assert len(payload) == 8 + 32 * count
        for i, fd in enumerate(fds):
            guest, size, user, offset = struct.unpack_from("=QQQQ", payload, 8 + 32 * i)
            assert offset == 0
            self.regions.append(Region(guest, size, user, mmap.mmap(fd, size)))
            os.close(fd)
        self.tables.append([(region.guest, region.size) for region in self.regions])

    def at(self, address: int, size: int) -> memoryview:
        """Memory at a user address."""
        for region in self.regions:
            if region.user <= address and address + size <= region.user + region.size:
                start = address - region.user
                return memoryview(region.map)[start : start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are not in the memory table")
