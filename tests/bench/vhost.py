"""The virtqueues natively, without a guest: ours and DPDK's virtio_user, each on a DPDK net_vhost of its own.

    front-end (ours, or DPDK's) ═══ DPDK net_vhost
      one processor                 the other one

The back-end is the same program whoever is in front, so what differs is the front-end alone. Frames are counted by the
back-end, within a window in the middle of the run. Both pairs stay connected through a contest, and only the one that
is measured polls.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests.bench.contest import Contest, Unavailable
from tests.bench.front_end import QUEUE, FrontEnd
from tests.interop import testpmd
from tests.interop.testpmd import Testpmd

SUMMARY = "virtqueues against DPDK's virtio_user on the same vhost-user back-end, one processor each"
WINDOW_SECONDS, SETTLE_SECONDS = 0.4, 0.15
LENGTHS = (64, 512, 1518)


class Direction(NamedTuple):
    """Seen from the front-end. `front`, `back`: testpmd's forwarding modes; `counted`: what the back-end counts."""

    front: str
    back: str
    start: str
    counted: str


DIRECTIONS = {
    "transmit": Direction("txonly", "rxonly", "start", "RX-packets"),
    "receive": Direction("rxonly", "txonly", "start", "TX-packets"),
    "echo": Direction("io", "io", "start tx_first 4", "RX-packets"),
}


def contests(quick: bool) -> Iterator[Contest]:
    if why := testpmd.missing("net_vhost", "net_virtio", "bus_vdev", "mempool_ring"):
        raise Unavailable(f"{why}: tests/interop/host-dpdk installs it")
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise Unavailable("front-end and back-end want a processor each, and there is one")
    rings = ((False, True),) if quick else ((False, True), (False, False), (True, True), (True, False))
    for packed, merges in rings:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netbridge-bench-")))
            pair = _Pair(directory, stack, usable[0], usable[1], packed=packed, merges=merges)
            for name, direction in DIRECTIONS.items():
                for length in LENGTHS[:1] if quick else LENGTHS:
                    ring = f"{'packed' if packed else 'split'}, mrg {'on' if merges else 'off'}"
                    yield Contest(
                        bench="vhost",
                        metric=f"{name}, {length} B, {ring}",
                        unit="Mpps",
                        ours=pair.work(pair.run_ours, name, direction, length),
                        peers={"DPDK virtio_user": pair.work(pair.run_peer, name, direction, length)},
                        commands=pair.commands,
                    )


class _Pair:
    """Both front-ends, each with its back-end, all idle until one is measured."""

    def __init__(self, directory: Path, stack: ExitStack, front: int, back: int, *, packed: bool, merges: bool) -> None:
        self._backs = {}
        for who in ("ours", "peer"):
            (directory / who).mkdir()
            vdev = f"net_vhost0,iface={directory / who}/sock,queues=1"
            self._backs[who] = stack.enter_context(Testpmd(directory / who, [vdev], processor=back, urgent=True))
        self._ours = stack.enter_context(
            FrontEnd(directory / "ours/sock", packed=packed, merges=merges, processor=front)
        )
        (directory / "front").mkdir()
        options = f"queues=1,queue_size={QUEUE},packed_vq={packed:d},mrg_rxbuf={merges:d}"
        vdev = f"net_virtio_user0,path={directory}/peer/sock,{options}"
        self._peer = stack.enter_context(Testpmd(directory / "front", [vdev], processor=front, urgent=True))
        for testpmd_ in self._backs.values():
            testpmd_.await_link()
        lines = (self._peer.command_line, self._backs["peer"].command_line)
        self.commands = tuple(" ".join(words).replace(str(directory), "DIR") for words in lines)

    def work(
        self, run: Callable[[str, Direction, int], float], name: str, direction: Direction, length: int
    ) -> Callable[[], float]:
        return lambda: run(name, direction, length)

    def run_ours(self, name: str, direction: Direction, length: int) -> float:
        self._prepare(self._backs["ours"], direction.back, length)
        self._ours.start(name, length)
        try:
            return self._measure(self._backs["ours"], direction)
        finally:
            self._ours.stop()

    def run_peer(self, _: str, direction: Direction, length: int) -> float:
        self._prepare(self._backs["peer"], direction.back, length)
        self._prepare(self._peer, direction.front, length)
        self._peer.tell("start")
        try:
            return self._measure(self._backs["peer"], direction)
        finally:
            self._peer.tell("stop")

    @staticmethod
    def _prepare(pmd: Testpmd, mode: str, length: int) -> None:
        pmd.tell(f"set fwd {mode}")
        pmd.tell(f"set txpkts {length}")

    @staticmethod
    def _measure(back: Testpmd, direction: Direction) -> float:
        """Million frames a second that the back-end counts."""
        back.tell(direction.start)
        try:
            time.sleep(SETTLE_SECONDS)
            first, began = back.counts(0)[direction.counted], time.monotonic()
            time.sleep(WINDOW_SECONDS)
            last, ended = back.counts(0)[direction.counted], time.monotonic()
        finally:
            back.tell("stop")
        return (last - first) / (ended - began) / 1e6
