"""Builds a kernel from Debian's linux-source package and the options of a recipe, for guests that need what no
packaged kernel has.

It takes minutes, so it runs at the lowest priority and says every few seconds where it is. All of it happens in the
directory that it is given; Ctrl-C ends the compiler and everything under it.
"""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qemu.cache import Progress
from qemu.errors import ImageBuildFailed, ToolMissing
from qemu.kconfig import render, unfulfilled
from qemu.kernel import decompress
from qemu.tools import find_tool, last_lines, run_tool, watch_tool

HOST_PACKAGES = Path(__file__).with_name("host-packages")
TELL_SECONDS = 5.0
STOP_SECONDS = 10.0
"""How long make may take to end its children."""

ENVIRONMENT = {"LC_ALL": "C", "KBUILD_BUILD_USER": "guest", "KBUILD_BUILD_HOST": "guest"}
"""With the search path, all that make is given: a kernel's makefiles take many a variable for an order, and under
another make there are such that are meant for that one."""

CONFIGURE = ("ARCH=x86_64", "KCONFIG_ALLCONFIG=wanted.config", "allnoconfig")
BUILD = ("ARCH=x86_64", "bzImage", "modules")
INSTALL = ("ARCH=x86_64", "INSTALL_MOD_PATH=installed", "modules_install")


def build_inputs(options: Mapping[str, str]) -> list[str]:
    """All that decides what `build_kernel` makes of a package, the compiler aside."""
    return [render(options), repr((CONFIGURE, BUILD, INSTALL, ENVIRONMENT)), inspect.getsource(_collect)]


def ensure_tools(progress: Progress, script: Path = HOST_PACKAGES) -> None:
    """See to it that what a kernel is built with is there: installed when root. Raises ToolMissing with the command."""
    with subprocess.Popen(
        [script, "kernel"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said: deque[str] = deque(maxlen=100)
        for line in process.stdout:
            said.append(line)
            if line.startswith("host-packages:"):
                progress(line.strip())
    if process.returncode != 0:
        raise ToolMissing("what a kernel is built with is not there:\n" + last_lines("".join(said)))


def build_kernel(package: Path, options: Mapping[str, str], out: Path, progress: Progress) -> None:
    """Puts vmlinuz, vmlinux, config and modules/RELEASE into the directory `out`, from a linux-source package.

    About 3 GB are needed there meanwhile. Raises ToolMissing, or ImageBuildFailed, which names the options that could
    not be had, or ends with what the compiler said last.
    """
    scratch = out / "build"
    scratch.mkdir()
    progress("unpacking the source")
    tree = _unpack(package, scratch)
    progress("configuring")
    (tree / "wanted.config").write_text(render(options))
    _make(tree, CONFIGURE, "configuring the kernel")
    config = (tree / ".config").read_text()
    if missed := unfulfilled(options, config):
        raise ImageBuildFailed(
            f"{package.name}: the kernel's configuration does not come out as the recipe wants it. Most often an "
            "option depends on another one, which then has to be asked for, too:\n"
            + "\n".join(f"    {line}" for line in missed)
        )
    jobs = len(os.sched_getaffinity(0))
    progress(f"compiling with {jobs} processors, which takes some minutes")
    _make(tree, (f"-j{jobs}", *BUILD), "compiling the kernel", _Teller(progress))
    _make(tree, INSTALL, "installing the kernel's modules")
    _collect(tree, out)
    shutil.rmtree(scratch)


def _unpack(package: Path, scratch: Path) -> Path:
    run_tool(["dpkg-deb", "-x", str(package), str(scratch)], doing=f"unpacking {package.name}")
    archives = list(scratch.glob("usr/src/linux-source-*.tar.xz"))
    if len(archives) != 1:
        raise ImageBuildFailed(f"{package.name} holds no usr/src/linux-source-*.tar.xz")
    _run([find_tool("tar"), "-xf", str(archives[0])], scratch, f"unpacking {archives[0].name}")
    archives[0].unlink()
    trees = list(scratch.glob("*/Kbuild"))
    if len(trees) != 1:
        raise ImageBuildFailed(f"{archives[0].name} holds no kernel's source")
    return trees[0].parent


def _collect(tree: Path, out: Path) -> None:
    image = (tree / "arch/x86/boot/bzImage").read_bytes()
    (out / "vmlinuz").write_bytes(image)
    config = (tree / ".config").read_text()
    (out / "config").write_text(config)
    if "\nCONFIG_PVH=y" in config and (bare := decompress(image)) is not None:
        (out / "vmlinux").write_bytes(bare)
    (modules,) = (tree / "installed/lib/modules").iterdir()
    run_tool(["depmod", "-b", str(tree / "installed"), modules.name], doing=f"indexing the modules of {modules.name}")
    for link in ("build", "source"):
        (modules / link).unlink(missing_ok=True)
    (out / "modules").mkdir()
    modules.rename(out / "modules" / modules.name)


class _Teller:
    """Of make's lines says one every few seconds: how many files there were, and which is the latest."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._began = self._told = time.monotonic()
        self._files = 0

    def __call__(self, line: str) -> bool:
        step, _, file = line.strip().partition(" ")
        if step in ("AR", "AS", "CC", "HOSTCC", "LD"):
            self._count(file)
        return True

    def _count(self, file: str) -> None:
        self._files += 1
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            self._progress(f"compiling: {self._files} files in {now - self._began:.0f} s, {file.split()[-1]}")


def _ignore(_line: str) -> bool:
    return True


def _make(tree: Path, arguments: Sequence[str], doing: str, on_line: Callable[[str], bool] = _ignore) -> None:
    _run([find_tool("nice"), "-n", "19", find_tool("make"), *arguments], tree, doing, on_line)


def _run(argv: Sequence[str], directory: Path, doing: str, on_line: Callable[[str], bool] = _ignore) -> None:
    watch_tool(
        argv,
        doing=f"{doing}: it",
        on_line=on_line,
        asking=signal.SIGTERM,
        patience=STOP_SECONDS,
        environment={**ENVIRONMENT, "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"},
        directory=directory,
    )
