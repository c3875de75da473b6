"""A switch that joins wires, and with them guests; it learns addresses as any other, and does harm when it is told to.

    with Switch([one.wire, other.wire], Harm(loss=0.1, seed=7)) as switch:
        ...
        switch.cut(0)

What happens to a frame depends on the seed, the port it came in by and how many came in there before, and on nothing
else: a run that failed can be repeated. Every frame is in the captures of the wires that it went through.
"""

from __future__ import annotations

import heapq
import os
import random
import select
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from qemu.wire import Wire, WireClosed, WireStalled

PATIENCE_SECONDS = 0.2
"""How long a port may take no frame before one is dropped, as a switch does whose queue is full."""
HELD_SECONDS = 0.2
"""A frame that is to be overtaken goes at last, when no other comes, after so long."""
GROUP = 1
"""The bit of an Ethernet address that makes it one of many receivers (IEEE 802.3, 3.2.3)."""


@dataclass(frozen=True)
class Harm:
    """What a switch does to frames: chances from 0 to 1, each on its own; a delay in seconds, for every frame.

    A frame that is to be reordered is held until the next one from the same port has gone.
    """

    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    delay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("loss", "duplication", "reordering"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a chance from 0 to 1, not {getattr(self, name)!r}")
        if self.delay < 0:
            raise ValueError(f"a delay is at least 0 seconds, not {self.delay!r}")


@dataclass
class Counters:
    """Frames by what became of them."""

    received: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    cut: int = 0
    stalled: int = 0
    """Dropped because the port they were to leave by took none, or was gone."""


@dataclass
class _Port:
    wire: Wire
    dice: random.Random
    held: list[tuple[float, bytes]] = field(default_factory=list)
    is_cut: bool = False


class Switch:
    """Joins `wires`, whose frames nobody else may take; they belong to whoever made them. A thread, until close()."""

    def __init__(self, wires: Sequence[Wire], harm: Harm | None = None):
        self.harm = harm or Harm()
        self.counters = Counters()
        self._ports = [_Port(wire, random.Random(f"{self.harm.seed}:{n}")) for n, wire in enumerate(wires)]
        self._learned: dict[bytes, int] = {}
        self._late: list[tuple[float, int, int, bytes]] = []
        self._order = 0
        self._lock = threading.Lock()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="switch", daemon=True)
        self._thread.start()

    def cut(self, port: int) -> None:
        """Nothing goes in or out by that port any more."""
        with self._lock:
            self._ports[port].is_cut = True

    def mend(self, port: int) -> None:
        with self._lock:
            self._ports[port].is_cut = False

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        numbers = {}
        for number, port in enumerate(self._ports):
            numbers[port.wire.fileno()] = number
            poll.register(port.wire.fileno(), select.POLLIN)
        while True:
            for fd, _ in poll.poll(self._milliseconds()):
                if fd == self._stop:
                    return
                number = numbers[fd]
                if self._ports[number].wire.closed:
                    poll.unregister(fd)
                    continue
                for frame in self._ports[number].wire.take():
                    with self._lock:
                        self._receive(number, frame.data)
            with self._lock:
                self._release(time.monotonic())

    def _milliseconds(self) -> float | None:
        """Until something is due; None when nothing is."""
        with self._lock:
            due = [port.held[0][0] for port in self._ports if port.held] + [late[0] for late in self._late[:1]]
        return max(0.0, min(due) - time.monotonic()) * 1000 + 1 if due else None

    def _receive(self, number: int, data: bytes) -> None:
        port, counters = self._ports[number], self.counters
        counters.received += 1
        # Three throws for every frame, whatever comes of them, so that one kind of harm does not shift the others.
        lost, twice, overtaken = (port.dice.random() < chance for chance in self._chances())
        if port.is_cut:
            counters.cut += 1
            return
        if len(data) >= 12 and not data[6] & GROUP:
            self._learned[data[6:12]] = number
        if lost:
            counters.lost += 1
        elif overtaken and not port.held:
            counters.reordered += 1
            port.held.append((time.monotonic() + HELD_SECONDS, data))
            return
        else:
            self._forward(number, data)
            if twice:
                counters.duplicated += 1
                self._forward(number, data)
        if not lost:
            for _, kept in port.held:
                self._forward(number, kept)
            port.held.clear()

    def _chances(self) -> tuple[float, float, float]:
        return self.harm.loss, self.harm.duplication, self.harm.reordering

    def _forward(self, number: int, data: bytes) -> None:
        if self.harm.delay:
            self._order += 1
            heapq.heappush(self._late, (time.monotonic() + self.harm.delay, self._order, number, data))
        else:
            self._emit(number, data)

    def _emit(self, number: int, data: bytes) -> None:
        known = None if data[0] & GROUP else self._learned.get(data[:6])
        for target, port in enumerate(self._ports):
            if target == number or (known is not None and target != known):
                continue
            if port.is_cut:
                self.counters.cut += 1
                continue
            try:
                port.wire.send(data, PATIENCE_SECONDS)
            except (WireStalled, WireClosed):
                self.counters.stalled += 1

    def _release(self, now: float) -> None:
        for number, port in enumerate(self._ports):
            if port.held and port.held[0][0] <= now:
                for _, data in port.held:
                    self._forward(number, data)
                port.held.clear()
        while self._late and self._late[0][0] <= now:
            _, _, number, data = heapq.heappop(self._late)
            self._emit(number, data)

    def close(self) -> None:
        """End the thread; frames that were held or late are dropped. May be called again."""
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            os.close(self._stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
