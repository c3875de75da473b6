"""Kernels compiled from source, with a source package whose makefile plays the kernel's."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu import kernelbuild
from qemu.cache import Cache
from qemu.errors import ImageBuildFailed, ToolMissing
from qemu.kernel import Kernel
from qemu.kernelbuild import build_inputs, build_kernel, ensure_tools
from tests.unit.images_fakes import package

ROOT = Path(__file__).parents[2]
RELEASE = "6.99-test"

# It knows CONFIG_PCI and CONFIG_PVH, no other option. Its modules wait for the image, so that one line is the first.
MAKEFILE = """
allnoconfig:
\t@test -z "$$KERNEL" || { echo "KERNEL is for another make"; exit 1; }
\t@grep -E '^CONFIG_(PCI|PVH)=y' $(KCONFIG_ALLCONFIG) >.config || true
bzImage:
\t@echo "  CC      kernel/fork.o"
\t@mkdir -p arch/x86/boot && echo kernel >arch/x86/boot/bzImage
\t@$(COMPILE)
modules: bzImage
\t@echo "  LD [M]  drivers/net/tun.ko"
modules_install:
\t@mkdir -p $(INSTALL_MOD_PATH)/lib/modules/6.99-test
\t@ln -s $(CURDIR) $(INSTALL_MOD_PATH)/lib/modules/6.99-test/build
\t@touch $(INSTALL_MOD_PATH)/lib/modules/6.99-test/modules.order
\t@touch $(INSTALL_MOD_PATH)/lib/modules/6.99-test/modules.builtin
"""


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a source package; takes what else its makefile does when it compiles."""

    def make(compile_too: str = "true") -> Path:
        tree = tmp_path / "linux-source-6.99"
        tree.mkdir()
        (tree / "Kbuild").touch()
        (tree / "Makefile").write_text(f"COMPILE = {compile_too}\n{MAKEFILE}")
        archive = tmp_path / "source.tar.xz"
        subprocess.run(["tar", "-C", tmp_path, "-cJf", archive, tree.name], check=True)
        files = {"usr/src/linux-source-6.99.tar.xz": archive.read_bytes()}
        return package(tmp_path, "linux-source-6.99-deb", files)

    return make


def build(package: Path, options: dict[str, str], out: Path) -> list[str]:
    told: list[str] = []
    out.mkdir()
    build_kernel(package, options, out, told.append)
    return told


@pytest.mark.thorough
def test_a_kernel_is_built_and_nothing_else_is_left(
    tmp_path: Path, source: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernelbuild, "TELL_SECONDS", 0.0)
    # As it is when this runs under `make vfio-test KERNEL=debug`.
    monkeypatch.setenv("KERNEL", "debug")
    monkeypatch.setenv("MAKEFLAGS", "KERNEL=debug")
    out = tmp_path / "out"
    told = build(source("true"), {"PCI": "y", "USB": "n"}, out)
    assert sorted(path.name for path in out.iterdir()) == ["config", "modules", "vmlinuz"]
    kernel = Kernel.at(out)
    assert (kernel.release, kernel.bare) == (RELEASE, None)
    assert kernel.image.read_text() == "kernel\n"
    assert (kernel.modules / "modules.dep").exists()
    assert not (kernel.modules / "build").is_symlink()
    assert (out / "config").read_text() == "CONFIG_PCI=y\n"
    assert any(line.startswith("compiling: 1 files in ") and line.endswith(", kernel/fork.o") for line in told)


def test_an_option_that_cannot_be_had_is_named(tmp_path: Path, source: Callable[[str], Path]) -> None:
    with pytest.raises(ImageBuildFailed) as failed:
        build(source("true"), {"PCI": "y", "IOMMUFD": "y"}, tmp_path / "out")
    assert str(failed.value).endswith("\n    CONFIG_IOMMUFD: y was asked for, it became n")
    assert "CONFIG_PCI" not in str(failed.value)


@pytest.mark.thorough
def test_a_compiler_s_error_is_what_is_shown(tmp_path: Path, source: Callable[[str], Path]) -> None:
    with pytest.raises(ImageBuildFailed, match="compiling the kernel: it ended with 2 after") as failed:
        build(source("echo 'fork.c:1: error: no such thing'; false"), {}, tmp_path / "out")
    assert "    fork.c:1: error: no such thing" in str(failed.value)


def test_a_package_without_source_is_refused(tmp_path: Path) -> None:
    empty = package(tmp_path, "linux-source-x", {"usr/src/README": b""})
    with pytest.raises(ImageBuildFailed, match=r"linux-source-x\.deb holds no usr/src/linux-source-"):
        build(empty, {}, tmp_path / "out")


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_build_that_is_ended_leaves_no_entry_and_no_compiler(
    tmp_path: Path, source: Callable[[str], Path], number: signal.Signals
) -> None:
    started = tmp_path / "started"
    deb = source(f"echo $$$$ >{started}.new; mv {started}.new {started}; exec sleep 1000")
    code = """
import signal, sys
from pathlib import Path
from qemu.cache import Cache
from qemu.kernelbuild import build_kernel
signal.signal(signal.SIGINT, signal.default_int_handler)
Cache(Path(sys.argv[1])).ensure("kernel", "0" * 16, lambda out: build_kernel(Path(sys.argv[2]), {}, out, print), print)
"""
    cache = Cache(tmp_path / "cache")
    with subprocess.Popen(
        [sys.executable, "-c", code, cache.root, deb], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 60
        while not started.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline, "the build did not come to compile anything"
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=60)
    compiler = int(started.read_text())
    while Path(f"/proc/{compiler}").exists():
        assert time.monotonic() < deadline, "the compiler runs on"
        time.sleep(0.02)
    assert cache.entries() == []
    if number == signal.SIGINT:
        assert not list(cache.root.glob(".kernel-*"))
    # The next one starts afresh, and clears up after the one that was killed.
    place = cache.ensure("kernel", "0" * 16, lambda out: None, lambda line: None)
    assert list(cache.root.glob("*kernel-*")) == [place]


def test_every_input_counts() -> None:
    inputs = [build_inputs(options) for options in ({}, {"PCI": "y"}, {"PCI": "n"}, {"PCI": "y", "USB": "y"})]
    assert len({tuple(one) for one in inputs}) == len(inputs)


def test_missing_tools_are_told_with_the_command(tmp_path: Path) -> None:
    script = tmp_path / "host-packages"
    script.write_text(
        '#!/bin/sh\n[ "$1" = kernel ] && echo "host-packages: missing: flex" && echo "    sudo x" && exit 1'
    )
    script.chmod(0o755)
    told: list[str] = []
    with pytest.raises(ToolMissing, match=r"(?s)not there:.*missing: flex.*sudo x"):
        ensure_tools(told.append, script)


def test_the_script_refuses_another_word() -> None:
    done = subprocess.run([ROOT / "qemu/host-packages", "kernels"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "usage: host-packages [kernel]\n")
