"""The kernel's interface as written down in vfio/abi_build.py: it is what the headers say, and _abi.py follows it.

The headers are those of the system's C compiler; VFIO_HEADERS may name further include directories, separated by
colons, such as those of newer kernels.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vfio import _abi
from vfio._abi import ffi
from vfio.abi_build import CONSTANTS, STRUCTS, generate

COMPILER = shutil.which(os.environ.get("CC", "cc"))
INCLUDES = [None, *filter(None, os.environ.get("VFIO_HEADERS", "").split(":"))]


def syntax(text: str) -> str:
    return ast.dump(ast.parse(text))


def test_the_generated_module_is_up_to_date() -> None:
    committed = Path(_abi.__file__).read_text(encoding="utf-8")
    assert syntax(generate()) == syntax(committed), "run python -m vfio.abi_build"


def test_the_constants_are_in_the_module() -> None:
    for group in CONSTANTS:
        for name, value in group.values.items():
            assert getattr(_abi, name) == value


class Headers:
    def __init__(self, include: str | None, scratch: Path) -> None:
        assert COMPILER is not None
        self.command = [COMPILER, "-x", "c", "-Wall", "-Werror"]
        if include is not None:
            # Of a whole /usr/include only what is the kernel's, and this machine's: with another C library's headers
            # this compiler would not get along.
            machine = subprocess.run([COMPILER, "-dumpmachine"], check=True, capture_output=True, text=True).stdout
            kernel = scratch / "include"
            kernel.mkdir()
            for name in ("linux", "asm", "asm-generic"):
                places = [Path(include, name), Path(include, machine.strip(), name)]
                (kernel / name).symlink_to(next(place for place in places if place.is_dir()).resolve())
            self.command += ["-isystem", str(kernel)]
        self.scratch = scratch
        text = self.run('printf("%d\\n", LINUX_VERSION_CODE);', ["linux/version.h"])
        self.version = (int(text) >> 16, int(text) >> 8 & 0xFF)

    def have(self, header: str) -> bool:
        source = f'#if !__has_include(<{header}>)\n#error "no"\n#endif\n'
        done = subprocess.run([*self.command, "-E", "-"], input=source, text=True, capture_output=True)
        return done.returncode == 0

    def run(self, body: str, headers: list[str]) -> str:
        includes = "".join(f"#include <{header}>\n" for header in ("stdio.h", "stddef.h", *headers))
        program = self.scratch / "program"
        subprocess.run(
            [*self.command, "-", "-o", str(program)],
            input=f"{includes}int main(void) {{\n{body}\nreturn 0; }}\n",
            text=True,
            check=True,
        )
        return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler to ask")
@pytest.mark.parametrize("include", INCLUDES)
def test_every_size_offset_and_number_is_the_headers(include: str | None, tmp_path: Path) -> None:
    headers = Headers(include, tmp_path)
    if not headers.have("linux/vfio.h"):
        pytest.skip("the system has no kernel headers (linux-libc-dev)")
    assert compare(headers) > 150


def compare(headers: Headers) -> int:
    """Compare all that these headers have with the tables; how much that was."""
    usable = [h for h in ("linux/vfio.h", "linux/iommufd.h", "linux/pci_regs.h") if headers.have(h)]
    lines = []
    expected: dict[str, int] = {}
    grown = set()
    for struct in STRUCTS:
        if struct.header not in usable or struct.since > headers.version:
            continue
        key = f"sizeof struct {struct.name}"
        lines.append(f'printf("{key}=%zu\\n", sizeof(struct {struct.name}));')
        expected[key] = ffi.sizeof(f"struct {struct.name}")
        if struct.grows:
            grown.add(key)
        for field in struct.field_names():
            key = f"offsetof struct {struct.name}.{field}"
            lines.append(f'printf("{key}=%zu\\n", offsetof(struct {struct.name}, {field}));')
            expected[key] = ffi.offsetof(f"struct {struct.name}", field)
    for group in CONSTANTS:
        if group.header not in usable or group.since > headers.version:
            continue
        for name, value in group.values.items():
            lines.append(f'printf("{name}=%lld\\n", (long long)({name}));')
            expected[name] = value
    text = headers.run("\n".join(lines), usable)
    actual = {name: int(value) for name, _, value in (line.partition("=") for line in text.splitlines())}
    assert actual.keys() == expected.keys()
    wrong = {
        name: (value, actual[name])
        for name, value in expected.items()
        # A struct that later kernels appended to may be longer than what is used of it.
        if not (value <= actual[name] if name in grown else value == actual[name])
    }
    assert wrong == {}
    return len(actual)
