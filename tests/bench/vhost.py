"""The virtqueues natively, without a guest: ours and DPDK's virtio_user, each on a DPDK net_vhost of its own.

    front-end (ours, or DPDK's) ═══ DPDK net_vhost
      one processor                 the other one

The back-end is the same program whoever is in front, so what differs is the front-end alone. Frames are counted by the
back-end, within a window in the middle of the run. All pairs stay connected through a contest, and only the one that
is measured polls. DPDK takes part twice: as it comes, and with its vectorised paths where it has any for the ring.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from netbridge.datapath._core import lib as core
from tests.bench.contest import Contest, Unavailable
from tests.bench.front_end import QUEUE, FrontEnd
from tests.interop import testpmd
from tests.interop.testpmd import Testpmd

SUMMARY = "virtqueues against DPDK's virtio_user on the same vhost-user back-end, one processor each"
WINDOW_SECONDS, SETTLE_SECONDS = 0.25, 0.1
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


GOAL = 1.0
APART, WITH_FRAME = "", ", header with frame"
"""Where ours has the header of a sent frame (device.tx_header): out of its client's reach, which is the rule, or in
front of the frame, as DPDK has it."""
AS_IT_COMES, VECTORISED = "DPDK virtio_user", "DPDK virtio_user, vectorised"


def _peers(*, packed: bool, merges: bool) -> dict[str, str]:
    """Further options of virtio_user, by contestant. It has vectorised paths for a split ring only without IN_ORDER and
    without MRG_RXBUF; for a packed one those of AVX-512, and with MRG_RXBUF only to transmit."""
    peers = {AS_IT_COMES: ""}
    if packed:
        peers[VECTORISED] = ",vectorized=1"
    elif not merges:
        peers[VECTORISED] = ",vectorized=1,in_order=0"
    return peers


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
                for length, header in _loads(name, quick=quick):
                    ring = f"{'packed' if packed else 'split'}, mrg {'on' if merges else 'off'}{header}"
                    yield Contest(
                        bench="vhost",
                        metric=f"{name}, {length} B, {ring}",
                        unit="Mpps",
                        ours=functools.partial(pair.run_ours, name, direction, length, header),
                        peers={who: functools.partial(pair.run_peer, who, direction, length) for who in pair.peers},
                        goals=dict.fromkeys(pair.peers, GOAL),
                        commands=pair.commands,
                    )


def _loads(name: str, *, quick: bool) -> Iterator[tuple[int, str]]:
    """Lengths of frames, and where ours has the header: that of a frame that is copied is out of reach either way."""
    for length in LENGTHS[:1] if quick else LENGTHS:
        yield length, APART
        if name == "transmit" and length > core.NB_TX_MOST_COPIED:
            yield length, WITH_FRAME


class _Pair:
    """All front-ends, each with a back-end of its own, all idle until one is measured."""

    def __init__(self, directory: Path, stack: ExitStack, front: int, back: int, *, packed: bool, merges: bool) -> None:
        def start(place: str, vdev: str, processor: int, *options: str) -> Testpmd:
            (directory / place).mkdir()
            pmd = Testpmd(directory / place, [vdev], processor=processor, urgent=True, system=options)
            return stack.enter_context(pmd)

        def start_back(place: str) -> Testpmd:
            return start(place, f"net_vhost0,iface={directory / place}/sock,queues=1", back)

        self._back = start_back("ours")
        self._ours = stack.enter_context(
            FrontEnd(directory / "ours/sock", packed=packed, merges=merges, processor=front)
        )
        self.peers: dict[str, tuple[Testpmd, Testpmd]] = {}
        lines = []
        for number, (who, more) in enumerate(_peers(packed=packed, merges=merges).items()):
            place = f"peer{number}"
            behind = start_back(place)
            options = f"queues=1,queue_size={QUEUE},packed_vq={packed:d},mrg_rxbuf={merges:d}{more}"
            vdev = f"net_virtio_user0,path={directory / place}/sock,{options}"
            # Without this option EAL keeps its hands off AVX-512.
            before = start(f"front{number}", vdev, front, "--force-max-simd-bitwidth=512")
            self.peers[who] = before, behind
            lines += [before.command_line, behind.command_line]
        for pmd in (self._back, *(behind for _, behind in self.peers.values())):
            pmd.await_link()
        self.commands = tuple(" ".join(words).replace(str(directory), "DIR") for words in lines)

    def run_ours(self, name: str, direction: Direction, length: int, header: str) -> float:
        self._prepare(self._back, direction.back, length)
        self._ours.start(name, length, header_with_frame=header == WITH_FRAME)
        try:
            return self._measure(self._back, direction)
        finally:
            self._ours.stop()

    def run_peer(self, who: str, direction: Direction, length: int) -> float:
        before, behind = self.peers[who]
        self._prepare(behind, direction.back, length)
        self._prepare(before, direction.front, length)
        before.tell("start")
        try:
            return self._measure(behind, direction)
        finally:
            before.tell("stop")

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
