"""Images put together from their parts, and the command line. What would fetch packages is replaced."""

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu import images
from qemu.cache import Cache
from qemu.errors import ImageBuildFailed
from qemu.images import Recipe, ensure_image, image_key

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "images/trixie.toml"


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load(RECIPE)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been built, in order."""
    record: list[str] = []

    def root(_part: object, _architecture: str, out: Path, _progress: object) -> None:
        record.append("root")
        (out / "root.ext4").write_bytes(b"root")
        (out / "busybox").write_bytes(b"busybox")

    def fetch(_source: object, packages: list[str], _architecture: str, out: Path, _progress: object) -> list[Path]:
        record.append("kernel" if packages[0].startswith("linux-image") else "sysroot")
        (out / "a.deb").touch()
        return [out / "a.deb"]

    def kernel(_packages: list[Path], out: Path) -> None:
        (out / "vmlinuz").touch()
        (out / "modules/6.99").mkdir(parents=True)

    def initrd(*_: object) -> bytes:
        record.append("initrd")
        return b"initrd"

    monkeypatch.setattr(images, "build_root", root)
    monkeypatch.setattr(images, "fetch_packages", fetch)
    monkeypatch.setattr(images, "unpack_kernel", kernel)
    monkeypatch.setattr(images, "unpack_sysroot", lambda _packages, _out: None)
    monkeypatch.setattr(images, "build_initrd", initrd)
    monkeypatch.setattr("qemu.images.inspect.getsource", lambda _: "source")
    return record


def test_an_image_is_built_once(tmp_path: Path, recipe: Recipe, built: list[str]) -> None:
    cache = Cache(tmp_path)
    image = ensure_image(recipe, cache=cache)
    assert built == ["root", "kernel", "sysroot", "initrd"]
    assert ensure_image(recipe, cache=cache) == image
    assert len(built) == 4
    assert image.root.read_bytes() == b"root"
    assert image.initrd.read_bytes() == b"initrd"
    assert image.kernel.exists()
    assert image.bare_kernel is None
    assert (image.release, image.recipe, image.cmdline) == ("6.99", "trixie", recipe.kernel.command_line)
    assert image.key == image_key(recipe)
    assert not list(tmp_path.rglob("*.deb"))


def replaced(recipe: Recipe, part: str, **changes: object) -> Recipe:
    return dataclasses.replace(recipe, **{part: dataclasses.replace(getattr(recipe, part), **changes)})


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        (lambda recipe: replaced(recipe, "root", packages=("python3",)), ["root", "initrd"]),
        (lambda recipe: replaced(recipe, "root", users=()), ["root", "initrd"]),
        (lambda recipe: replaced(recipe, "root", exclude=()), ["root", "initrd"]),
        (lambda recipe: replaced(recipe, "kernel", package="linux-image-amd64"), ["kernel", "initrd"]),
        (lambda recipe: replaced(recipe, "kernel", late=("tun",)), ["initrd"]),
        (lambda recipe: replaced(recipe, "sysroot", packages=("libc6",)), ["sysroot", "initrd"]),
        (lambda recipe: replaced(recipe, "kernel", command_line=("debug",)), []),
        (lambda recipe: dataclasses.replace(recipe, name="another"), []),
    ],
    ids=["packages", "users", "excluded paths", "kernel", "modules", "sysroot", "command line", "name"],
)
def test_a_change_builds_only_what_it_is_about(
    tmp_path: Path, recipe: Recipe, built: list[str], change: Callable[[Recipe], Recipe], rebuilt: list[str]
) -> None:
    cache = Cache(tmp_path)
    first = ensure_image(recipe, cache=cache)
    built.clear()
    second = ensure_image(change(recipe), cache=cache)
    assert built == rebuilt
    assert (second.key == first.key) == (change(recipe).kernel == recipe.kernel and not rebuilt)


def test_kernels_of_one_source_fetch_it_once(tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, str]] = []

    def compile_kernel(package: Path, options: dict[str, str], out: Path, _progress: object) -> None:
        assert package.name == "a.deb"
        compiled.append(options)
        (out / "vmlinuz").touch()
        (out / "modules/6.99").mkdir(parents=True)

    def fetch(_source: object, packages: list[str], _architecture: str, out: Path, _progress: object) -> list[Path]:
        built.append(packages[0])
        (out / "a.deb").touch()
        return [out / "a.deb"]

    monkeypatch.setattr(images, "ensure_tools", lambda _progress: None)
    monkeypatch.setattr(images, "build_kernel", compile_kernel)
    monkeypatch.setattr(images, "fetch_packages", fetch)
    monkeypatch.setattr(images, "build_inputs", repr)
    cache = Cache(tmp_path)
    keys = set()
    for _ in range(2):
        for name in ("iommufd", "debug"):
            keys.add(ensure_image(Recipe.load(ROOT / f"images/{name}.toml"), cache=cache).key)
    assert [name for name in built if name.startswith("linux-")] == ["linux-source-6.12"]
    assert built.count("root") == 1
    assert [options["LOCALVERSION"] for options in compiled] == ['"-iommufd"', '"-debug"']
    assert len(keys) == 2


def test_a_failed_part_is_built_again_and_the_others_are_not(
    tmp_path: Path, recipe: Recipe, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)

    def fail(*_: object) -> list[Path]:
        raise ImageBuildFailed("no mirror")

    with monkeypatch.context() as patched:
        patched.setattr(images, "fetch_packages", fail)
        with pytest.raises(ImageBuildFailed, match="no mirror"):
            ensure_image(recipe, cache=cache)
    assert [entry.kind for entry in cache.entries()] == ["root"]
    ensure_image(recipe, cache=cache)
    assert built == ["root", "kernel", "sysroot", "initrd"]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = images.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("VFIO_GUESTS_CACHE", str(tmp_path / "cache"))
    return Cache()


def test_build_prints_where_the_files_are(
    cache: Cache, built: list[str], recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(["build", str(RECIPE)], capsys)
    assert code == 0
    assert re.search(rf"^kernel +{cache.root}/kernel-\w+/vmlinuz$", out, re.MULTILINE)
    assert "sysroot: unpacking" in err
    code, out, err = run(["--json", "build", str(RECIPE)], capsys)
    assert json.loads(out)["key"] == image_key(recipe)
    assert err == ""
    assert len(built) == 4


def test_key_builds_nothing(cache: Cache, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["key", str(RECIPE)], capsys) == (0, f"{image_key(recipe)}\n", "")
    assert not cache.root.exists()


def test_list_and_gc(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"], capsys)[:2] == (0, f"{cache.root}: 0 entries, 0 MB\n")
    old = cache.ensure("root", "0" * 16, lambda _out: None, print)
    (old / "file").write_bytes(b"x" * 2_000_000)
    os.utime(old, (time.time() - 40 * 86400,) * 2)
    cache.ensure("kernel", "1" * 16, lambda _out: None, print)
    capsys.readouterr()
    _, out, _ = run(["list"], capsys)
    assert re.search(r"^  root +0{16} +2\.0 MB  unused for 40\.0 days$", out, re.MULTILINE)
    _, out, _ = run(["--json", "list"], capsys)
    assert [entry["kind"] for entry in json.loads(out)["entries"]] == ["root", "kernel"]
    assert run(["gc"], capsys)[:2] == (0, "1 removed\nroot-0000000000000000\n")
    assert run(["--json", "gc", "--days", "-1"], capsys)[:2] == (0, '{"removed": ["kernel-1111111111111111"]}\n')


def test_a_user_s_mistake_is_one_line(cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(["build", str(tmp_path / "none.toml")], capsys)
    assert (code, out) == (1, "")
    assert err == f"images: {tmp_path}/none.toml: no such file; what there is: no .toml file in {tmp_path}\n"


def test_ctrl_c_is_one_line(
    cache: Cache, built: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "build_root", interrupted)
    assert run(["build", str(RECIPE)], capsys) == (130, "", "images: interrupted; nothing half-built was kept\n")
    assert cache.entries() == []
