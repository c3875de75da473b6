"""Keeps the frames that pass an interface of this machine, both ways, in a pcapng file."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from pathlib import Path

from qemu.capture import INBOUND, OUTBOUND, Capture, Tally
from qemu.packets import (
    AUXDATA,
    ETH_P_ALL,
    PACKET_AUXDATA,
    PACKET_OUTGOING,
    PACKET_STATISTICS,
    SO_RCVBUFFORCE,
    SO_TIMESTAMPNS,
    SOL_PACKET,
    tag_of,
)

KEPT = 2048
"""Bytes of a frame that are kept: all of one that any cable would carry, the beginning of one that was never cut."""
WAITING_BYTES = 64 << 20
"""What may wait, in the kernel, to be written; beyond that frames are missing, and the file says how many."""
TIME = struct.Struct("@ll")  # struct timespec
TAG_AT = 12


class Sniffer:
    """Made by a thread in the interface's namespace. It takes CAP_NET_RAW; what it keeps are frames as the kernel has
    them, so with offloads on uncut, and with checksums that nobody has made yet."""

    def __init__(self, path: Path, interface: str):
        self._capture = Capture(path, interface, KEPT)
        self._tally = Tally(path)
        self._reading = threading.Lock()
        self._buffer = bytearray(KEPT)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Bound last, so that all it hears comes with what is asked for here.
        self._packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._packets.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        self._packets.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._packets.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, WAITING_BYTES)
        self._packets.bind((interface, ETH_P_ALL))
        self._thread = threading.Thread(target=self._run, name=f"sniffer {interface}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        for fd in (self._packets.fileno(), self._stop):
            poll.register(fd, select.POLLIN)
        written = False
        while True:
            ready = poll.poll(500 if written else None)
            if any(fd == self._stop for fd, _ in ready):
                return
            if ready:
                self._read()
            else:
                self._capture.flush()  # nothing came for a moment: what is captured shall be in the file
            written = bool(ready)

    def _read(self) -> None:
        """Write what has passed the interface until now."""
        with self._reading:
            while True:
                try:
                    length, ancillary, _, (_, _, kind, *_) = self._packets.recvmsg_into(
                        [self._buffer],
                        socket.CMSG_SPACE(AUXDATA.size) + socket.CMSG_SPACE(TIME.size),
                        socket.MSG_DONTWAIT | socket.MSG_TRUNC,
                    )
                except BlockingIOError:
                    return
                except OSError as error:
                    if error.errno != errno.ENETDOWN:  # which is told once, when the interface goes
                        raise
                    continue
                frame = bytes(self._buffer[:length])
                if tag := tag_of(ancillary):
                    frame = (frame[:TAG_AT] + tag + frame[TAG_AT:])[:KEPT]
                seconds, rest = next(
                    TIME.unpack(value)
                    for level, what, value in ancillary
                    if (level, what) == (socket.SOL_SOCKET, SO_TIMESTAMPNS)
                )
                direction = OUTBOUND if kind == PACKET_OUTGOING else INBOUND
                self._capture.write(frame, seconds * 1_000_000_000 + rest, direction, length + len(tag))

    def captured(self) -> tuple[int, int]:
        """Frames to the other end and from it until now, as they are in the file."""
        self._read()
        self._capture.flush()
        return self._tally.look()

    def close(self) -> None:
        """All that has passed until now is in the file, and how many frames are missing."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._read()
        seen, missing = struct.unpack("II", self._packets.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self._capture.count(seen, missing)
        self._capture.close()
        self._packets.close()
        os.close(self._stop)
