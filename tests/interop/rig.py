"""Our driver as a user starts it, beside DPDK as its device, and a client on its port.

    test ── pcap file ── testpmd ── net_vhost ═══ netbridge run --vhost-user ═══ port ── test

Frames are put in and taken out at either end, so every one can be compared byte for byte. DPDK forwards between its two
ports, a pcap file on one side and the vhost-user back-end on the other.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scapy.utils import PcapWriter, RawPcapReader

from netbridge import client
from tests.interop.testpmd import Testpmd

DEADLINE_S = 30.0
ETHERTYPE = 0x88B5  # for local experiments (IEEE 802)
_MANIFEST = """
vnode: {name: net-bridge, version: "0.1.0", mode: permissive}
runtime: {entrypoint: bin/net-bridge.vnode, required_mem_mb: 16, max_cpu_share: 1.0}
capabilities:
  - NetworkAccess
  - CAP_HARDWARE_IO_PCI: "0000:00:03.0"
  - CAP_IRQ_REGISTER: msix
  - CAP_DMA_ALLOC
  - CAP_MEM_SHARE
  - CAP_LOG_WRITE
"""


def frames(lengths: Iterable[int], seed: int) -> list[bytes]:
    """A frame of each length, unlike every other: its number is part of it, the rest is random."""
    source = random.Random(seed)
    head = bytes.fromhex("525400123456 5254000000fe") + ETHERTYPE.to_bytes(2, "big")
    return [
        head + seed.to_bytes(2, "big") + number.to_bytes(4, "big") + source.randbytes(length - 20)
        for number, length in enumerate(lengths)
    ]


def write_pcap(path: Path, contents: Sequence[bytes]) -> None:
    with PcapWriter(str(path), linktype=1) as writer:
        writer.write_header(None)
        for frame in contents:
            writer.write_packet(frame)


def read_pcap(path: Path) -> list[bytes]:
    with RawPcapReader(str(path)) as reader:
        return [bytes(frame) for frame, _ in reader]


class Driver:
    """`netbridge run --vhost-user`. `log` is what it logged, after `stop`."""

    def __init__(self, directory: Path, device: Path, *options: str, read_only: bool = False) -> None:
        manifest = directory / "vnode.yml"
        manifest.write_text(_MANIFEST.replace("CAP_MEM_SHARE", "CAP_MEM_SHARE: ro") if read_only else _MANIFEST)
        self.socket = directory / "port.sock"
        self.command_line = [sys.executable, "-m", "netbridge", "run", str(manifest), "--vhost-user", str(device)]
        self.command_line += ["--socket", str(self.socket), "--service-uid", str(os.getuid()), "--json", *options]
        self._errors = (directory / "driver.log").open("w+")
        self.process = subprocess.Popen(self.command_line, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        self.counters: dict[str, Any] = {}
        self.log = ""

    def connect(self) -> client.Client:
        return client.connect(self.socket, name="interop", timeout=DEADLINE_S, wait=DEADLINE_S)

    def stop(self) -> None:
        """An orderly end; `counters` and `log` are there afterwards. Fails the test when it did not end well."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=DEADLINE_S)
        self.log = self._read_log()
        assert self.process.returncode == 0, self.log
        self.counters = json.loads(out)

    def _read_log(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def sessions(self) -> list[dict[str, int]]:
        """Who owned how many buffers when each session ended."""
        found = []
        for line in self.log.splitlines():
            words = line.split()
            if len(words) > 2 and words[2] == "session_ended":
                found.append({key: int(value) for key, value in (word.split("=") for word in words[3:])})
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._errors.close()


@contextmanager
def driver(directory: Path, device: Path, *options: str, read_only: bool = False) -> Iterator[Driver]:
    """`read_only`: the manifest lets clients only read received frames."""
    it = Driver(directory, device, *options, read_only=read_only)
    try:
        yield it
    finally:
        it.close()


@contextmanager
def pcap_device(
    directory: Path, device: Path, incoming: Sequence[bytes], *others: Sequence[bytes]
) -> Iterator[Testpmd]:
    """testpmd with the vhost-user back-end at `device` as port 0, and on port 1 the frames `incoming`; what it gets
    from the driver goes to `out.pcap` in `directory`. Each of `others` comes on one more queue pair, and what is sent
    there goes to `out1.pcap` and so on. It forwards when it is told to `start`."""
    ways = []
    for number, contents in enumerate((incoming, *others)):
        suffix = str(number or "")
        write_pcap(directory / f"in{suffix}.pcap", contents)
        ways.append(f"rx_pcap=in{suffix}.pcap,tx_pcap=out{suffix}.pcap")
    vdevs = (f"net_vhost0,iface={device},queues={len(ways)}", f"net_pcap0,{','.join(ways)}")
    queues = (f"--rxq={len(ways)}", f"--txq={len(ways)}")
    # Without --no-flush-rx it throws away what waits on its ports when it starts.
    with Testpmd(directory, vdevs, "--no-flush-rx", *queues) as testpmd:
        # A full ring is waited for: nothing may be lost here.
        testpmd.tell("set fwd io retry")
        testpmd.tell("set burst tx delay 10 retry 60000")
        yield testpmd


def assert_same(seen: Sequence[bytes], expected: Sequence[bytes]) -> None:
    """The same frames in the same order. Says where they part, not all of them."""
    for number, (one, other) in enumerate(zip(seen, expected, strict=False)):
        assert one == other, f"frame {number} of {len(expected)}: {one.hex()} is not {other.hex()}"
    assert len(seen) == len(expected)


def receive(port: client.Client, count: int) -> list[bytes]:
    """So many frames, copied, in the order they came."""
    received: list[bytes] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(received) < count:
        left = deadline - time.monotonic()
        assert left > 0, f"{len(received)} of {count} frames came within {DEADLINE_S:g} s"
        for frame in port.receive(timeout=left):
            with frame:
                received.append(bytes(frame))
    return received
