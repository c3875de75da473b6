"""What the driver process cannot do, seen from outside: in /proc, and by making the real one try (see inject.py)."""

from __future__ import annotations

import re

import pytest

from netbridge.errors import ExitCode
from netbridge.vnode.capabilities import MIB
from qemu.guest import Guest
from qemu.wire import Wire
from tests.e2e import testbed
from tests.e2e.testbed import Testbed
from tests.e2e.traffic import Generator, reflected

pytestmark = pytest.mark.thorough

MEMORY_MIB = 16
SOCKET_AF_INET, SOCK_STREAM = 2, 1
PROT_RWX, MAP_ANONYMOUS_PRIVATE = 7, 0x22
SIOCGIFCONF = 0x8912


# What whoever has the file can do with it: as root, and it is still no.
MAP_FOR_WRITING = """
import glob, mmap, os, sys
for path in glob.glob(f"/proc/{sys.argv[1]}/fd/*"):
    if "memfd:netbridge-rx" in os.readlink(path):
        fd = os.open(path, os.O_RDWR)
        try:
            mmap.mmap(fd, 4096)
        except PermissionError:
            print("PermissionError")
"""


def text(guest: Guest, path: str) -> str:
    return guest.run(["cat", path]).stdout


def status(guest: Guest, pid: int | str) -> dict[str, str]:
    lines = text(guest, f"/proc/{pid}/status").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def group(guest: Guest, pci: str, file: str) -> str:
    return testbed.in_cgroup(guest, pci, file)


def inject(guest: Guest, pid: int, *words: object) -> str:
    command = ["python3", "-m", "tests.e2e.inject", str(pid), *map(str, words)]
    return guest.run(command, timeout=testbed.START_SECONDS).stdout.strip()


def echoed(wire: Wire, bed: Testbed, count: int = 64) -> None:
    wire.drain()
    wire.exchange(Generator(bed.mac).udp(count), reply=reflected, window=32, timeout=10.0).check()


# ---- From outside ---------------------------------------------------------------------------------------------------


def test_the_driver_has_no_privileges(guest: Guest, bed: Testbed) -> None:
    driver, monitor = status(guest, bed.driver_pid), status(guest, str(bed.driver.pid))
    assert driver["Name"] == "netbridge-drv"
    assert driver["NoNewPrivs"] == "1"
    assert driver["Seccomp"] == "2", "a filter"
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(driver[kind], 16) == 0, kind
    for kind in ("Uid", "Gid"):
        ids = set(driver[kind].split())
        assert len(ids) == 1
        assert not ids & {"0", "1000", "65534"}, "neither root's nor the service's nor nobody's"
    assert driver["Groups"] == ""
    assert driver["Threads"] == "1"
    assert driver["PPid"] == str(bed.driver.pid)
    assert monitor["Uid"].split()[0] == "0"


def test_the_driver_has_no_network(guest: Guest, bed: Testbed) -> None:
    names = [guest.run(["readlink", f"/proc/{pid}/ns/net"]).stdout for pid in (bed.driver_pid, "self")]
    assert names[0] != names[1]
    interfaces = text(guest, f"/proc/{bed.driver_pid}/net/dev").splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]


def test_the_driver_has_these_files_and_no_others(guest: Guest, bed: Testbed) -> None:
    listing = guest.run(["ls", "-l", f"/proc/{bed.driver_pid}/fd"]).stdout
    files = [line.split(" -> ")[1] for line in listing.splitlines() if " -> " in line]
    kinds = {re.sub(r"[:\[(].*| \(deleted\)", "", name.removeprefix("anon_inode:[").rstrip("]")) for name in files}
    assert kinds == {
        "/dev/null",
        "pipe",  # stderr
        "socket",
        "/dev/vfio/vfio",
        "vfio-device",
        "eventpoll",
        "eventfd",
        "timerfd",
        "/memfd",
        f"{testbed.SOCKET}.counters",
    }
    assert sum("vfio-device" in name for name in files) == 2, "the function's, and its mapped BAR's"
    assert text(guest, f"/proc/{bed.driver_pid}/environ").strip("\0") == ""


def test_the_driver_is_held_to_its_manifest(guest: Guest, bed: Testbed) -> None:
    """Memory, locked memory and what it really uses, its DMA pool included."""
    assert int(group(guest, bed.pci, "memory.max")) == MEMORY_MIB * MIB
    assert group(guest, bed.pci, "cgroup.procs") == str(bed.driver_pid)
    assert 3 * MIB < int(group(guest, bed.pci, "memory.peak")) <= MEMORY_MIB * MIB
    limits = text(guest, f"/proc/{bed.driver_pid}/limits")
    assert re.search(rf"Max locked memory +{MEMORY_MIB * MIB} +{MEMORY_MIB * MIB} ", limits)
    assert re.search(r"Max core file size +0 +0 ", limits)


def test_the_cpu_share_is_set_once_it_runs(guest: Guest) -> None:
    with testbed.running(guest, vnode=testbed.manifest(testbed.nics(guest)[0][0], cpu_share=0.5)) as bed:
        assert group(guest, bed.pci, "cpu.max") == "50000 100000"
        bed.stop()


def test_mode_permissive_is_loud_and_confines_nothing(guest: Guest, wire: Wire) -> None:
    manifest = testbed.manifest(testbed.nics(guest)[0][0], mode="permissive")
    with testbed.running(guest, vnode=manifest) as bed:
        assert "warning: mode: permissive" in bed.driver.stderr
        driver = status(guest, bed.driver_pid)
        assert (driver["Uid"].split()[0], driver["NoNewPrivs"], driver["Seccomp"]) == ("0", "0", "0")
        echoed(wire, bed)
        bed.stop()


def test_a_named_user(guest: Guest) -> None:
    with testbed.running(guest, options=["--driver-user", "daemon"]) as bed:
        assert status(guest, bed.driver_pid)["Uid"].split() == ["1"] * 4
        bed.stop()


# ---- Tried by the driver itself -------------------------------------------------------------------------------------


def test_opening_a_file_is_refused_and_told(guest: Guest, wire: Wire, bed: Testbed) -> None:
    """Whatever names a file, as the driver's own libraries may when they explain an error: EACCES, and it lives."""
    for call, arguments in (
        ("openat", (-100, "/etc/passwd", 0, 0)),
        ("openat", (-100, f"/sys/bus/pci/devices/{bed.pci}/config", 2, 0)),
        ("open", ("/dev/vfio/vfio", 2, 0)),
    ):
        assert inject(guest, bed.driver_pid, call, *arguments) == "-13"
        testbed.wait_for_line(bed.driver, rf" sandbox_violation syscall={call} .*answer=EACCES")
    echoed(wire, bed)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("socket", (SOCKET_AF_INET, SOCK_STREAM, 0)),
        ("execve", ("/bin/sh", 0, 0)),
        ("mmap", (0, 4096, PROT_RWX, MAP_ANONYMOUS_PRIVATE, -1, 0)),
        ("ioctl", (3, SIOCGIFCONF, 0)),
        ("kill", (1, 0)),
        ("ptrace", (16, 1, 0, 0)),
        ("setresuid", (0, 0, 0)),
    ],
)
def test_a_forbidden_call_ends_the_driver_and_names_the_call(
    guest: Guest, wire: Wire, bed: Testbed, call: str, arguments: tuple[object, ...]
) -> None:
    assert inject(guest, bed.driver_pid, call, *arguments) == "SIGKILL"
    testbed.wait_for_line(bed.driver, rf" sandbox_violation syscall={call} .*answer=killed")
    testbed.wait_for_line(bed.driver, rf" driver_died .*it called {call}, which its sandbox does not allow")
    testbed.wait_for_line(bed.driver, r" serving ")
    echoed(wire, bed)


# ---- Doing without a capability -------------------------------------------------------------------------------------


def test_without_mem_share_clients_are_refused_frames(guest: Guest) -> None:
    pci = testbed.nics(guest)[0][0]
    guest.put(testbed.manifest(pci, without=["CAP_MEM_SHARE"]).encode(), testbed.MANIFEST)
    with guest.start(testbed.netbridge("run", testbed.MANIFEST)) as monitor:
        pid = testbed.wait_for_line(monitor, r" claimed .*\bdriver=(\d+)")[1]
        testbed.wait_for_line(monitor, r" up ")
        command = ["python3", "-m", "netbridge.services.echo", "--once", "--socket", testbed.SOCKET]
        done = guest.run(command, user=testbed.SERVICE_USER, check=False)
        assert done.returncode == ExitCode.PORT
        assert "CAP_MEM_SHARE" in done.stderr
        assert "memfd" not in guest.run(["ls", "-l", f"/proc/{pid}/fd"]).stdout, "there are no frames to share"
        testbed.end(monitor)


def test_read_only_share_lets_the_service_only_read(guest: Guest, wire: Wire) -> None:
    """`CAP_MEM_SHARE: ro`: the service can only read received frames, whatever it does; the device goes on
    writing them."""
    pci = testbed.nics(guest)[0][0]
    vnode = testbed.manifest(pci).replace("  - CAP_MEM_SHARE\n", "  - CAP_MEM_SHARE: ro\n")
    with testbed.running(guest, vnode=vnode) as bed:
        echoed(wire, bed)
        maps = guest.run(["cat", f"/proc/{bed.echo.pid}/maps"]).stdout
        rights = {line.split()[1] for line in maps.splitlines() if "memfd:netbridge-rx" in line}
        assert rights == {"r--s"}
        assert "PermissionError" in guest.run(["python3", "-c", MAP_FOR_WRITING, str(bed.echo.pid)]).stdout
        echoed(wire, bed)
        bed.stop()
    assert bed.final["echo"]["frames"]
    assert not bed.final["echo"]["forwarded"], "what it cannot change in place, it copies"


def test_without_log_write_the_driver_cannot_even_write(guest: Guest) -> None:
    pci = testbed.nics(guest)[0][0]
    guest.put(testbed.manifest(pci, without=["CAP_LOG_WRITE"]).encode(), testbed.MANIFEST)
    with guest.start(testbed.netbridge("run", testbed.MANIFEST)) as monitor:
        # Nothing tells when it is up, but the echo service, which has to be served.
        with testbed.start_echo(guest, guest.artefacts / "echo.log") as echo:
            echo.wait_for_line("connected")
            pid = group(guest, pci, "cgroup.procs")
            assert guest.run(["readlink", f"/proc/{pid}/fd/2"]).stdout == "/dev/null\n"
            testbed.end(echo)
        testbed.end(monitor)
        assert monitor.stderr == ""


@pytest.mark.parametrize("words", [("config",), ("bar", "4", "0x14")])
def test_raw_access_needs_its_grant(guest: Guest, words: tuple[str, ...]) -> None:
    pci = testbed.nics(guest)[0][0]
    guest.put(testbed.manifest(pci).encode(), testbed.MANIFEST)
    done = guest.run(testbed.netbridge("debug", words[0], testbed.MANIFEST, *words[1:]), check=False)
    assert done.returncode == ExitCode.REFUSED
    assert "CAP_SYSCALL_RAW" in done.stderr
    assert testbed.nics(guest)[0] == (pci, "virtio-pci")


def test_raw_access_with_its_grant(guest: Guest) -> None:
    pci = testbed.nics(guest)[0][0]
    guest.put(testbed.manifest(pci, more=["CAP_SYSCALL_RAW"]).encode(), testbed.MANIFEST)

    def debug(*words: str) -> str:
        return guest.run(testbed.netbridge("debug", words[0], testbed.MANIFEST, *words[1:])).stdout

    assert debug("config", "0", "--width", "2") == "0x1af4\n"
    assert debug("config").startswith("000: f4 1a 41 10 ")
    # The device status: FLR or no, a function that was just opened and reset has none of a driver's.
    assert int(debug("bar", "4", "0x14", "--width", "1"), 16) in (0x00, 0x0B)
    debug("config", "0x3c", "--width", "1", "--write", "0x2a")
    assert testbed.nics(guest)[0] == (pci, "virtio-pci"), "given back"


def test_another_function_is_refused(guest: Guest, bed: Testbed) -> None:
    """The grant names one function. The driver has no way to open another, which the tests above show; nor does the
    monitor do it for anybody."""
    done = guest.run(testbed.netbridge("run", testbed.MANIFEST, "--pci", "0000:00:00.0"), check=False)
    assert done.returncode == ExitCode.REFUSED
    assert bed.pci in done.stderr


def test_a_pool_over_budget_is_refused(guest: Guest) -> None:
    pci = testbed.nics(guest)[0][0]
    guest.put(testbed.manifest(pci, mem_mb=1).encode(), testbed.MANIFEST)
    done = guest.run(testbed.netbridge("run", testbed.MANIFEST), check=False)
    assert done.returncode == ExitCode.REFUSED
    assert "CAP_DMA_ALLOC" in done.stderr


def test_a_driver_that_needs_more_memory_than_granted_is_ended(guest: Guest) -> None:
    """The pool is within the budget, but not the process with it: the kernel holds it to memory.max."""
    pci = testbed.nics(guest)[0][0]
    guest.put(testbed.manifest(pci, mem_mb=4).encode(), testbed.MANIFEST)
    few = ("--rx-buffers", "256", "--tx-buffers", "128")
    done = guest.run(testbed.netbridge("run", testbed.MANIFEST, *few), check=False, timeout=60.0)
    assert done.returncode == ExitCode.FAILURE
    assert "required_mem_mb: 4" in done.stderr
    assert "5 times in a row" in done.stderr
    assert testbed.nics(guest)[0] == (pci, "virtio-pci")
