"""Kernel packages taken apart, and the initramfs put together."""

import gzip
import lzma
import stat
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu.errors import ImageBuildFailed, ToolMissing
from qemu.initrd import AGENT, FILES, INIT_FILES, Archive, build_initrd, initrd_inputs
from qemu.kernel import MAGIC, PAYLOAD, SETUP_SECTORS, Kernel, decompress, modules_needed, read_module, unpack_kernel
from qemu.recipe import KernelPart, Source
from tests.unit.images_fakes import package

RELEASE = "6.99-test"
PART = KernelPart(Source("trixie", ()), "linux-image-x", ("virtio_blk",), ("vfio-pci",), ("tun",), ())
ELF = b"\x7fELF" + bytes(range(256)) * 40
NOTE = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x1000000)


def bz_image(payload: bytes, length: int) -> bytes:
    """A bzImage by the boot protocol: a setup part of four sectors, then the payload and its unpacked length."""
    start, offset = (4 + 1) * 512, 100
    image = bytearray(start + offset)
    image[SETUP_SECTORS] = 4
    image[MAGIC : MAGIC + 4] = b"HdrS"
    struct.pack_into("<II", image, PAYLOAD, offset, len(payload) + 4)
    return bytes(image) + payload + struct.pack("<I", length) + b"signature"


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstd], ids=["gzip", "xz", "zstd"])
def test_a_packed_kernel_is_unpacked(pack: Callable[[bytes], bytes]) -> None:
    assert decompress(bz_image(pack(ELF), len(ELF))) == ELF


@pytest.mark.parametrize(
    "image",
    [
        b"\0" * 4096,
        bz_image(b"LZO?" + ELF, len(ELF)),
        bz_image(gzip.compress(ELF), len(ELF) + 1),
        bz_image(gzip.compress(b"not a kernel"), 12),
    ],
    ids=["no kernel", "packed otherwise", "length differs", "not ELF"],
)
def test_what_cannot_be_unpacked_is_left_as_it_is(image: bytes) -> None:
    assert decompress(image) is None


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A kernel whose modules are small but real ELF files, one of them packed."""
    base = tmp_path / "base"
    modules = base / "lib/modules" / RELEASE
    needs = {"virtio_blk": "", "vfio-pci-core": "", "vfio-pci": "vfio-pci-core", "tun": "", "unwanted": ""}
    for name, others in needs.items():
        source = f'__attribute__((section(".modinfo"), used)) static const char depends[] = "depends={others}";'
        file = modules / "kernel/drivers" / f"{name}.ko"
        file.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-x", "c", "-c", "-o", str(file), "-"], input=source.encode(), check=True)
    packed = modules / "kernel/drivers/tun.ko"
    packed.with_suffix(".ko.xz").write_bytes(lzma.compress(packed.read_bytes()))
    packed.unlink()
    (modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    (modules / "modules.builtin.modinfo").write_bytes(b"")
    (modules / "modules.order").write_text("".join(f"kernel/drivers/{name}.ko\n" for name in needs))
    subprocess.run(["/sbin/depmod", "-b", str(base), RELEASE], check=True)
    # Without symbols in these files depmod finds no dependency; this one is what it would say.
    text = (modules / "modules.dep").read_text()
    dependent = "kernel/drivers/vfio-pci.ko:"
    assert dependent in text
    (modules / "modules.dep").write_text(text.replace(dependent, f"{dependent} kernel/drivers/vfio-pci-core.ko"))
    return Kernel(tmp_path / "vmlinuz", None, modules, RELEASE)


def test_modules_come_with_what_they_need(kernel: Kernel) -> None:
    assert modules_needed(kernel, ["vfio_pci", "virtio-pci", "tun"]) == [
        "kernel/drivers/vfio-pci.ko",
        "kernel/drivers/vfio-pci-core.ko",
        "kernel/drivers/tun.ko.xz",
    ]


def test_a_module_that_the_kernel_does_not_have_is_named(kernel: Kernel) -> None:
    with pytest.raises(ImageBuildFailed, match=f"kernel {RELEASE} has no module vfio_pcie"):
        modules_needed(kernel, ["vfio_pcie"])


@dataclass
class Member:
    mode: int
    owner: tuple[int, int]
    data: bytes


def read_archive(data: bytes) -> dict[str, Member]:
    """By the kernel's description of the format; not with the code under test."""
    members: dict[str, Member] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name_end = at + 110 + fields[11]
        assert data[name_end - 1] == 0
        name = data[at + 110 : name_end - 1].decode()
        start = (name_end + 3) & ~3
        if name == "TRAILER!!!":
            return members
        assert name not in members, f"{name} is there twice"
        assert not (parent := name.rpartition("/")[0]) or stat.S_ISDIR(members[parent].mode), f"{name} before {parent}"
        members[name] = Member(fields[1], (fields[2], fields[3]), data[start : start + fields[6]])
        at = (start + fields[6] + 3) & ~3


def test_the_initramfs_holds_init_busybox_and_the_modules(kernel: Kernel) -> None:
    members = read_archive(build_initrd(PART, kernel, b"the busybox"))
    assert all(member.owner == (0, 0) for member in members.values())
    assert members["usr/lib/guest/busybox"] == Member(stat.S_IFREG | 0o755, (0, 0), b"the busybox")
    assert members["init"].data == (INIT_FILES / "initrd.sh").read_bytes()
    assert members["init"].mode == stat.S_IFREG | 0o755
    assert members["usr/lib/guest/agent/main.py"].data == (INIT_FILES / "agent/main.py").read_bytes()
    assert members["bin/busybox"] == Member(stat.S_IFLNK | 0o777, (0, 0), b"/usr/lib/guest/busybox")
    assert members["usr/lib/guest/modules"].data == b'early="virtio_blk"\nlate="vfio-pci"\n'
    modules = {name.rpartition("/")[2] for name in members if name.endswith((".ko", ".xz"))}
    assert modules == {"virtio_blk.ko", "vfio-pci.ko", "vfio-pci-core.ko", "tun.ko"}
    tun = members[f"usr/lib/modules/{RELEASE}/kernel/drivers/tun.ko"]
    assert tun.data.startswith(b"\x7fELF")
    assert f"usr/lib/modules/{RELEASE}/modules.dep.bin" in members


def test_equal_inputs_make_equal_archives(kernel: Kernel) -> None:
    assert build_initrd(PART, kernel, b"busybox") == build_initrd(PART, kernel, b"busybox")


def test_every_file_of_the_guest_counts_for_the_key(tmp_path: Path) -> None:
    agent = [f"{AGENT}/{path.name}" for path in (INIT_FILES / AGENT).glob("*.py")]
    assert f"{AGENT}/main.py" in agent
    (tmp_path / AGENT).mkdir()
    for name in (*FILES.values(), *agent):
        (tmp_path / name).write_bytes((INIT_FILES / name).read_bytes())
    before = initrd_inputs(PART, tmp_path)
    assert before == initrd_inputs(PART)
    for name in (*FILES.values(), *agent):
        text = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(text + b"\n")
        assert initrd_inputs(PART, tmp_path) != before, name
        (tmp_path / name).write_bytes(text)


def test_archive_makes_the_directories_on_the_way() -> None:
    archive = Archive()
    archive.file("a/b/c", b"text")
    archive.directory("a/b")
    archive.file("a/d", b"", executable=True)
    members = read_archive(archive.finish())
    assert list(members) == ["a", "a/b", "a/b/c", "a/d"]
    assert members["a/b/c"].mode == stat.S_IFREG | 0o644


def test_a_module_packed_in_an_unknown_way_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.ko.lzo"
    path.write_bytes(b"????")
    with pytest.raises(ImageBuildFailed, match=r"odd\.ko\.lzo: packed in a way not known here"):
        read_module(path)


@pytest.mark.parametrize("note", [NOTE, b""], ids=["pvh", "no pvh"])
@pytest.mark.parametrize(
    ("modules", "place"),
    [
        ("lib/modules", f"boot/vmlinuz-{RELEASE}"),
        ("usr/lib/modules", f"boot/vmlinuz-{RELEASE}"),
        ("usr/lib/modules", f"usr/lib/modules/{RELEASE}/vmlinuz"),
    ],
    ids=["6.1", "6.12", "7.3"],
)
def test_kernel_packages_are_taken_apart(tmp_path: Path, modules: str, place: str, note: bytes) -> None:
    kernel_file = ELF + note
    image = bz_image(gzip.compress(kernel_file), len(kernel_file))
    indexes = {f"{modules}/{RELEASE}/{name}": b"" for name in ("modules.order", "modules.builtin")}
    packages = [
        package(tmp_path, "linux-image-meta", {}),
        package(tmp_path, "linux-binary", {place: image}),
        package(tmp_path, "linux-modules", indexes),
    ]
    out = tmp_path / "out"
    out.mkdir()
    unpack_kernel(packages, out)
    kernel = Kernel.at(out)
    assert kernel.release == RELEASE
    assert kernel.image.read_bytes() == image
    assert (kernel.bare.read_bytes() if kernel.bare else None) == (kernel_file if note else None)
    assert (kernel.modules / "modules.dep").exists()
    assert sorted(path.name for path in out.iterdir()) == ["modules", *(["vmlinux"] if note else []), "vmlinuz"]


def test_packages_without_a_kernel_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ImageBuildFailed, match=r"hold no kernel with its modules: linux-image-meta\.deb"):
        unpack_kernel([package(tmp_path, "linux-image-meta", {})], out)


def test_a_missing_depmod_is_named_with_its_package(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu.tools.shutil.which", lambda name, path=None: None)
    with pytest.raises(ToolMissing, match=r"depmod is needed .* apt-get install kmod"):
        build_initrd(PART, kernel, b"")
