"""Every frame between DPDK and the port, both ways, byte for byte, in order, and not one more."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from netbridge.client import Frame, PortClosed, Reason
from netbridge.virtio import features
from tests.interop import rig
from tests.interop.testpmd import Testpmd

SHORTEST, LONGEST = 60, 1514
LONGEST_MERGED = 9014  # as long as a jumbo frame gets; it spans five buffers
# One more than a queue holds several times over, less than what the driver may hold back for the client.
COUNT = 700
RX_BUFFERS, TX_BUFFERS = 1024, 512  # as many as the driver has unless it is told


@pytest.fixture(params=["split", "packed"])
def ring(request: pytest.FixtureRequest) -> str:
    if request.param == "packed" and features.feature("RING_PACKED") not in features.SUPPORTED:
        pytest.skip("this driver has no packed rings")
    return str(request.param)


@pytest.fixture(params=["mrg", "no-mrg"])
def merges(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "mrg")


def without(ring: str, merges: bool) -> list[str]:
    """The options that leave just these features."""
    off = [] if merges else ["MRG_RXBUF"]
    if ring == "split" and features.feature("RING_PACKED") in features.SUPPORTED:
        off.append("RING_PACKED")
    return [word for name in off for word in ("--without", name)]


def lengths(count: int, longest: int = LONGEST) -> list[int]:
    """Every length there is comes before any comes twice; the extremes first."""
    step = (longest - SHORTEST) / max(count - 1, 1)
    return [SHORTEST, longest, *(SHORTEST + round(i * step) for i in range(count - 2))]


def test_both_ways_at_once(tmp_path: Path, ring: str, merges: bool) -> None:
    device = tmp_path / "nic"
    incoming = rig.frames(lengths(COUNT), seed=1)
    outgoing = rig.frames(lengths(COUNT), seed=2)
    options = without(ring, merges)
    with (
        rig.pcap_device(tmp_path, device, incoming) as testpmd,
        rig.driver(tmp_path, device, *options) as driver,
        driver.connect() as port,
    ):
        testpmd.await_link()
        testpmd.tell("start")
        for frame in outgoing:
            port.send_bytes(frame, timeout=rig.DEADLINE_S)
        rig.assert_same(rig.receive(port, COUNT), incoming)
        testpmd.await_count(0, "RX-packets", COUNT)
        testpmd.await_count(1, "TX-packets", COUNT)
        testpmd.tell("stop")
        assert port.receive(timeout=0) == []
        counts = testpmd.counts(0)
        port.close()
        driver.stop()
        testpmd.quit()
    rig.assert_same(rig.read_pcap(tmp_path / "out.pcap"), outgoing)
    assert (counts["RX-packets"], counts["TX-packets"]) == (COUNT, COUNT)
    assert (counts["RX-errors"], counts["TX-errors"]) == (0, 0)
    assert_ledger(driver, incoming, outgoing)


def assert_ledger(
    driver: rig.Driver, received: Sequence[bytes], sent: Sequence[bytes], rx_buffers: int = RX_BUFFERS
) -> None:
    """Device, driver and client agree on how many frames and bytes there were, and where every buffer is."""
    counters = driver.counters
    assert (counters["packets_rx"], counters["bytes_rx"]) == (len(received), sum(map(len, received)))
    assert (counters["packets_tx"], counters["bytes_tx"]) == (len(sent), sum(map(len, sent)))
    for refused in ("drops", "refused_handles", "device_faults"):
        assert not any(counters[refused].values()), (refused, counters[refused])
    assert_all_buffers(driver, rx_buffers)


def assert_all_buffers(driver: rig.Driver, rx_buffers: int = RX_BUFFERS) -> None:
    assert driver.sessions(), driver.log
    for session in driver.sessions():
        for region, buffers in (("rx", rx_buffers), ("tx", TX_BUFFERS)):
            assert sum(session[f"{region}_{owner}"] for owner in ("driver", "device", "client")) == buffers


def take(frames: Sequence[Frame], received: Sequence[list[bytes]]) -> None:
    """Copies each to the list of the queue pair that it came on, and gives it back."""
    for frame in frames:
        with frame:
            received[frame.queue].append(bytes(frame))


def test_forwarded_from_where_they_came(tmp_path: Path, ring: str) -> None:
    """Short ones, which the driver copies, among long ones, which the device reads where it has written them."""
    device = tmp_path / "nic"
    incoming = rig.frames(lengths(COUNT), seed=9)
    with (
        rig.pcap_device(tmp_path, device, incoming) as testpmd,
        rig.driver(tmp_path, device, *without(ring, merges=True)) as driver,
        driver.connect() as port,
    ):
        testpmd.await_link()
        testpmd.tell("start")
        count = 0
        while count < COUNT:
            frames = port.receive(timeout=rig.DEADLINE_S)
            assert frames, f"{count} of {COUNT} frames came"
            port.forward(frames)
            count += len(frames)
        testpmd.await_count(1, "TX-packets", COUNT)
        testpmd.tell("stop")
        port.close()
        driver.stop()
        testpmd.quit()
    rig.assert_same(rig.read_pcap(tmp_path / "out.pcap"), incoming)
    assert_ledger(driver, incoming, incoming)


def test_two_queue_pairs(tmp_path: Path, ring: str) -> None:
    """What comes on a pair, came on it at the other end, in order; and what is sent on it."""
    device = tmp_path / "nic"
    incoming = [rig.frames(lengths(COUNT // 2), seed=seed) for seed in (5, 6)]
    outgoing = [rig.frames(lengths(COUNT // 2), seed=seed) for seed in (7, 8)]
    # DPDK delivers all of it at once, and twice as many queues hold back twice as many buffers.
    options = ("--queue-pairs", "2", "--rx-buffers", "2048")
    with (
        rig.pcap_device(tmp_path, device, *incoming) as testpmd,
        rig.driver(tmp_path, device, *options, *without(ring, merges=True)) as driver,
        driver.connect() as port,
    ):
        assert port.queue_pairs == 2
        testpmd.await_link()
        testpmd.tell("start")
        for pair in zip(*outgoing, strict=True):
            for queue, frame in enumerate(pair):
                port.send_bytes(frame, timeout=rig.DEADLINE_S, queue=queue)
        received: list[list[bytes]] = [[], []]
        while sum(map(len, received)) < COUNT:
            more = port.receive(timeout=rig.DEADLINE_S)
            assert more, f"{sum(map(len, received))} of {COUNT} frames came"
            take(more, received)
        for queue in (0, 1):
            rig.assert_same(received[queue], incoming[queue])
        testpmd.await_count(1, "TX-packets", COUNT)
        testpmd.tell("stop")
        port.close()
        driver.stop()
        testpmd.quit()
    for queue, name in enumerate(("out.pcap", "out1.pcap")):
        rig.assert_same(rig.read_pcap(tmp_path / name), outgoing[queue])
    assert_ledger(driver, [*incoming[0], *incoming[1]], [*outgoing[0], *outgoing[1]], rx_buffers=2048)


def test_frames_longer_than_a_buffer(tmp_path: Path, ring: str) -> None:
    device = tmp_path / "nic"
    incoming = rig.frames(lengths(100, LONGEST_MERGED), seed=3)
    with (
        rig.pcap_device(tmp_path, device, incoming) as testpmd,
        rig.driver(tmp_path, device, *without(ring, merges=True)) as driver,
        driver.connect() as port,
    ):
        testpmd.await_link()
        testpmd.tell("start")
        rig.assert_same(rig.receive(port, len(incoming)), incoming)
        port.close()
        driver.stop()
    assert_ledger(driver, incoming, [])


def test_echo_service(tmp_path: Path, ring: str, merges: bool) -> None:
    device = tmp_path / "nic"
    incoming = rig.frames(lengths(COUNT), seed=4)
    with (
        rig.pcap_device(tmp_path, device, incoming) as testpmd,
        rig.driver(tmp_path, device, *without(ring, merges)) as driver,
        echo(driver),
    ):
        testpmd.await_link()
        testpmd.tell("start")
        testpmd.await_count(1, "TX-packets", COUNT)
        testpmd.tell("stop")
        driver.stop()
        testpmd.quit()
    exchanged = [frame[6:12] + frame[:6] + frame[12:] for frame in incoming]
    rig.assert_same(rig.read_pcap(tmp_path / "out.pcap"), exchanged)
    assert_ledger(driver, incoming, exchanged)


def test_one_client_after_another_that_may_only_read(tmp_path: Path) -> None:
    """The back-end maps the memory anew whenever it changes, and the client's seal forbids that for what it covers."""
    device = tmp_path / "nic"
    incoming = rig.frames(lengths(50), seed=9)
    with rig.pcap_device(tmp_path, device, incoming) as testpmd, rig.driver(tmp_path, device, read_only=True) as driver:
        for _ in range(3):
            with driver.connect():
                testpmd.await_link()
        with driver.connect() as port:
            testpmd.await_link()
            testpmd.tell("start")
            rig.assert_same(rig.receive(port, len(incoming)), incoming)
        driver.stop()
    assert driver.log.count("back_end_found") == 1, "no client cost us the back-end"
    assert_ledger(driver, incoming, [])


class echo:  # noqa: N801 - used as a function
    """The reference service on the driver's port, as a process of its own."""

    def __init__(self, driver: rig.Driver) -> None:
        self._command = [
            sys.executable,
            "-m",
            "netbridge.services.echo",
            "--socket",
            str(driver.socket),
            "--wait",
            "60",
        ]

    def __enter__(self) -> echo:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=rig.DEADLINE_S)


def kill(testpmd: Testpmd, device: Path) -> None:
    """SIGKILL. DPDK does not listen where a dead one left its socket."""
    testpmd.kill()
    device.unlink()


def test_back_end_is_killed_and_another_comes(tmp_path: Path) -> None:
    device = tmp_path / "nic"
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    incoming = rig.frames(lengths(200), seed=5), rig.frames(lengths(300), seed=6)
    outgoing = rig.frames(lengths(150), seed=7), rig.frames(lengths(250), seed=8)
    with rig.driver(tmp_path, device) as driver:
        for turn, directory in enumerate((first, second)):
            with rig.pcap_device(directory, device, incoming[turn]) as testpmd:
                with driver.connect() as port:
                    testpmd.await_link()
                    testpmd.tell("start")
                    for frame in outgoing[turn]:
                        port.send_bytes(frame, timeout=rig.DEADLINE_S)
                    rig.assert_same(rig.receive(port, len(incoming[turn])), incoming[turn])
                    testpmd.await_count(0, "RX-packets", len(outgoing[turn]))
                    kill(testpmd, device)
                    with pytest.raises(PortClosed) as closed:
                        port.receive(timeout=rig.DEADLINE_S)
                    assert closed.value.reason is Reason.DEVICE_RESET
        driver.stop()
    assert driver.counters["sessions"] == 2
    assert_ledger(driver, incoming[0] + incoming[1], outgoing[0] + outgoing[1])


def test_back_end_is_killed_while_frames_flow(tmp_path: Path) -> None:
    device = tmp_path / "nic"
    with rig.driver(tmp_path, device) as driver, echo(driver):
        for turn in range(3):
            directory = tmp_path / str(turn)
            directory.mkdir()
            with Testpmd(directory, [f"net_vhost0,iface={device}"]) as testpmd:
                testpmd.await_link()
                testpmd.tell("start tx_first")
                testpmd.await_count(0, "RX-packets", 5000)
                kill(testpmd, device)
        driver.stop()
    assert driver.counters["sessions"] == 3
    # What was sent back was received before, one for one, but for what was on its way at each death.
    assert 0 <= driver.counters["packets_rx"] - driver.counters["packets_tx"] <= 3 * 512
    assert not any(driver.counters["device_faults"].values())
    assert_all_buffers(driver)
