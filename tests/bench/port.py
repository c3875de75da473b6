"""The port between two processes: frames a second, and how long a sleeper takes to wake.

Ours is the core's rings and ledger at the driver's end and the client library at the service's, both polling, without a
device. Beside it: DPDK's memif with a zero-copy client, which polls as well, and what the kernel has for a frame a
message: SOCK_SEQPACKET and a pipe. A frame goes one way, or comes back: forwarded as it is, or with its MAC addresses
exchanged, in place or in a copy. A wake-up is held against a bare eventfd.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests.bench import native
from tests.bench.contest import Contest, Unavailable
from tests.interop import testpmd
from tests.interop.testpmd import Testpmd

SUMMARY = "the port against memif, SOCK_SEQPACKET and a pipe; its wake-ups against a bare eventfd"
WINDOW_SECONDS, SETTLE_SECONDS = 0.4, 0.15
CORE = Path(__file__).parents[2] / "netbridge/datapath/core"
FLAGS = ("-march=x86-64", "-fno-strict-aliasing", f"-I{CORE}")
LENGTHS = (64, 1518)
MOST_SECONDS = 20.0


class Kind(NamedTuple):
    """What is done with frames. `ours`, `theirs`: as port_load calls it, for the port and for messages; `server`,
    `client`: memif's forwarding modes."""

    metric: str
    ours: str
    theirs: str
    server: str
    client: str


KINDS = (
    Kind("oneway", "oneway", "oneway", "txonly", "rxonly"),
    Kind("forwarded", "forward", "forward", "io", "io"),
    Kind("echo", "echo", "echo", "io", "macswap"),
    Kind("echo by copy", "copy", "echo", "io", "macswap"),
)
GOALS = {"DPDK memif": 1.0, "seqpacket": 20.0, "pipe": 20.0}


def contests(quick: bool) -> Iterator[Contest]:
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise Unavailable("driver and service want a processor each, and there is one")
    load = _Load(usable[0], usable[1])
    with ExitStack() as stack:
        memif = None
        why = testpmd.missing("net_memif", "bus_vdev", "mempool_ring")
        if not why:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netbridge-bench-")))
            memif = _Memif(directory, stack, usable[0], usable[1])
        for kind in KINDS:
            for length in LENGTHS[:1] if quick else LENGTHS:
                peers = {name: load.rate(name, kind.theirs, length) for name in ("seqpacket", "pipe")}
                if memif is not None:
                    peers["DPDK memif"] = functools.partial(memif.rate, kind, length)
                yield Contest(
                    bench="port",
                    metric=f"{kind.metric}, {length} B",
                    unit="Mpps",
                    ours=load.rate("port", kind.ours, length),
                    peers=peers,
                    goals={name: GOALS[name] for name in peers},
                    commands=(load.command("port", kind.ours, length), *(memif.commands if memif else ())),
                )
        for place, name in enumerate(("p50", "p99")):
            yield Contest(
                bench="port",
                metric=f"wake-up of a sleeper, {name}",
                unit="µs",
                ours=load.wake("port", place),
                peers={"eventfd": load.wake("eventfd", place)},
                better="lower",
                commands=(load.command("port", "wake", 64), load.command("eventfd", "wake", 64)),
            )
    if why:
        raise Unavailable(f"memif as a peer: {why}: tests/interop/host-dpdk installs it")


class _Load:
    """port_load.c."""

    def __init__(self, first: int, second: int) -> None:
        sources = [CORE / name for name in ("client.c", "ledger.c", "counting.c", "capture.c")]
        self._program = str(native.build("port_load", sources=sources, flags=FLAGS))
        self._processors = (str(first), str(second))

    def _words(self, what: str, kind: str, length: int) -> list[str]:
        milliseconds = round(1000 * WINDOW_SECONDS)
        return [self._program, what, kind, str(length), str(milliseconds), *self._processors]

    def command(self, what: str, kind: str, length: int) -> str:
        words = self._words(what, kind, length)
        return " ".join(["port_load", *words[1:]])

    def _run(self, what: str, kind: str, length: int) -> list[float]:
        words = self._words(what, kind, length)
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=MOST_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")
        return [float(word) for word in done.stdout.split()]

    def rate(self, what: str, kind: str, length: int) -> Callable[[], float]:
        return lambda: self._run(what, kind, length)[0]

    def wake(self, what: str, place: int) -> Callable[[], float]:
        return lambda: self._run(what, "wake", 64)[place] / 1000


class _Memif:
    """A memif server on one processor and a zero-copy client on the other; they stay connected, and poll only when they
    are measured."""

    def __init__(self, directory: Path, stack: ExitStack, first: int, second: int) -> None:
        self._ends = []
        for role, processor in (("server", first), ("client", second)):
            (directory / role).mkdir()
            vdev = f"net_memif0,role={role},id=0,socket={directory}/memif.sock,socket-abstract=no"
            if role == "client":
                vdev += ",zero-copy=yes"
            self._ends.append(
                stack.enter_context(
                    Testpmd(directory / role, [vdev], "--no-flush-rx", processor=processor, urgent=True)
                )
            )
        self._server, self._client = self._ends
        self._client.await_link()
        self.commands = tuple(" ".join(end.command_line).replace(str(directory), "DIR") for end in self._ends)

    def rate(self, kind: Kind, length: int) -> float:
        """Million frames a second, from the server to the client, or there and back."""
        self._client.tell(f"set fwd {kind.client}")
        self._server.tell(f"set fwd {kind.server}")
        self._server.tell(f"set txpkts {length}")
        self._client.tell("start")
        self._server.tell("start" if kind.server == "txonly" else "start tx_first 4")
        try:
            time.sleep(SETTLE_SECONDS)
            first, began = self._client.counts(0)["RX-packets"], time.monotonic()
            time.sleep(WINDOW_SECONDS)
            last, ended = self._client.counts(0)["RX-packets"], time.monotonic()
        finally:
            self._server.tell("stop")
            self._client.tell("stop")
        return (last - first) / (ended - began) / 1e6
