"""What a user can do wrong on a machine with VFIO: one line that names it and what to do, and nothing left bound."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from netbridge.errors import ExitCode
from qemu.completed import Completed
from qemu.guest import Guest, Nic
from qemu.session import Session
from tests.e2e import testbed


def refused(guest: Guest, text: str, *words: str, prefix: Sequence[str] = ()) -> Completed:
    """Runs the driver with this manifest; it must end by itself, without a traceback and with every NIC as it was."""
    before = testbed.nics(guest)
    guest.put(text.encode(), testbed.MANIFEST)
    done = guest.run([*prefix, *testbed.netbridge("run", testbed.MANIFEST, *words)], check=False)
    assert "Traceback" not in done.stderr
    assert testbed.nics(guest) == before
    assert done.returncode != 0
    # Lines of the log carry a time; the one without tells the user.
    told = [line for line in done.stderr.splitlines() if not re.match(r"netbridge: \d+\.\d+ ", line)]
    assert len(told) == 1, done.stderr
    return done


@pytest.fixture
def pci(guest: Guest) -> str:
    return testbed.nics(guest)[0][0]


def test_an_address_that_does_not_exist(guest: Guest) -> None:
    done = refused(guest, testbed.manifest("0000:00:1d.7"))
    assert done.returncode == ExitCode.DEVICE
    assert "0000:00:1d.7" in done.stderr
    assert "no such PCI function" in done.stderr


def test_a_function_that_is_no_virtio_net(guest: Guest) -> None:
    """The host bridge; it must not even be unbound from anything."""
    done = refused(guest, testbed.manifest("0000:00:00.0"))
    assert done.returncode == ExitCode.DEVICE
    assert "8086" in done.stderr


def test_an_address_that_is_not_the_manifests(guest: Guest, pci: str) -> None:
    done = refused(guest, testbed.manifest(pci), "--pci", "0000:00:00.0")
    assert done.returncode == ExitCode.REFUSED
    assert pci in done.stderr


def test_another_irq_than_the_manifests(guest: Guest, pci: str) -> None:
    done = refused(guest, testbed.manifest(pci, irq="250"))
    assert done.returncode == ExitCode.REFUSED
    assert "CAP_IRQ_REGISTER" in done.stderr


@pytest.mark.parametrize("capability", ["NetworkAccess", "CAP_HARDWARE_IO_PCI", "CAP_IRQ_REGISTER", "CAP_DMA_ALLOC"])
def test_a_missing_capability(guest: Guest, pci: str, capability: str) -> None:
    done = refused(guest, testbed.manifest(pci, without=[capability]))
    assert done.returncode == ExitCode.REFUSED
    assert capability in done.stderr


def test_without_the_log_capability_only_the_fatal_error_is_said(guest: Guest, pci: str) -> None:
    done = refused(guest, testbed.manifest(pci, without=["CAP_LOG_WRITE", "CAP_DMA_ALLOC"]))
    assert len(done.stderr.splitlines()) == 1


def test_too_little_locked_memory(guest: Guest, pci: str) -> None:
    limited = (
        "prlimit",
        "--memlock=65536",
        "setpriv",
        "--bounding-set=-ipc_lock,-sys_resource",
        "--inh-caps=-ipc_lock",
    )
    done = refused(guest, testbed.manifest(pci), prefix=limited)
    assert done.returncode == ExitCode.DEVICE
    assert "locked" in done.stderr
    assert "64 KiB" in done.stderr


def test_without_root(guest: Guest, pci: str) -> None:
    guest.put(testbed.manifest(pci).encode(), testbed.MANIFEST)
    command = testbed.netbridge("run", testbed.MANIFEST, "--socket", "/tmp/someones.sock")
    done = guest.run(command, check=False, user=testbed.SERVICE_USER)
    assert done.returncode == ExitCode.DEVICE
    assert "Traceback" not in done.stderr
    assert "root" in done.stderr or "permi" in done.stderr.lower()


def test_a_second_instance(guest: Guest) -> None:
    with testbed.running(guest) as bed:
        done = guest.run(testbed.netbridge("run", testbed.MANIFEST), check=False)
        assert done.returncode == ExitCode.PORT
        assert testbed.SOCKET in done.stderr
        other = guest.run(testbed.netbridge("run", testbed.MANIFEST, "--socket", "/run/other.sock"), check=False)
        assert other.returncode == ExitCode.DEVICE
        assert str(bed.driver_pid) in other.stderr, "which process holds it"
        bed.stop()


def test_no_iommu(guests: Session) -> None:
    with guests.boot("no-iommu", nics=[Nic()], append=["intel_iommu=off"]) as guest:
        done = refused(guest, testbed.manifest(testbed.nics(guest)[0][0]))
        assert done.returncode == ExitCode.DEVICE
        assert "intel_iommu=on" in done.stderr


def test_no_vfio_pci_driver(guest: Guest, pci: str) -> None:
    """The module is unloaded and hidden: as on a kernel that was built without it."""
    if guest.run(["modinfo", "-F", "filename", "vfio_pci"]).stdout == "(builtin)\n":
        pytest.skip("needs vfio-pci as a module: this kernel has it built in")
    guest.run(["modprobe", "--remove", "vfio_pci"])
    hidden = ("unshare", "--mount", "sh", "-c", 'busybox mount -t tmpfs none /lib/modules && exec "$@"', "sh")
    try:
        done = refused(guest, testbed.manifest(pci), prefix=hidden)
    finally:
        guest.run(["modprobe", "vfio_pci"])
    assert done.returncode == ExitCode.DEVICE
    assert "vfio-pci" in done.stderr


def test_a_group_that_is_not_viable(guests: Session) -> None:
    """Two functions of one slot share an IOMMU group; while the other has its driver, none of them can be claimed."""
    nics = [
        Nic(id="nic0", place="root-bus", addr="0x8.0x0", properties={"multifunction": "on"}),
        Nic(id="nic1", place="root-bus", addr="0x8.0x1"),
    ]
    with guests.boot("group", nics=nics) as guest:
        done = refused(guest, testbed.manifest("0000:00:08.0"))
        assert done.returncode == ExitCode.DEVICE
        assert "0000:00:08.1" in done.stderr
        assert "virtio-pci" in done.stderr
