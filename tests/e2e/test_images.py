"""Guest images as a guest sees them from inside, and what is told of one that cannot be started."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import pytest

from qemu.errors import GuestNeverCameUp, GuestPanicked
from qemu.guest import Guest, boot
from qemu.images import Image
from qemu.recipe import Recipe
from qemu.sysroot import library_versions

ROOT = Path(__file__).parents[2]

UNSIGNED = 1 << 13
"""The taint of a module whose signature was not checked, which a recipe may do without for speed."""


@pytest.fixture(scope="module")
def recipe(guest_image: Image) -> Recipe:
    return Recipe.load(ROOT / "images" / f"{guest_image.recipe}.toml")


def test_the_kernel_is_the_image_s(guest: Guest, guest_image: Image) -> None:
    assert guest.run(["uname", "-r"]).stdout == f"{guest_image.release}\n"
    tainted = int(guest.run(["cat", "/proc/sys/kernel/tainted"]).stdout)
    assert tainted & ~UNSIGNED == 0, "see Documentation/admin-guide/tainted-kernels.rst"


def test_the_recipe_s_modules_are_loaded_or_can_be(guest: Guest, recipe: Recipe) -> None:
    def builtin(name: str) -> bool:
        return guest.run(["modinfo", "-F", "filename", name]).stdout == "(builtin)\n"

    loaded = {line.split()[0] for line in guest.run(["cat", "/proc/modules"]).stdout.splitlines()}
    for name in (*recipe.kernel.early, *recipe.kernel.late):
        assert name.replace("-", "_") in loaded or builtin(name), name
    for name in recipe.kernel.available:
        guest.run(["modprobe", name])
        if not builtin(name):
            guest.run(["modprobe", "-r", name])


def test_the_recipe_s_users_exist_and_can_read_the_code(guest: Guest, recipe: Recipe) -> None:
    for user in recipe.root.users:
        assert guest.run(["id", "-u"], user=user.name).stdout == f"{user.uid}\n"
        guest.run(["python3", "-c", "import netbridge.datapath._core"], user=user.name)


def test_the_root_is_read_only_and_what_must_be_writable_is(guest: Guest) -> None:
    assert guest.run(["touch", "/etc/x"], check=False).returncode != 0
    assert guest.run(["touch", "/code/x"], check=False).returncode != 0
    for directory in ("/tmp", "/var/tmp", "/run", "/root", "/dev/shm"):
        guest.run(["sh", "-c", f"echo x >{directory}/x && rm {directory}/x"])
    for directory in ("/tmp", "/var/tmp", "/dev/shm"):
        assert guest.run(["stat", "-c", "%a", directory]).stdout == "1777\n"


def test_the_kernel_s_file_systems_are_mounted(guest: Guest) -> None:
    mounts = guest.run(["cat", "/proc/mounts"]).stdout
    places = {
        "/proc": "proc",
        "/sys": "sysfs",
        "/dev": "devtmpfs",
        "/dev/pts": "devpts",
        "/dev/hugepages": "hugetlbfs",
        "/sys/fs/cgroup": "cgroup2",
        "/sys/kernel/debug": "debugfs",
        "/sys/kernel/tracing": "tracefs",
    }
    for place, kind in places.items():
        assert re.search(rf"^\S+ {place} {kind} ", mounts, re.MULTILINE), place
    assert "UP" in guest.run(["ip", "link", "show", "lo"]).stdout


def test_orphans_are_buried(guest: Guest) -> None:
    # The inner shell leaves its child to PID 1 and ends.
    orphan = guest.run(["sh", "-c", "(sleep 0.1 >/dev/null 2>&1 & echo $!)"]).stdout.strip()
    deadline = time.monotonic() + 10
    while guest.run(["test", "-d", f"/proc/{orphan}"], check=False).returncode == 0:
        assert time.monotonic() < deadline, guest.run(["cat", f"/proc/{orphan}/status"], check=False).stdout
    assert guest.run(["cat", "/proc/1/comm"]).stdout == "init\n"


def test_the_code_is_there_compiled(guest: Guest) -> None:
    cached = guest.run(["python3", "-c", "import netbridge.cli as module; print(module.__cached__)"]).stdout.strip()
    assert cached.startswith("/code/netbridge/__pycache__/cli.cpython-3")
    guest.run(["test", "-e", cached])


def test_the_extension_asks_for_no_newer_c_library_than_the_guest_has(
    guest: Guest, guest_image: Image, tmp_path: Path
) -> None:
    place = guest.run(["python3", "-c", "import netbridge.datapath._core as core; print(core.__file__)"]).stdout.strip()
    copy = tmp_path / "core.so"
    copy.write_bytes(guest.get(place))
    version = guest.run(["ldd", "--version"]).stdout.splitlines()[0].rpartition(" ")[2]
    assert library_versions(copy)[-1] <= tuple(int(part) for part in version.split("."))


def test_a_root_that_cannot_be_mounted_is_told_at_once(
    pytestconfig: pytest.Config, guest_image: Image, tmp_path: Path, artefacts: Path
) -> None:
    garbage = tmp_path / "root.ext4"
    garbage.write_bytes(b"\0" * (1 << 20))
    broken = dataclasses.replace(guest_image, root=garbage)
    with pytest.raises((GuestNeverCameUp, GuestPanicked)) as failed:
        boot(broken, artefacts=artefacts, accel=pytestconfig.getoption("accel") or "auto")
    assert "initrd: root disk /dev/vda does not hold an ext4 file system that can be mounted" in str(failed.value)
