"""The harness itself on real guests: what it does with one that is well, and that it tells quickly when one is not."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scapy.layers.l2 import ARP, Ether
from scapy.utils import PcapNgReader

from qemu.completed import CommandTimedOut
from qemu.dimensions import UNSAFE_INTERRUPTS
from qemu.errors import GuestLost
from qemu.guest import Guest, Nic
from qemu.remote import RemoteTests
from qemu.session import Session
from qemu.wire import Wire
from tests.e2e.patience import ROOT, alive, patience

HOST = "02:00:00:00:00:01"


# A guest that is well


def test_it_is_what_was_asked_for(guest: Guest) -> None:
    assert guest.accel.name in ("kvm", "tcg")
    assert guest.accel.reason
    assert guest.boot_seconds > 0
    assert guest.run(["uname", "-m"]).stdout == "x86_64\n"
    groups = guest.run(["ls", "/sys/kernel/iommu_groups"]).stdout.split()
    assert groups, "no IOMMU groups: the IOMMU is not in use"
    nic = guest.run(["cat", "/sys/bus/pci/devices/0000:01:00.0/device"]).stdout.strip()
    assert nic == "0x1041"
    assert guest.run(["ls", "/sys/bus/pci/devices/0000:01:00.0/iommu_group/devices"]).stdout.split()
    assert guest.iommu_faults() == []
    assert guest.kernel_trouble() == []


def test_commands_files_and_python(guest: Guest) -> None:
    data = os.urandom(300_000)
    guest.put(data, "/tmp/some/where", mode=0o600)
    assert guest.get("/tmp/some/where") == data
    assert guest.run(["id", "-un"], user="nobody", cwd="/").stdout == "nobody\n"
    assert guest.eval("import os; os.getuid()") == 0
    with guest.start(["sh", "-c", "echo ready; sleep 100"]) as process:
        process.wait_for_line("ready")
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(CommandTimedOut, match=r"`sleep 99` has not ended within 0\.2 s and was killed"):
        guest.run(["sleep", "99"], timeout=0.2)
    assert not guest.run(["pidof", "sleep"], check=False).stdout


def test_several_commands_and_files_at_once(guest: Guest, tmp_path: Path) -> None:
    """Each has its own output, whole and in order, whatever the others do meanwhile."""
    script = "for n in $(seq 200); do echo out $0 $n; echo err $0 $n >&2; done; exit $0"
    data = os.urandom(1 << 20)
    started = [guest.start(["sh", "-c", script, str(number)]) for number in range(16)]
    with ThreadPoolExecutor(4) as pool:
        copies = [pool.submit(guest.put, data, f"/tmp/copy-{number}") for number in range(4)]
        answers = [guest.eval(f"{number} * 2") for number in range(100)]
        for copy in copies:
            copy.result(60)
        back = [*pool.map(lambda number: guest.get(f"/tmp/copy-{number}"), range(4))]
    assert answers == [number * 2 for number in range(100)]
    assert back == [data] * 4
    for number, process in enumerate(started):
        assert process.wait(60) == number
        for stream, said in (("out", process.stdout), ("err", process.stderr)):
            assert said.splitlines() == [f"{stream} {number} {n}" for n in range(1, 201)]


def test_a_flood_of_output_holds_nothing_up(guest: Guest, artefacts: Path) -> None:
    with guest.start(["yes", "x" * 1000], log=artefacts / "flood.log", keep=1 << 20) as flood:
        while flood.dropped() < 16 << 20:
            assert guest.agent.ping() < 5
            assert guest.run(["echo", "alive"]).stdout == "alive\n"
    assert (artefacts / "flood.log").stat().st_size >= 16 << 20
    (artefacts / "flood.log").unlink()


def test_a_flood_of_the_console_holds_nothing_up(guest: Guest) -> None:
    before = guest._console.size
    with guest.start(["sh", "-c", "yes the console is flooded >/dev/ttyS0"]):
        deadline = time.monotonic() + patience(60)
        while guest._console.size < before + 200_000:
            assert time.monotonic() < deadline
            assert guest.run(["echo", "alive"]).stdout == "alive\n"
    assert "the console is flooded" in guest.console_tail()
    assert len(guest.console_tail(5).splitlines()) == 5


def test_frames_go_through_the_guests_own_driver(guest: Guest, wire: Wire) -> None:
    interface = guest.run(["sh", "-c", "ls /sys/bus/pci/devices/0000:01:00.0/virtio*/net"]).stdout.strip()
    guest.run(["ip", "addr", "add", "10.9.8.1/24", "dev", interface])
    guest.bring_up(interface)
    try:
        request = Ether(dst="ff:ff:ff:ff:ff:ff", src=HOST) / ARP(pdst="10.9.8.1", psrc="10.9.8.2", hwsrc=HOST)
        answer = wire.sr1(request, timeout=10, verbose=False)
        assert answer is not None
        assert answer[ARP].hwsrc == guest.machine.nics[0].mac
    finally:
        guest.run(["sh", "-c", f"ip link set {interface} down && ip addr flush dev {interface}"])


def test_pausing_is_no_failure(guest: Guest) -> None:
    guest.qmp("stop")
    assert guest.qmp("query-status")["status"] == "paused"
    with pytest.raises(GuestLost, match=r"ping: the guest's agent has not answered within 0\.3 s"):
        guest.agent.ping(timeout=0.3)
    guest.qmp("cont")
    assert guest.agent.ping() < 5
    assert guest.lost is None


def test_tests_run_in_the_guest_one_by_one(guest: Guest, artefacts: Path) -> None:
    source = """
import os, sys, time, pytest
made = []
@pytest.fixture(scope="module")
def shared():
    made.append(1)
    yield
    print("torn down")
def test_good(shared): print("printed")
def test_bad(shared): assert [1, 2] == [1, 3]
@pytest.mark.skipif(True, reason="not here")
def test_skipped(): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert 0
@pytest.mark.parametrize("n", ["a b", "ü"])
def test_param(n, shared): assert made == [1]
def test_dies(): os.abort()
def test_hangs(): time.sleep(1000)
def test_after(): pass
"""
    guest.put(source.encode(), "/run/remote/test_some.py")
    remote = RemoteTests(guest, ["/run/remote"], root="/run/remote", log=artefacts / "guest-pytest.log")

    def run(name: str, following: str | None = None, timeout: float = 60.0) -> list[tuple[str, str]]:
        after = None if following is None else f"test_some.py::{following}"
        run.reports = remote.run(f"test_some.py::{name}", after, timeout)  # type: ignore[attr-defined]
        return [(report.when, report.outcome) for report in run.reports]  # type: ignore[attr-defined]

    def last() -> str:
        return str(run.reports[-1].longrepr)  # type: ignore[attr-defined]

    passed = [("setup", "passed"), ("call", "passed"), ("teardown", "passed")]
    assert run("test_good", "test_bad") == passed
    assert ("Captured stdout call", "printed\n") in run.reports[1].sections  # type: ignore[attr-defined]
    assert run("test_bad", "test_param[a b]")[1] == ("call", "failed")
    assert "assert [1, 2] == [1, 3]" in run.reports[1].longrepr  # type: ignore[attr-defined]
    assert run("test_skipped")[0] == ("setup", "skipped")
    assert run.reports[0].longrepr[2] == "Skipped: not here"  # type: ignore[attr-defined]
    assert run("test_known")[1] == ("call", "skipped")
    assert run.reports[1].wasxfail == "known"  # type: ignore[attr-defined]
    assert run("test_none") == [("setup", "failed")]
    assert "did not collect" in last()
    assert run("test_dies")[-1] == ("call", "failed")
    assert "exit code -6" in last()
    assert "os.abort" in last() or "test_dies" in last()
    assert run("test_hangs", timeout=3.0)[-1] == ("call", "failed")
    assert "not done in the guest within 3 s" in last()
    assert "in test_hangs" in last()
    assert run("test_after") == passed
    remote.close()


def test_what_is_kept(guests: Session, tmp_path: Path) -> None:
    with guests.boot("kept", nics=[Nic()], accel="tcg") as guest:
        guest.wire.send(b"\xff" * 60)
        guest.run(["true"])
        kept = guest.artefacts
        pid = guest._process.pid
    assert pid is not None
    assert not alive(pid)
    assert "Linux version" in (kept / "dmesg.log").read_text()
    assert '"qmp_capabilities"' in (kept / "qmp.log").read_text()
    assert (kept / "console.log").exists()
    script = kept / "qemu.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    subprocess.run(["sh", "-n", str(script)], check=True)
    with PcapNgReader(str(kept / "wire.pcap")) as reader:
        assert bytes(next(iter(reader))) == b"\xff" * 60
    # The same guest, alone, its console on the terminal; with an init that is not there, as it would not end by itself.
    again = subprocess.Popen(
        [str(script), "-append", "console=ttyS0 panic=-1 rdinit=/nonexistent"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = again.communicate(timeout=120)
    assert "Kernel panic" in output


SHED_AND_ABORT = "import os; os.setgid(65534); os.setuid(65534); os.abort()"


def test_a_core_is_kept(guests: Session) -> None:
    """Of a process that may leave none, and has another identity than it began with."""
    with guests.boot("core", nics=[Nic()]) as guest:
        ended = guest.run(["sh", "-c", f"ulimit -c 0; exec python3 -c '{SHED_AND_ABORT}'"], check=False)
        assert ended.returncode == -signal.SIGABRT
        guest.run(["python3", "-c", "import os; os.kill(os.getpid(), 31)"], check=False)  # a filter: not kept
        kept = guest.artefacts / "cores"
    (core,) = kept.iterdir()
    assert re.fullmatch(r"python3[0-9.]*\.[0-9]+\.6\.core", core.name)
    head = core.read_bytes()[:18]
    assert head[:4] == b"\x7fELF"
    assert head[16] == 4  # ET_CORE (elf.h)


# The shell


def test_a_command_by_way_of_the_shell(artefacts: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "qemu.shell", "--accel", "tcg", "--artefacts", str(artefacts)),
            *("--", "sh", "-c", "read word; echo $word; echo sorry >&2; exit 7"),
        ],
        cwd=ROOT,
        input="spoken\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.stdout, done.returncode) == ("spoken\n", 7)
    assert done.stderr.endswith("sorry\n")


class Terminal:
    """A terminal with a program on it, played by the test; closed whatever comes of that."""

    def __init__(self, request: pytest.FixtureRequest, argv: Sequence[str]):
        self.ours, self.theirs = os.openpty()
        for end in (self.ours, self.theirs):
            request.addfinalizer(functools.partial(os.close, end))
        self.resize(33, 99)
        self.before = termios.tcgetattr(self.theirs)
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), self.theirs)
        self.program = subprocess.Popen(argv, cwd=ROOT, start_new_session=True, **ends)  # type: ignore[call-overload]
        request.addfinalizer(self.program.kill)
        self._screen = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.ours, text)

    def expect(self, wanted: bytes) -> bytes:
        """Everything up to this, which has to come."""
        deadline = time.monotonic() + patience(100)
        while wanted not in self._screen:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} did not come: {self._screen!r}"
            self._screen += os.read(self.ours, 65536)
        before, _, self._screen = self._screen.partition(wanted)
        return before


def test_the_shell_on_a_terminal(artefacts: Path, request: pytest.FixtureRequest) -> None:
    argv = [sys.executable, "-m", "qemu.shell", "--accel", "tcg", "--artefacts", str(artefacts)]
    terminal = Terminal(request, argv)
    terminal.expect(b"leaves it")
    terminal.expect(b"# ")
    terminal.type(b"stty size; echo a$((1 + 1))b\r")
    terminal.expect(b"33 99")
    terminal.expect(b"a2b")
    terminal.resize(44, 88)
    os.kill(terminal.program.pid, signal.SIGWINCH)
    # By the time it speaks it is in the foreground: Ctrl-C between two commands would reach neither.
    terminal.type(b"sh -c 'echo r$((1 + 2))n; exec sleep 1000'\r")
    terminal.expect(b"r3n")
    terminal.type(b"\x03")
    terminal.expect(b"# ")
    terminal.type(b"echo c$((2 + 2))d; stty size\r")
    terminal.expect(b"c4d")
    terminal.expect(b"44 88")
    assert termios.tcgetattr(terminal.theirs) != terminal.before
    terminal.type(b"\x1d")
    assert terminal.program.wait(patience(30)) == 0
    assert termios.tcgetattr(terminal.theirs) == terminal.before


FAILING = """
def test_that_fails(guest):
    guest.put(b"as it was", "/tmp/left")
    assert 1 == 2
"""


def test_a_shell_at_the_moment_of_failure(artefacts: Path, request: pytest.FixtureRequest) -> None:
    test = artefacts / "test_failing.py"
    test.write_text(FAILING)
    argv = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(test)]
    argv += ["--shell-on-fail", "--accel", "tcg", "--artefacts", str(artefacts / "inner"), "-p", "no:cacheprovider"]
    terminal = Terminal(request, argv)
    terminal.expect(b"has failed; this is its guest as it is now")
    terminal.expect(b"# ")
    terminal.type(b"echo $(cat /tmp/left) $((40 + 2))\r")
    terminal.expect(b"as it was 42")
    assert termios.tcgetattr(terminal.theirs) != terminal.before
    terminal.type(b"exit\r")
    terminal.expect(b"1 failed")
    assert terminal.program.wait(patience(30)) == 1
    assert termios.tcgetattr(terminal.theirs) == terminal.before


# The machine of the specification


def test_function_00_1f_0_with_irq_11(guests: Session) -> None:
    with guests.boot("pc", nics=[Nic()], machine="pc", append=UNSAFE_INTERRUPTS, accel="tcg") as guest:
        device = "/sys/bus/pci/devices/0000:00:1f.0"
        assert guest.run(["cat", f"{device}/device"]).stdout.strip() == "0x1041"
        assert guest.get(f"{device}/config")[0x3C] == 11
        assert guest.run(["cat", f"{device}/irq"]).stdout.strip() == "11"
