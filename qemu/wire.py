"""The host's end of a guest's NIC: a scapy socket whose every frame is captured, and that never makes QEMU wait.

It is one end of a pair of Unix datagram sockets, QEMU (-netdev dgram) holding the other: one datagram is one frame,
nothing is lost, no privilege is needed and no name can collide. The kernel lets only a few frames queue; then sending
waits until the guest has taken some. A thread takes every frame off at once, with its time, so that the guest never
waits for a test that is busy.

Frames are bytes here. recv() and sniff(), which scapy's own tools use, dissect them; take(), exchange() and expect()
do not, and are for speed and for exactness.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scapy.data import MTU
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from scapy.supersocket import SuperSocket

from qemu.capture import INBOUND, OUTBOUND, Capture, Tally
from qemu.errors import HarnessError
from qemu.exactness import Exactness
from qemu.inbox import QUEUE, Frame, Inbox

LONGEST = 65_000
"""Bytes of the longest frame that passes QEMU's dgram backend."""
ROOM = 106_496
"""Half of the bytes, bookkeeping included, that a socket holds of what was sent: Linux's default, on whatever host."""
SEND_SECONDS = 5.0


class WireClosed(HarnessError):
    """QEMU is no longer at the other end."""


class WireStalled(HarnessError):
    """The guest's NIC took no frame in time: no driver runs there, its link is down or the guest is paused."""


class Wire(Exactness, SuperSocket):  # type: ignore[misc]
    """The host's end. Owns both sockets until QEMU has its own; `pcap` gets a pcapng of both directions."""

    desc = "frames of a guest's NIC"
    longest = 0
    """Bytes of the longest frame that was sent."""
    noise = 0
    """Frames in the capture that were not handed on: on a wire that is not the guest's alone."""

    def __init__(self, pcap: Path | None = None, name: str = "wire"):
        # Not SuperSocket's: that opens a socket of an interface of this machine.
        self.closed = True  # until there is something to close
        self.name = name
        self.pcap = pcap
        self.sent = self.sent_bytes = self.received_bytes = 0
        self._socket, self._theirs = self._open()
        self._capture = Capture(pcap, name) if pcap is not None else None
        self._tally = Tally(pcap) if pcap is not None else None
        self._clock_offset = time.time_ns() - time.monotonic_ns()
        self._inbox = Inbox()
        self._hearing = threading.Lock()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._reader = threading.Thread(target=self._read, name=f"wire {name}", daemon=True)
        self._reader.start()
        self.closed = False

    def _open(self) -> tuple[socket.socket, socket.socket | None]:
        """Our end, and the one that QEMU is to have."""
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
        return ends

    # What the command line of QEMU is made of

    def netdev(self, ident: str) -> str:
        return f"dgram,id={ident},local.type=fd,local.str={self.guest_end.fileno()}"

    def fds(self) -> Sequence[int]:
        return (self.guest_end.fileno(),)

    def attached(self) -> None:
        """QEMU has inherited its end: from here on, sending tells when QEMU is gone."""
        self.guest_end.close()

    @property
    def guest_end(self) -> socket.socket:
        """The other end, until attached(): for tests that play the guest."""
        assert self._theirs is not None
        return self._theirs

    # Receiving

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        receive = self._receive
        offset = self._clock_offset
        written = False
        while True:
            ready = poll.poll(500 if written else None)
            if not ready and self._capture is not None:
                self._capture.flush()  # nothing came for a moment: what is captured shall be in the file
                written = False
                continue
            if any(fd == self._stop for fd, _ in ready):
                return
            batch: list[Frame] = []
            try:
                with self._hearing:
                    # In batches, not for ever: who waits for a frame is told after at most so many.
                    while len(batch) < 64:
                        data = receive()
                        if data is not None:
                            batch.append(Frame(data, time.monotonic_ns()))
            except BlockingIOError:
                pass
            except OSError:
                return
            if not batch:
                continue
            self._inbox.add(batch)
            for data, at in batch:
                self.received_bytes += len(data)
                if self._capture is not None:
                    self._capture.write(data, at + offset, INBOUND)
                    written = True

    def _receive(self) -> bytes | None:
        """The next frame that has come; None for one that is not to be handed on. Raises BlockingIOError, OSError."""
        return self._socket.recv(MTU, socket.MSG_DONTWAIT)

    def _note_noise(self, data: bytes) -> None:
        """Capture a frame that is not handed on."""
        if self._capture is not None:
            self._capture.write(data, time.time_ns(), INBOUND)

    @property
    def received(self) -> int:
        """Frames that have come, taken by somebody or not."""
        return self._inbox.received

    @property
    def overflowed(self) -> int:
        """Frames that were dropped because nobody took those before them."""
        return self._inbox.overflowed

    def take(self, timeout: float | None = 0.0, limit: int = QUEUE) -> list[Frame]:
        """The frames that have come, at most `limit`; waits up to `timeout` seconds (None: for ever) for a first."""
        return self._inbox.take(timeout, limit)

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """Nothing is taken off the wire meanwhile: once its socket is full, of 90 frames of 1514 bytes or of nearly 300
        short ones, QEMU holds back what the guest sends. Sending goes on."""
        with self._hearing:
            yield

    def drain(self) -> list[bytes]:
        """Forget, and return, what has come and was not asked for yet. Does not wait."""
        return [frame.data for frame in self.take()]

    def recv_raw(self, x: int = MTU, timeout: float | None = None) -> tuple[Any, bytes | None, float | None]:
        """One frame the way scapy wants it: class, bytes, time."""
        frames = self.take(timeout, limit=1)
        if not frames:
            return None, None, None
        data, at = frames[0]
        return Ether, data[:x], (at + self._clock_offset) / 1e9

    def recv(self, x: int = MTU, timeout: float | None = None, **kwargs: Any) -> Packet | None:
        """One frame, dissected; None when none comes within `timeout` seconds (None: waits until one does)."""
        layer, data, at = self.recv_raw(x, timeout)
        if data is None:
            return None
        packet: Packet = layer(data, **kwargs)
        packet.time = at
        return packet

    def captured(self) -> tuple[int, int] | None:
        """Frames to the guest and from it as they are in the capture's file; None when none is kept."""
        if self._capture is None or self._tally is None:
            return None
        self._capture.flush()
        return self._tally.look()

    def fileno(self) -> int:
        """Readable while frames wait: not to be read from."""
        return -1 if self.closed else self._inbox.fileno()

    # Sending

    def send(self, frame: bytes | Packet, timeout: float = SEND_SECONDS) -> int:
        """Send one frame, waiting up to `timeout` seconds until there is room. Returns its length.

        Raises ValueError on a frame that would break or not pass QEMU's backend, WireStalled, WireClosed.
        """
        data = frame if isinstance(frame, bytes) else bytes(frame)
        self.transmit(data, timeout)
        if isinstance(frame, Packet):
            frame.sent_time = time.time()
        return len(data)

    def transmit(self, data: bytes, timeout: float) -> int:
        """Send bytes; returns the time right before, in nanoseconds of the monotonic clock."""
        if not data:
            # QEMU takes an empty datagram for the end and never reads again.
            raise ValueError("an empty frame cannot be sent")
        if len(data) > LONGEST:
            raise ValueError(f"a frame of {len(data)} bytes cannot be sent: at most {LONGEST} pass QEMU")
        at = time.monotonic_ns()
        try:
            self._give(data)
        except BlockingIOError:
            at = self._transmit_patiently(data, timeout)
        except OSError as error:
            raise self._gone(error) from error
        self.sent += 1
        self.sent_bytes += len(data)
        self.longest = max(self.longest, len(data))
        if self._capture is not None:
            self._capture.write(data, at + self._clock_offset, OUTBOUND)
        return at

    def _give(self, data: bytes) -> None:
        """Hand a frame over. Raises BlockingIOError while there is no room."""
        self._socket.send(data, socket.MSG_DONTWAIT)

    def _gone(self, error: OSError) -> WireClosed:
        return WireClosed(f"{self.name}: QEMU is not at the other end: {error}")

    def _transmit_patiently(self, data: bytes, timeout: float) -> int:
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise WireStalled(
                    f"{self.name}: the guest's NIC took no frame for {timeout:g} s: is its driver up, its link on, "
                    "the guest running?"
                )
            at = time.monotonic_ns()
            try:
                self._give(data)
                return at
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._gone(error) from error

    def close(self) -> None:
        """Close the wire: capture complete, thread ended."""
        if self.closed:
            return
        self.closed = True
        os.eventfd_write(self._stop, 1)
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._socket.close()
        if self._theirs is not None:
            self._theirs.close()
        if self._capture is not None:
            self._capture.close()
        self._inbox.close()
        os.close(self._stop)
