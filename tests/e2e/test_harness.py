"""The harness itself on real guests: what it does with one that is well, and that it tells quickly when one is not."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scapy.layers.l2 import ARP, Ether
from scapy.utils import PcapNgReader

import qemu.guest
from qemu import accel
from qemu.agent import CommandTimedOut
from qemu.errors import AcceleratorUnavailable, GuestLost, GuestNeverCameUp, GuestPanicked
from qemu.guest import Guest, Nic, boot
from qemu.images import Image
from qemu.remote import RemoteTests
from qemu.session import Session
from qemu.wire import Wire

ROOT = Path(__file__).parents[2]
BUSYBOX = "/usr/lib/guest/busybox"
TOLD_SECONDS = 60.0
"""Within which trouble has to be told, on a busy machine, too: a third of what booting may take."""
HOST = "02:00:00:00:00:01"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_gone(pid: int, seconds: float = 2.0) -> None:
    deadline = time.monotonic() + seconds
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there after {seconds} s"
        time.sleep(0.02)


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
        deadline = time.monotonic() + TOLD_SECONDS
        while guest._console.size < before + 200_000:
            assert time.monotonic() < deadline
            assert guest.run(["echo", "alive"]).stdout == "alive\n"
    assert "the console is flooded" in guest.console_tail()
    assert len(guest.console_tail(5).splitlines()) == 5


def test_frames_go_through_the_guests_own_driver(guest: Guest, wire: Wire) -> None:
    interface = guest.run(["sh", "-c", "ls /sys/bus/pci/devices/0000:01:00.0/virtio*/net"]).stdout.strip()
    guest.run(["sh", "-c", f"ip addr add 10.9.8.1/24 dev {interface} && ip link set {interface} up"])
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
    # The same guest, alone, its console on the terminal: it gets as far as its agent, which waits for a host.
    again = subprocess.Popen(
        [str(script), "-append", "console=ttyS0 panic=-1 rdinit=/nonexistent"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = again.communicate(timeout=120)
    assert "Kernel panic" in output


def test_a_core_is_kept(guests: Session) -> None:
    """Of a process that may leave none, and has another identity than it began with."""
    with guests.boot("core", nics=[Nic()]) as guest:
        ended = guest.run(
            ["sh", "-c", "ulimit -c 0; exec python3 -c 'import os; os.abort()'"], user="nobody", check=False
        )
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


def test_the_shell_on_a_terminal(artefacts: Path, request: pytest.FixtureRequest) -> None:
    ours, theirs = os.openpty()
    # Closed whatever comes of the test: a shell whose terminal has gone ends, and its guest with it.
    for end in (ours, theirs):
        request.addfinalizer(functools.partial(os.close, end))
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    before = termios.tcgetattr(theirs)
    shell = subprocess.Popen(
        [sys.executable, "-m", "qemu.shell", "--accel", "tcg", "--artefacts", str(artefacts)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    screen = b""

    def expect(wanted: bytes) -> None:
        nonlocal screen
        deadline = time.monotonic() + 100
        while wanted not in screen:
            ready, _, _ = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} did not come: {screen!r}"
            screen += os.read(ours, 65536)
        screen = screen[screen.index(wanted) + len(wanted) :]

    expect(b"leaves it")
    expect(b"# ")
    os.write(ours, b"stty size; echo a$((1 + 1))b\r")
    expect(b"33 99")
    expect(b"a2b")
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 88, 0, 0))
    os.kill(shell.pid, signal.SIGWINCH)
    # By the time it speaks it is in the foreground: Ctrl-C between two commands would reach neither.
    os.write(ours, b"sh -c 'echo r$((1 + 2))n; exec sleep 1000'\r")
    expect(b"r3n")
    os.write(ours, b"\x03")
    expect(b"# ")
    os.write(ours, b"echo c$((2 + 2))d; stty size\r")
    expect(b"c4d")
    expect(b"44 88")
    assert termios.tcgetattr(theirs) != before
    os.write(ours, b"\x1d")
    assert shell.wait(30) == 0
    assert termios.tcgetattr(theirs) == before


# A guest that does not come up


def fails(guests: Session, artefacts: Path, *append: str) -> tuple[Exception, float]:
    """What booting with these words on the command line ends in, and after how long."""
    began = time.monotonic()
    with pytest.raises((GuestNeverCameUp, GuestPanicked)) as caught:
        boot(guests.image(), artefacts=artefacts, accel="tcg", append=append)
    seconds = time.monotonic() - began
    processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    assert [pid for pid in processes if str(artefacts) in command_line(pid)] == []
    return caught.value, seconds


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def test_a_panic_at_boot(guests: Session, artefacts: Path) -> None:
    failure, seconds = fails(guests, artefacts, "rdinit=/nonexistent", "root=/dev/nowhere")
    assert isinstance(failure, GuestPanicked)
    assert "Kernel panic - not syncing" in str(failure).splitlines()[0]
    assert "VFS" in str(failure)
    assert "end of" in str(failure)
    assert seconds < TOLD_SECONDS


def test_an_init_that_ends(guests: Session, artefacts: Path) -> None:
    failure, seconds = fails(guests, artefacts, f"rdinit={BUSYBOX}", "--", "true")
    assert isinstance(failure, GuestPanicked)
    assert "Attempted to kill init" in str(failure).splitlines()[0]
    assert seconds < TOLD_SECONDS


def test_a_hang_at_boot(guests: Session, artefacts: Path) -> None:
    failure, seconds = fails(guests, artefacts, f"rdinit={BUSYBOX}", "--", "sleep", "1000")
    assert isinstance(failure, GuestNeverCameUp)
    assert "idle and silent" in str(failure).splitlines()[0]
    assert seconds < TOLD_SECONDS


def test_a_flood_at_boot(guests: Session, artefacts: Path) -> None:
    failure, seconds = fails(guests, artefacts, f"rdinit={BUSYBOX}", "--", "yes", "a-flood-" * 20)
    assert isinstance(failure, GuestNeverCameUp)
    assert "flooded its console" in str(failure).splitlines()[0]
    assert "a-flood-a-flood" in str(failure)
    assert seconds < TOLD_SECONDS


def test_a_guest_that_switches_itself_off(guests: Session, artefacts: Path) -> None:
    failure, seconds = fails(guests, artefacts, f"rdinit={BUSYBOX}", "--", "poweroff", "-f")
    assert isinstance(failure, GuestNeverCameUp)
    assert "ended with exit code 0" in str(failure).splitlines()[0]
    assert seconds < TOLD_SECONDS


def test_a_machine_that_qemu_refuses(guests: Session, artefacts: Path) -> None:
    began = time.monotonic()
    with pytest.raises(GuestNeverCameUp, match=r"ended with exit code 1 and said .*no-such-device"):
        boot(guests.image(), artefacts=artefacts, accel="tcg", extra_args=["-device", "no-such-device"])
    assert time.monotonic() - began < TOLD_SECONDS


# The accelerator


# A QEMU that does under KVM what it is told to in its first line, and is itself otherwise.
BAD_QEMU = """\
#!{python}
import json, os, re, signal, socket, sys, time
if "kvm" not in sys.argv:
    os.execv({real!r}, sys.argv)
how = {how!r}
if how == "abort":
    print({words!r}, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
control = next(word for word in sys.argv if word.endswith("id=control"))
qmp = socket.socket(fileno=int(re.search("fd=([0-9]+)", control)[1]))
def tell(**what):
    qmp.sendall(json.dumps(what).encode() + b"\\n")
version = {{"qemu": {{"major": 7, "minor": 2, "micro": 0}}, "package": ""}}
tell(QMP={{"version": version, "capabilities": []}})
while asked := qmp.recv(65536):  # one at a time: the next comes when this one is answered
    asked = json.loads(asked)
    tell(**{{"return": {{"status": "internal-error"}}, "id": asked.get("id")}})
    if asked["execute"] == "qmp_capabilities":
        if how == "internal-error":
            print({words!r}, file=sys.stderr, flush=True)
            tell(event="STOP", timestamp={{"seconds": 0, "microseconds": 0}})
        while how == "spin":
            pass
"""


@pytest.fixture
def kvm_that(artefacts: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a /dev/kvm that opens, with a QEMU that cannot run a guest with it: aborts, stops, spins, or does nothing.
    Gives what that QEMU says on its stderr."""
    words = "error: failed to set MSR 0x48f to 0x7fffff00036dfb"
    real = shutil.which("qemu-system-x86_64")
    device = artefacts / "kvm"
    device.touch()
    fake = artefacts / "bin" / "qemu-system-x86_64"
    fake.parent.mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(accel, "KVM", device)
    monkeypatch.setattr(accel, "cache_root", lambda: artefacts / "cache")
    monkeypatch.setattr(qemu.guest, "TRIAL_SECONDS", 3.0)  # of processor time, of which there may be little
    monkeypatch.delenv(accel.VARIABLE, raising=False)

    def make(how: str) -> str:
        fake.write_text(BAD_QEMU.format(python=sys.executable, real=real, how=how, words=words))
        fake.chmod(0o755)
        return words

    return make


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("abort", 'ended by SIGABRT and said "{}"'),
        ("internal-error", 'QEMU stopped the virtual machine for internal-error: "{}"'),
        ("spin", "it has used 3 s of processor time without a word on the console"),
        ("sleep", "it has been idle and silent for 4 s"),
    ],
)
def test_a_kvm_that_opens_and_cannot_run(
    guest_image: Image, artefacts: Path, kvm_that: Callable[[str], str], how: str, said: str
) -> None:
    words = kvm_that(how)
    reason = said.format(words)
    told: list[str] = []
    with boot(guest_image, artefacts=artefacts, nics=[Nic()], say=told.append) as guest:
        assert guest.accel.name == "tcg"
        assert "kvm opens, but" in guest.accel.reason
        assert reason in guest.accel.reason
        guest.wire.send(b"\xff" * 60)  # the wire has survived the change of QEMU
        assert guest.run(["true"]).returncode == 0
    assert len(told) == 1
    assert "trying tcg" in told[0]
    if words in reason:
        assert (artefacts / "qemu-kvm.log").read_text().strip() == words
    again = accel.choose_accelerator(kernel=guest_image.kernel, device=accel.KVM)
    assert (again.name, again.reason) == ("tcg", guest.accel.reason)
    began = time.monotonic()
    with pytest.raises(AcceleratorUnavailable, match=f"KVM was demanded, but under it: .*{re.escape(reason)}"):
        boot(guest_image, artefacts=artefacts, accel="kvm")
    assert time.monotonic() - began < TOLD_SECONDS


# A guest that is lost


def test_an_agent_that_dies_is_told_at_once_and_started_anew(guests: Session) -> None:
    guest = guests.guest()
    assert guest.agent.hello is not None
    began = time.monotonic()
    sleeping = guest.start(["sleep", "1000"])
    guest.start(["kill", "-9", str(guest.agent.hello["pid"])])
    with pytest.raises(GuestLost, match=r"sleep 1000.*agent in the guest (has ended|died)"):
        sleeping.wait(60)
    assert time.monotonic() - began < TOLD_SECONDS
    guest.agent.wait_ready(TOLD_SECONDS)
    assert guest.run(["echo", "again"]).stdout == "again\n"
    assert guest.lost is None
    guest.run(["pkill", "-9", "-x", "sleep"], check=False)


def test_an_agent_that_is_stuck_is_told(guests: Session, guest: Guest) -> None:
    assert guest.agent.hello is not None
    began = time.monotonic()
    pid = guest.agent.hello["pid"]
    guest.start(["sh", "-c", f"kill -STOP {pid}; sleep 3; kill -CONT {pid}"])
    with pytest.raises(GuestLost, match=r"has not answered within 1 s"):
        for _ in range(1000):
            guest.agent.ping(timeout=1.0)
    assert time.monotonic() - began < TOLD_SECONDS
    assert guest.agent.ping(timeout=TOLD_SECONDS) < TOLD_SECONDS


def test_a_panic_of_a_guest_that_was_up(guests: Session) -> None:
    guest = guests.guest()
    began = time.monotonic()
    sleeping = guest.start(["sleep", "1000"])
    guest.start(["sh", "-c", "echo c >/proc/sysrq-trigger"])
    with pytest.raises(GuestLost, match=r"guest panicked: .*sysrq triggered crash"):
        sleeping.wait(60)
    assert time.monotonic() - began < TOLD_SECONDS
    assert isinstance(guest.lost, GuestPanicked)
    with pytest.raises(GuestLost, match="guest panicked"):
        guest.run(["true"])
    with pytest.raises((GuestPanicked, GuestLost)):
        guest.qmp("query-status")


def test_a_qemu_that_is_killed(guests: Session) -> None:
    guest = guests.guest()  # a new one: the last test has broken the one before
    assert guest.lost is None
    began = time.monotonic()
    sleeping = guest.start(["sleep", "1000"])
    assert guest._process.pid is not None
    os.kill(guest._process.pid, signal.SIGKILL)
    with pytest.raises(GuestLost, match=r"was ended by SIGKILL|has closed the agent's port"):
        sleeping.wait(60)
    assert time.monotonic() - began < TOLD_SECONDS
    deadline = time.monotonic() + 5
    while guest.lost is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "SIGKILL" in str(guest.lost)


ORPHAN = """
import sys, time
from pathlib import Path
from qemu.guest import Nic, boot
from qemu.images import Recipe, ensure_image
image = ensure_image(Recipe.load(Path("images/trixie.toml")))
guest = boot(image, artefacts=Path(sys.argv[1]), nics=[Nic()], accel="tcg")
print(guest._process.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_qemu_is_left_when_its_parent_goes(artefacts: Path, number: int) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(artefacts)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.send_signal(number)
    parent.communicate(timeout=60)
    wait_gone(pid)


# The machine of the specification


def test_function_00_1f_0_with_irq_11(guests: Session) -> None:
    words = ["vfio_iommu_type1.allow_unsafe_interrupts=1"]
    with guests.boot("pc", nics=[Nic()], machine="pc", append=words, accel="tcg") as guest:
        device = "/sys/bus/pci/devices/0000:00:1f.0"
        assert guest.run(["cat", f"{device}/device"]).stdout.strip() == "0x1041"
        assert guest.get(f"{device}/config")[0x3C] == 11
        assert guest.run(["cat", f"{device}/irq"]).stdout.strip() == "11"
