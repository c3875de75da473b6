"""Recipes: what goes into a guest, as plain data read from a TOML file such as images/trixie.toml.

A recipe has three parts that are built and cached apart, because they change at different times: the root file
system, the kernel with its modules, and the sysroot against which C for the guest is compiled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qemu.settings import Table, read_toml

SUITE = re.compile(r"[a-z][a-z0-9-]*")
PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.~-]+")
MODULE = re.compile(r"[A-Za-z0-9_-]+")
USER = re.compile(r"[a-z_][a-z0-9_-]*")
WORD = re.compile(r"[!-~]+")
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
    """

    source: Source
    package: str
    early: tuple[str, ...]
    late: tuple[str, ...]
    available: tuple[str, ...]
    command_line: tuple[str, ...]


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
        table = read_toml(path)
        architecture = table.string("architecture", '"amd64"', valid=lambda text: text == "amd64")
        root_table = table.table("root", "a table with the root file system")
        source = _source(root_table, None)
        recipe = cls(
            path.stem,
            architecture,
            _root(root_table, source),
            _kernel(table.table("kernel", "a table with the kernel"), source),
            _sysroot(table.table("sysroot", "a table with the sysroot"), source),
        )
        table.finish()
        return recipe


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


def _kernel(table: Table, root_source: Source) -> KernelPart:
    modules = table.table("modules", "a table with the lists early, late and available")
    names = "a list of kernel module names"
    part = KernelPart(
        _source(table, root_source),
        table.string(
            "package",
            'a kernel package such as "linux-image-cloud-amd64"',
            valid=re.compile("linux-image-.+").fullmatch,
        ),
        modules.strings("early", names, valid=MODULE.fullmatch),
        modules.strings("late", names, default=(), valid=MODULE.fullmatch),
        modules.strings("available", names, default=(), valid=MODULE.fullmatch),
        table.strings(
            "command_line", "a list of words for the kernel's command line", default=(), valid=WORD.fullmatch
        ),
    )
    modules.finish()
    table.finish()
    return part


def _sysroot(table: Table, root_source: Source) -> SysrootPart:
    part = SysrootPart(_source(table, root_source), _packages(table))
    table.finish()
    return part
