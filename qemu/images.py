"""Guest images: builds what a recipe asks for, once, and says where it is.

An image has four parts, each cached under a key of all that went into it: the root file system, the kernel with its
modules, the sysroot for compiling C, and the initramfs, which is made in a moment from the kernel and the files in
images/. So another kernel costs no new root, and a change to init costs next to nothing.

`python -m qemu.images --help` tells how to use it from the shell.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import qemu.kernel
from qemu.bootstrap import build_root, fetch_inputs, fetch_packages, root_inputs
from qemu.cache import Cache, Progress, key_of
from qemu.errors import HarnessError
from qemu.initrd import build_initrd, initrd_inputs
from qemu.kernel import Kernel, has_module, unpack_kernel
from qemu.kernelbuild import build_inputs, build_kernel, ensure_tools
from qemu.recipe import Recipe
from qemu.sysroot import SUPERFLUOUS, unpack_sysroot

__all__ = ["Image", "Recipe", "ensure_image", "image_key", "silent"]

DEFAULT_RECIPE = Path("images/trixie.toml")


@dataclass(frozen=True)
class Image:
    """What a guest is started from. The files belong to the cache: read them, never write them.

    `kernel` starts anywhere. `bare_kernel`, where there is one, is the same kernel unpacked, for TCG: it spares about
    a second there. (A KVM that opens but cannot run a guest fails at once with the former, and never with the latter.)
    `root` is a raw ext4 image for a read-only virtio-blk disk with the serial `root`; `sysroot` a directory for the
    compiler; `modules` the kernel's modules; `cmdline` what its command line is to begin with. `key` is another one
    whenever anything in the image is.
    """

    kernel: Path
    bare_kernel: Path | None
    initrd: Path
    root: Path
    sysroot: Path
    modules: Path
    key: str
    recipe: str
    release: str
    cmdline: tuple[str, ...]

    def has_driver(self, module: str) -> bool:
        """Whether the kernel has this module, or has it built in."""
        return has_module(self.modules, module)


@dataclass(frozen=True)
class _Keys:
    root: str
    kernel: str
    sysroot: str
    initrd: str


def _keys(recipe: Recipe) -> _Keys:
    # What unpacks them counts, too: a cache outlives many versions of this program.
    architecture = recipe.architecture
    root = key_of("root", *root_inputs(recipe.root, architecture))
    fetched = fetch_inputs(recipe.kernel.source, [recipe.kernel.package], architecture)
    if recipe.kernel.compiled:
        kernel = key_of("kernel", *fetched, *build_inputs(dict(recipe.kernel.options)))
    else:
        kernel = key_of("kernel", *fetched, inspect.getsource(qemu.kernel))
    fetched = fetch_inputs(recipe.sysroot.source, recipe.sysroot.packages, architecture)
    sysroot = key_of("sysroot", *fetched, repr(SUPERFLUOUS), inspect.getsource(unpack_sysroot))
    return _Keys(root, kernel, sysroot, key_of("initrd", root, kernel, sysroot, *initrd_inputs(recipe.kernel)))


def image_key(recipe: Recipe) -> str:
    """The key that the recipe's image has or would have; builds nothing."""
    keys = _keys(recipe)
    return key_of(keys.root, keys.kernel, keys.sysroot, keys.initrd, *recipe.kernel.command_line)


def ensure_image(recipe: Recipe, progress: Progress | None = None, cache: Cache | None = None) -> Image:
    """The recipe's image, after building those of its parts that are not in the cache.

    `progress` is told what is being done, a line at a time. The first time takes about a minute and needs a package
    mirror, and some minutes more where a kernel is to be compiled; after that, milliseconds. Raises ToolMissing,
    RecipeError, or ImageBuildFailed.
    """
    tell = progress or silent
    store = cache or Cache()
    keys = _keys(recipe)
    architecture = recipe.architecture

    def make_root(out: Path) -> None:
        build_root(recipe.root, architecture, out, tell)

    def make_source(out: Path) -> None:
        source, package = recipe.kernel.source, recipe.kernel.package
        fetch_packages(source, [package], architecture, out, lambda line: tell(f"kernel: {line}"))

    def make_kernel(out: Path) -> None:
        source, package = recipe.kernel.source, recipe.kernel.package
        if recipe.kernel.compiled:
            ensure_tools(lambda line: tell(f"kernel: {line}"))
            # Kept, because there is more than one kernel to be made of it.
            key = key_of("source", *fetch_inputs(source, [package], architecture))
            (fetched,) = store.ensure("source", key, make_source, tell).iterdir()
            build_kernel(fetched, dict(recipe.kernel.options), out, lambda line: tell(f"kernel: {line}"))
            return
        packages = fetch_packages(source, [package], architecture, out, lambda line: tell(f"kernel: {line}"))
        tell("kernel: unpacking")
        unpack_kernel(packages, out)
        _remove(packages)

    def make_sysroot(out: Path) -> None:
        source, names = recipe.sysroot.source, recipe.sysroot.packages
        packages = fetch_packages(source, names, architecture, out, lambda line: tell(f"sysroot: {line}"))
        tell("sysroot: unpacking")
        unpack_sysroot(packages, out)
        _remove(packages)

    root = store.ensure("root", keys.root, make_root, tell)
    kernel = Kernel.at(store.ensure("kernel", keys.kernel, make_kernel, tell))
    sysroot = store.ensure("sysroot", keys.sysroot, make_sysroot, tell)

    def make_initrd(out: Path) -> None:
        (out / "initrd").write_bytes(build_initrd(recipe.kernel, kernel, (root / "busybox").read_bytes(), sysroot))

    initrd = store.ensure("initrd", keys.initrd, make_initrd, tell)
    return Image(
        kernel=kernel.image,
        bare_kernel=kernel.bare,
        modules=kernel.modules,
        initrd=initrd / "initrd",
        root=root / "root.ext4",
        sysroot=sysroot,
        key=image_key(recipe),
        recipe=recipe.name,
        release=kernel.release,
        cmdline=recipe.kernel.command_line,
    )


def silent(_line: str) -> None:
    """A `progress` that says nothing."""


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 for an error, which is told in one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        code = _COMMANDS[options.command](options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read this has read enough, such as `head`. Python would try to flush once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except HarnessError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("images: interrupted; nothing half-built was kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qemu.images",
        description="Build guest images, and look after the cache they are kept in "
        "(VFIO_GUESTS_CACHE, or else vfio-guests in the user's cache directory). "
        "Packages come from this machine's own Debian mirror, if it has one; VFIO_GUESTS_MIRROR names another.",
    )
    parser.add_argument("--json", action="store_true", help="print what is found as JSON, for programs")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("build", "build the image of a recipe, unless it is there, and print where its files are"),
        ("key", "print the key of a recipe's image, built or not: a key for a CI job's cache"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "recipe", nargs="?", type=Path, default=DEFAULT_RECIPE, help="a recipe (default: %(default)s)"
        )
    commands.add_parser("list", help="list what is in the cache: size, and days since it was last used")
    text = "remove from the cache what was not used for some days"
    command = commands.add_parser("gc", help=text, description=text)
    command.add_argument("--days", type=float, default=30.0, help="how many days (default: %(default)g)")
    return parser


def _build(options: argparse.Namespace) -> int:
    image = ensure_image(Recipe.load(options.recipe), lambda line: print(line, file=sys.stderr, flush=True))
    facts = {name: str(value) for name, value in vars(image).items() if name != "cmdline"}
    facts["cmdline"] = " ".join(image.cmdline)
    print(json.dumps(facts, indent=2) if options.json else "\n".join(f"{name:12} {facts[name]}" for name in facts))
    return 0


def _key(options: argparse.Namespace) -> int:
    key = image_key(Recipe.load(options.recipe))
    print(json.dumps({"key": key}) if options.json else key)
    return 0


def _list(options: argparse.Namespace) -> int:
    cache = Cache()
    now = time.time()
    rows = [(entry, entry.size(), (now - entry.used) / 86400) for entry in cache.entries()]
    if options.json:
        entries = [
            {"kind": entry.kind, "key": entry.key, "bytes": size, "days_unused": round(days, 2)}
            for entry, size, days in rows
        ]
        print(json.dumps({"cache": str(cache.root), "entries": entries}, indent=2))
        return 0
    print(f"{cache.root}: {len(rows)} entries, {sum(size for _, size, _ in rows) / 1e6:.0f} MB")
    for entry, size, days in rows:
        print(f"  {entry.kind:10} {entry.key}  {size / 1e6:8.1f} MB  unused for {days:.1f} days")
    return 0


def _gc(options: argparse.Namespace) -> int:
    removed = Cache().collect(options.days * 86400)
    names = [entry.path.name for entry in removed]
    print(json.dumps({"removed": names}) if options.json else "\n".join([f"{len(names)} removed", *names]))
    return 0


_COMMANDS = {"build": _build, "key": _key, "list": _list, "gc": _gc}

if __name__ == "__main__":
    sys.exit(main())
