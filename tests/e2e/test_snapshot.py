"""Snapshots on real guests: what is restored is as good as booted and nobody's twin, and what cannot be is booted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qemu.cache import Cache
from qemu.guest import Guest, Nic, boot
from qemu.session import Session

DAY = 86400
MARK = b"A driver and an echo service in a guest that is up"
"""From the first line of testbed.py, which is on the code disk."""


@pytest.fixture
def empty_cache(tmp_path: Path) -> Cache:
    """A cache for snapshots in which none are."""
    return Cache(tmp_path)


def facts(guest: Guest) -> tuple[str, str]:
    """Random numbers of the kernel, and what is on the code disk."""
    return guest.eval("import os; os.urandom(16).hex()"), guest.run(["ls", "/code"]).stdout


def clock_error(guest: Guest) -> float:
    """Seconds that the guest's clock differs from what it was told."""
    theirs = guest.eval("import time; time.time()")
    return float(abs(theirs - time.time_ns() / 1e9))


def test_a_restored_guest_is_as_good_as_a_booted_one(
    guests: Session, artefacts: Path, empty_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, code = guests.image(), guests.code()
    seen = []
    # So that a guest whose clock is not set is wrong by a day, and not just by the moment since the snapshot.
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + DAY * 1_000_000_000)
    for name in ("booted", "restored", "restored-again"):
        with boot(image, code=code, artefacts=artefacts / name, nics=[Nic()], accel="tcg", cache=empty_cache) as guest:
            seen.append(facts(guest))
            assert guest.origin.startswith("booted, as there was no snapshot" if name == "booted" else "restored from")
            assert clock_error(guest) < DAY / 24
            assert guest.run(["sh", "-c", "echo $(cat /proc/sys/kernel/hostname)"]).stdout == "guest\n"
            assert guest.kernel_trouble() == []
            assert guest.iommu_faults() == []
            # A function that VFIO could have: nothing of it was claimed before the snapshot.
            driver = guest.run(["readlink", "/sys/bus/pci/devices/0000:01:00.0/driver"]).stdout
            assert driver.strip().endswith("/virtio-pci")
            # QEMU announces a machine that has moved; here nobody is to hear of it.
            assert guest.wire.take(0.5) == []
            print(f"{guest.origin}")
    assert len({random for random, _ in seen}) == 3, "each has random numbers of its own"
    assert len({files for _, files in seen}) == 1
    assert "netbridge" in seen[0][1]
    assert len(list(empty_cache.root.glob("snapshot-*"))) == 1


def test_the_code_disk_is_that_of_the_run(guests: Session, artefacts: Path, empty_cache: Cache) -> None:
    other = artefacts / "other.img"
    data = guests.code().read_bytes()
    assert MARK in data
    other.write_bytes(data.replace(MARK, MARK.swapcase()))
    for n, code in enumerate((guests.code(), other)):
        with boot(guests.image(), code=code, artefacts=artefacts / str(n), accel="tcg", cache=empty_cache) as guest:
            found = MARK.swapcase() in guest.get("/code/tests/e2e/testbed.py")
            assert found == (code == other)
    assert "restored" in guest.origin


def test_what_cannot_be_restored_is_booted_and_told(guests: Session, artefacts: Path, empty_cache: Cache) -> None:
    said: list[str] = []

    def up(name: str) -> str:
        with boot(guests.image(), artefacts=artefacts / name, accel="tcg", cache=empty_cache, say=said.append) as guest:
            assert guest.run(["true"]).returncode == 0
            return guest.origin

    assert up("first").startswith("booted, as there was no snapshot")
    (state,) = empty_cache.root.glob("snapshot-*/state")
    state.write_bytes(state.read_bytes()[: 1 << 20])
    origin = up("broken")
    assert "could not be restored" in origin
    assert origin.startswith("booted, as its snapshot")
    assert any(line.startswith("booting a guest, because its snapshot") for line in said), said
    assert up("mended").startswith("restored from")


def test_a_machine_that_cannot_be_saved_is_booted_each_time(
    guests: Session, artefacts: Path, empty_cache: Cache
) -> None:
    said: list[str] = []
    unmovable = ["-device", "nvme,serial=none"]
    options = {"accel": "tcg", "extra_args": unmovable, "cache": empty_cache, "say": said.append}
    with boot(guests.image(), artefacts=artefacts, **options) as guest:  # type: ignore[arg-type]
        assert guest.run(["true"]).returncode == 0
    assert len(said) == 1
    assert said[0].startswith("no snapshot of this guest: ")
    assert "nvme" in said[0]
    assert list(empty_cache.root.glob("snapshot-*")) == []
