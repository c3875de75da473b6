"""What dies: the driver, the monitor. What is left: a quiet NIC, and frames again as soon as there is a driver."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable

import pytest

from qemu.guest import Guest
from qemu.guest_process import GuestProcess
from qemu.wire import Wire
from tests.e2e import testbed
from tests.e2e.hostile import MARK
from tests.e2e.load import Load
from tests.e2e.testbed import Testbed
from tests.e2e.traffic import SHORTEST, Generator, reflected

pytestmark = pytest.mark.thorough

BUS_MASTER = 0x04


def echoed(wire: Wire, bed: Testbed, count: int = 64) -> None:
    wire.exchange(Generator(bed.mac).udp(count), reply=reflected, window=32, timeout=10.0).check()


def command_register(guest: Guest, pci: str) -> int:
    script = f"open('/sys/bus/pci/devices/{pci}/config', 'rb').read(6)[4:].hex()"
    return int.from_bytes(bytes.fromhex(guest.eval(script)), "little")


STAGES = ("driver_died", "driver_restarts", "claimed", "prepared", "up", "serving")


def kill_under_load(wire: Wire, bed: Testbed, load: Load) -> dict[str, float]:
    """Kills the driver with frames on their way. When what came to pass, in seconds: the guest's stages since the death
    was seen, and `frames`, on the host, from the kill to the first answer of the next driver."""
    load.wait_for_answers(128)
    first = bed.driver_pid
    began = time.monotonic()
    bed.guest.run(["kill", "-KILL", str(first)])
    testbed.wait_for_line(bed.driver, r" driver_died .*SIGKILL")
    # What it had echoed is here by now: whatever comes from here on is the next one's.
    load.wait_for_answers(1)
    frames = time.monotonic() - began
    testbed.wait_for_line(bed.driver, r" serving ")
    assert bed.driver_pid != first
    log = bed.driver.stderr
    moments = {name: float(re.findall(rf"^netbridge: (\S+) {name} ", log, re.MULTILINE)[-1]) for name in STAGES}
    return {name: moment - moments["driver_died"] for name, moment in moments.items()} | {"frames": frames}


def test_a_killed_driver_is_restarted_and_the_client_reconnects(
    guest: Guest, wire: Wire, record_property: Callable[[str, object], None]
) -> None:
    """Twice: at once, when another process has to be started, and when one stands by."""
    with testbed.running(guest) as bed:
        echoed(wire, bed)
        with Load(wire, bed.mac) as load:
            restarts = {"cold": kill_under_load(wire, bed, load)}
            standby = int(testbed.wait_for_line(bed.driver, r" standby driver=(\d+)")[1])
            restarts["standby"] = kill_under_load(wire, bed, load)
        assert bed.driver_pid == standby
        # Frames that were on their way, and answers to them, are none of the account that follows.
        bed.settle(wire)
        before = bed.counters()
        sent, received = wire.sent, wire.received
        echoed(wire, bed, 256)
        assert not wire.drain()
        after = bed.counters()
        moved = {name: after[name] - before[name] for name in ("packets_rx", "packets_tx")}
        assert moved == {"packets_rx": wire.sent - sent, "packets_tx": wire.received - received}
        assert moved == {"packets_rx": 256, "packets_tx": 256}
        assert after["sessions"] == 3, "counters outlive the driver"
        assert bed.echo.running, "the same service, connected again"
        for name, stages in restarts.items():
            record_property(f"restart_{name}", {stage: round(seconds, 3) for stage, seconds in stages.items()})
            told = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stages.items())
            print(f"driver killed, {name} restart under {guest.machine.accel}: {told}")
        slow = {"cold": 2.0, "standby": 1.0}
        if guest.machine.accel == "kvm":
            assert all(restarts[name]["serving"] < seconds for name, seconds in slow.items())
        bed.stop()
    assert testbed.nics(guest)[0] == (bed.pci, "virtio-pci")
    assert not guest.iommu_faults()


def test_a_process_that_stands_by_has_no_device_and_is_confined(guest: Guest, wire: Wire) -> None:
    """And when it dies, the driver goes on; and when the monitor does, it leaves."""
    with testbed.running(guest) as bed:
        standby = testbed.wait_for_line(bed.driver, r" standby driver=(\d+)")[1]
        status = guest.run(["cat", f"/proc/{standby}/status"]).stdout
        for line in ("Seccomp:\t2", "NoNewPrivs:\t1", "CapBnd:\t0000000000000000"):
            assert line in status
        files = guest.run(["ls", "-l", f"/proc/{standby}/fd"]).stdout
        assert "vfio" not in files
        assert ".counters" not in files
        slot = guest.run(["cat", f"/proc/{standby}/cgroup"]).stdout.strip().split(":", 2)[2]
        assert guest.run(["cat", f"/sys/fs/cgroup{slot}/memory.max"]).stdout.strip() == str(16 << 20)
        guest.run(["kill", "-KILL", standby])
        testbed.wait_for_line(bed.driver, rf" standby_died driver={standby} .*SIGKILL")
        echoed(wire, bed)
        guest.run(["kill", "-KILL", str(bed.driver_pid)])
        testbed.wait_for_line(bed.driver, r" serving ")
        again = testbed.wait_for_line(bed.driver, r" standby driver=(\d+)")[1]
        bed.driver.kill()
        bed.driver.wait()
        testbed.wait_until_driver_is_gone(guest)
        assert guest.run(["test", "-e", f"/proc/{again}"], check=False).returncode == 1
        guest.run(testbed.netbridge("restore"))
        testbed.end(bed.echo)
    assert testbed.nics(guest)[0] == (bed.pci, "virtio-pci")


def hostile(guest: Guest, what: str, count: int) -> GuestProcess:
    command = ["python3", "-m", "tests.e2e.hostile", what, str(count)]
    return guest.start(command, user=testbed.SERVICE_USER, stdin=True)


def test_what_a_killed_service_kept_shows_no_later_frame(guest: Guest, wire: Wire) -> None:
    """Killed with frames and buffers in its hands, and its memory is still mapped by another process."""
    with testbed.running(guest) as bed:
        testbed.end(bed.echo)
        with hostile(guest, "linger", 50) as keeper:
            testbed.wait_for_line(bed.driver, r" serving .*client=lingerer")
            for frame in Generator(bed.mac).udp(50):
                wire.send(frame, timeout=testbed.START_SECONDS)
            testbed.wait_for_line(keeper, "killed")
            ended = testbed.wait_for_line(bed.driver, r"( session_ended .*)")[1]
            owned = {name: int(count) for name, count in re.findall(r"(\w+_\w+)=(\d+)\b", ended)}
            assert owned["rx_client"] == 50
            assert owned["rx_driver"] + owned["rx_device"] == 1024 - 50
            assert (owned["tx_driver"], owned["tx_device"], owned["tx_client"]) == (0, 0, 512)
            keeper.write(b"look\n")
            first = testbed.wait_for_line(keeper, r"kept (\w+) False")[1]

            bed.echo = testbed.start_echo(guest, bed.echo_log)
            testbed.wait_for_line(bed.driver, r" serving .*client=netbridge-echo")
            bed.settle(wire)
            before = bed.counters()
            frames = tuple(frame[:SHORTEST] + MARK for frame in Generator(bed.mac).udp(256))
            wire.exchange(frames, reply=reflected, window=32, timeout=30.0).check()
            after = bed.counters()
            for name in ("packets_rx", "packets_tx"):
                assert after[name] - before[name] == 256, name
            keeper.write(b"look\n")
            assert testbed.wait_for_line(keeper, r"kept (\w+) False")[1] == first, "not a byte of it has changed"
            keeper.close_stdin()
            assert keeper.wait(testbed.STOP_SECONDS) == 0
        bed.stop()
    assert not guest.iommu_faults()


def test_a_client_that_stops_reading_costs_drops_under_its_name(guest: Guest, wire: Wire) -> None:
    """And nothing else: the device goes on receiving, and every frame is either delivered or counted."""
    count = 2000
    with testbed.running(guest) as bed:
        testbed.end(bed.echo)
        before = bed.counters()
        with hostile(guest, "stall", 0) as staller:
            limit = int(testbed.wait_for_line(staller, r"may hold (\d+)")[1])
            testbed.wait_for_line(bed.driver, r" serving .*client=staller")
            for frame in Generator(bed.mac).udp(count):
                wire.send(frame, timeout=testbed.START_SECONDS)
            deadline = time.monotonic() + testbed.START_SECONDS
            while True:
                after = bed.counters()
                received = after["packets_rx"] - before["packets_rx"]
                dropped = after["drops"]["client_slow"] - before["drops"]["client_slow"]
                if received >= count:
                    break
                assert time.monotonic() < deadline, f"{received} of {count} frames received"
            assert (received, dropped) == (count, count - limit)
            assert after["clients"]["staller"]["client_slow"] == dropped
            staller.write(b"\n")
            testbed.wait_for_line(staller, rf"done: {limit} frames")
            assert staller.wait(testbed.STOP_SECONDS) == 0
        bed.echo = testbed.start_echo(guest, bed.echo_log)
        testbed.wait_for_line(bed.driver, r" serving .*client=netbridge-echo")
        bed.settle(wire)
        echoed(wire, bed)
        bed.stop()


def test_between_two_drivers_the_nic_is_quiet(guest: Guest, wire: Wire) -> None:
    """Killed again and again, so that the pause grows and there is time to look."""
    with testbed.running(guest) as bed:
        pauses = []
        for _ in range(4):
            guest.run(["kill", "-KILL", str(bed.driver_pid)])
            pauses.append(float(testbed.wait_for_line(bed.driver, r" driver_restarts pause=(\S+)")[1]))
            if pauses[-1] >= 0.8:
                assert not command_register(guest, bed.pci) & BUS_MASTER
            testbed.wait_for_line(bed.driver, r" serving ")
        assert pauses == [0.1, 0.2, 0.4, 0.8]
        bed.settle(wire)
        echoed(wire, bed)
        bed.stop()
    assert not guest.iommu_faults()


def test_a_killed_monitor_leaves_a_quiet_nic_and_the_next_start_repairs(guest: Guest, wire: Wire) -> None:
    with testbed.running(guest) as bed:
        echoed(wire, bed)
        orphan = bed.driver_pid
        bed.driver.kill()
        bed.driver.wait()
        testbed.wait_until_driver_is_gone(guest)
        assert guest.run(["test", "-e", f"/proc/{orphan}"], check=False).returncode == 1
        assert not command_register(guest, bed.pci) & BUS_MASTER
        assert testbed.nics(guest)[0] == (bed.pci, "vfio-pci")
        assert bed.echo.running, "it was told that the driver comes back"
        with guest.start(testbed.netbridge("run", testbed.MANIFEST, "--json")) as again:
            testbed.wait_for_line(again, r" serving .*\bclient=netbridge-echo\b")
            bed.driver = again
            bed.settle(wire)
            echoed(wire, bed)
            bed.stop()
    assert testbed.nics(guest)[0] == (bed.pci, "virtio-pci"), "whose driver it was before all this"
    assert not guest.iommu_faults()


def test_the_next_start_waits_for_an_orphan(guest: Guest, wire: Wire) -> None:
    """No pause between the monitor's death and the next start, as a service manager would have it."""
    with testbed.running(guest) as bed:
        bed.echo.kill()
        bed.driver.kill()
        bed.driver.wait()
        with testbed.running(guest) as again:
            wire.drain()
            echoed(wire, again)
            again.stop()


def test_a_driver_that_does_not_stop_is_ended(guest: Guest) -> None:
    with testbed.running(guest) as bed:
        guest.run(["kill", "-STOP", str(bed.driver_pid)])
        bed.driver.kill(signal.SIGTERM)
        testbed.wait_for_line(bed.driver, r" driver_killed ")
        assert bed.driver.wait(testbed.STOP_SECONDS) == 0
        testbed.end(bed.echo)
    assert testbed.nics(guest)[0] == (bed.pci, "virtio-pci")


def test_ctrl_c_is_for_the_monitor(guest: Guest) -> None:
    with testbed.running(guest) as bed:
        bed.driver.kill(signal.SIGINT)
        assert bed.driver.wait(testbed.STOP_SECONDS) == 130
        assert "driver_died" not in bed.driver.stderr
        testbed.end(bed.echo)
    assert testbed.nics(guest)[0] == (bed.pci, "virtio-pci")
