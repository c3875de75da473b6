"""Recipes: what goes into a guest, as plain data read from a TOML file such as images/trixie.toml.

A recipe has three parts that are built and cached apart, because they change at different times: the root file
system, the kernel with its modules, and the sysroot against which C for the guest is compiled. One that says
`like = "trixie.toml"` takes the parts, and the lists of modules, that it does not have itself from that one beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qemu.errors import RecipeError
from qemu.kconfig import read_fragment
from qemu.settings import Table, read_toml

SUITE = re.compile(r"[a-z][a-z0-9-]*")
PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.~-]+")
MODULE = re.compile(r"[A-Za-z0-9_-]+")
USER = re.compile(r"[a-z_][a-z0-9_-]*")
WORD = re.compile(r"[!-~]+")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
POCKETS = ("updates", "security")


@dataclass(frozen=True)
class Source:
    """Where packages come from: a Debian suite and the pockets (updates, security) beside it."""

    suite: str
    pockets: tuple[str, ...]


@dataclass(frozen=True)
class User:
    """An unprivileged user of the guest, with a group of the same name and number and no home."""

    name: str
    uid: int


@dataclass(frozen=True)
class RootPart:
    """The root file system. `exclude` and `keep` are dpkg's path filters: a file that both match is kept."""

    source: Source
    packages: tuple[str, ...]
    exclude: tuple[str, ...]
    keep: tuple[str, ...]
    users: tuple[User, ...]


@dataclass(frozen=True)
class KernelPart:
    """The kernel, and what of its modules goes along.

    `early` modules are loaded before the root disk is looked for, `late` ones by init, `available` ones are only
    there; what they depend on comes by itself. `command_line` is what this kernel is to be started with.

    A `package` linux-image-* is a kernel, one linux-source-* is compiled, with `options`: pairs of a name without
    CONFIG_ and a value, the fragments of the recipe laid over each other.
    """

    source: Source
    package: str
    early: tuple[str, ...]
    late: tuple[str, ...]
    available: tuple[str, ...]
    command_line: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    @property
    def compiled(self) -> bool:
        """Whether the package is the source."""
        return self.package.startswith("linux-source-")


@dataclass(frozen=True)
class SysrootPart:
    """The headers and libraries that C for the guest is compiled against: packages unpacked, never run."""

    source: Source
    packages: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """What goes into a guest. `architecture` is Debian's name for it."""

    name: str
    architecture: str
    root: RootPart
    kernel: KernelPart
    sysroot: SysrootPart

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Raises RecipeError, naming file, key and what was expected."""
        return cls._load(path, ())

    @classmethod
    def _load(cls, path: Path, above: tuple[Path, ...]) -> Recipe:
        if path in above:
            raise RecipeError(f"{path}: like: leads back to itself: {' is like '.join(str(one) for one in above)}")
        table = read_toml(path)
        base = None
        if table.has("like"):
            name = table.string("like", 'a recipe beside this one, such as "trixie.toml"', valid=FILE.fullmatch)
            base = cls._load(path.parent / name, (*above, path))
        architecture = table.string(
            "architecture",
            '"amd64"',
            default=base.architecture if base else None,
            valid=lambda text: text == "amd64",
        )
        if base is not None and not table.has("root"):
            root = base.root
        else:
            root_table = table.table("root", "a table with the root file system")
            root = _root(root_table, _source(root_table, None))
        if base is not None and not table.has("kernel"):
            kernel = base.kernel
        else:
            kernel = _kernel(
                table.table("kernel", "a table with the kernel"), root.source, base.kernel if base else None
            )
        if base is not None and not table.has("sysroot"):
            sysroot = base.sysroot
        else:
            sysroot = _sysroot(table.table("sysroot", "a table with the sysroot"), root.source)
        table.finish()
        return cls(path.stem, architecture, root, kernel, sysroot)


def _source(table: Table, default: Source | None) -> Source:
    suite = table.string(
        "suite", 'a Debian suite such as "trixie"', default=default.suite if default else None, valid=SUITE.fullmatch
    )
    pockets = table.strings(
        "pockets",
        f"a list of some of {', '.join(POCKETS)}",
        default=default.pockets if default else (),
        valid=POCKETS.__contains__,
    )
    return Source(suite, pockets)


def _packages(table: Table) -> tuple[str, ...]:
    return table.strings("packages", "a list of Debian package names", valid=PACKAGE.fullmatch)


def _root(table: Table, source: Source) -> RootPart:
    paths = "a list of absolute paths, which may hold * and ?"
    users = []
    for user in table.tables("users", "tables with name and uid"):
        users.append(
            User(
                user.string("name", "a user's name", valid=USER.fullmatch),
                user.integer("uid", "an integer from 1000 to 59999", 1000, 59999),
            )
        )
        user.finish()
    part = RootPart(
        source,
        _packages(table),
        table.strings("exclude", paths, default=(), valid=lambda path: path.startswith("/")),
        table.strings("keep", paths, default=(), valid=lambda path: path.startswith("/")),
        tuple(users),
    )
    table.finish()
    return part


def _kernel(table: Table, root_source: Source, base: KernelPart | None) -> KernelPart:
    source = _source(table, root_source)
    package = table.string(
        "package",
        'a kernel package such as "linux-image-cloud-amd64", or a kernel\'s source such as "linux-source-6.12"',
        valid=re.compile("linux-(image-.+|source-.+)").fullmatch,
    )
    options: dict[str, str] = {}
    if package.startswith("linux-source-"):
        for name in table.strings(
            "config", 'a list of files beside the recipe such as "iommufd.config"', valid=FILE.fullmatch
        ):
            options |= read_fragment(table.path.parent / name)
    if base is not None and not table.has("modules"):
        early, late, available = base.early, base.late, base.available
    else:
        modules = table.table("modules", "a table with the lists early, late and available")
        names = "a list of kernel module names"
        early = modules.strings("early", names, valid=MODULE.fullmatch)
        late = modules.strings("late", names, default=(), valid=MODULE.fullmatch)
        available = modules.strings("available", names, default=(), valid=MODULE.fullmatch)
        modules.finish()
    command_line = table.strings(
        "command_line", "a list of words for the kernel's command line", default=(), valid=WORD.fullmatch
    )
    table.finish()
    return KernelPart(source, package, early, late, available, command_line, tuple(options.items()))


def _sysroot(table: Table, root_source: Source) -> SysrootPart:
    part = SysrootPart(_source(table, root_source), _packages(table))
    table.finish()
    return part
