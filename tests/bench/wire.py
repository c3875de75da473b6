"""The host's end of a guest's NIC as a load in C (native/wire_load.c): no frame of it is seen by Python."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from tests.bench import native

MOST_SECONDS = 30.0
QEMU = "qemu-system-x86_64"


class LoadWire:
    """A wire as qemu.command.Nic wants it; close() it after the guest."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._program = str(native.build("wire_load"))

    def netdev(self, ident: str) -> str:
        return f"dgram,id={ident},local.type=fd,local.str={self._theirs.fileno()}"

    def fds(self) -> Sequence[int]:
        return (self._theirs.fileno(),)

    def attached(self) -> None:
        self._theirs.close()

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()

    def _words(self, *words: object) -> list[str]:
        return [self._program, str(self._ours.fileno()), *(str(word) for word in words)]

    @contextlib.contextmanager
    def flood(self, length: int, mac: str) -> Iterator[None]:
        """Frames of `length` bytes, as fast as the guest takes them, until the block is left."""
        load = subprocess.Popen(self._words("flood", length, mac), pass_fds=(self._ours.fileno(),))
        try:
            yield
        finally:
            load.kill()
            load.wait()

    def _figures(self, *words: object) -> list[float]:
        command = self._words(*words)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=MOST_SECONDS,
            pass_fds=(self._ours.fileno(),),
        )
        if done.returncode:
            raise RuntimeError(f"wire_load {words[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return [float(word) for word in done.stdout.split()]

    def sink(self, seconds: float) -> float:
        """Frames a second that come from the guest."""
        return self._figures("sink", round(1000 * seconds))[0]

    def window(self, length: int, mac: str, seconds: float) -> float:
        """Frames a second that the guest sends back, 64 of them under way."""
        return self._figures("window", length, mac, round(1000 * seconds))[0]

    def paced(self, length: int, mac: str, seconds: float, rate: float) -> float:
        """Frames a second that the guest sends back, when `rate` of them a second are sent to it."""
        return self._figures("paced", length, mac, round(1000 * seconds), round(rate))[0]

    @contextlib.contextmanager
    def first(self, length: int, mac: str, seconds: float) -> Iterator[Callable[[], float]]:
        """A frame every few milliseconds, from now until one comes back. Yields what waits for it, and says when on
        time.monotonic()'s clock it came; RuntimeError when none does in that time."""
        words = self._words("first", length, mac, round(1000 * seconds))
        with subprocess.Popen(
            words, pass_fds=(self._ours.fileno(),), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as load:

            def came() -> float:
                out, err = load.communicate(timeout=seconds + MOST_SECONDS)
                if load.returncode:
                    raise RuntimeError(f"wire_load first ended with {load.returncode}: {err.strip()}")
                return int(out) / 1e9

            try:
                yield came
            finally:
                load.kill()

    def roundtrip(self, length: int, mac: str, seconds: float) -> tuple[float, float]:
        """p50 and p99 of one frame at a time there and back, microseconds."""
        p50, p99 = self._figures("roundtrip", length, mac, round(1000 * seconds))
        return p50 / 1000, p99 / 1000


class Ceiling:
    """QEMU without a guest, carrying frames from one Unix socket to another: what no driver in a guest can be ahead of,
    as long as QEMU's own loop is the bottleneck."""

    def __init__(self) -> None:
        self._ends = LoadWire(), LoadWire()
        netdevs = [word for number, end in enumerate(self._ends) for word in ("-netdev", end.netdev(f"d{number}"))]
        hub = [word for number in (0, 1) for word in ("-netdev", f"hubport,id=h{number},hubid=0,netdev=d{number}")]
        self.command = [QEMU, "-machine", "none", "-nodefaults", "-display", "none", *netdevs, *hub]
        self._qemu = subprocess.Popen(self.command, pass_fds=[fd for end in self._ends for fd in end.fds()])
        for end in self._ends:
            end.attached()

    def carry(self, length: int, mac: str, seconds: float) -> float:
        """Frames a second that come out at the other side. Raises RuntimeError when QEMU has ended."""
        if self._qemu.poll() is not None:
            raise RuntimeError(f"{' '.join(self.command)} ended with {self._qemu.returncode}")
        with self._ends[0].flood(length, mac):
            return self._ends[1].sink(seconds)

    def close(self) -> None:
        self._qemu.kill()
        self._qemu.wait()
        for end in self._ends:
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
