"""Compiling for the guest: against the sysroot's C library, not this host's.

The sysroot here is a small made-up one, whose C library is of a version that exists nowhere else.
"""

import marshal
import subprocess
import sys
from pathlib import Path

import pytest

from qemu.bytecode import compile_python
from qemu.cache import Cache
from qemu.errors import ImageBuildFailed, RecipeError, ToolMissing
from qemu.sysroot import Extension, cffi_extension, check_library_version, compiled, library_versions, unpack_sysroot
from tests.unit.images_fakes import package

TRIPLET = "x86_64-linux-gnu"
SOURCE = """
#include <Python.h>
#include <guest.h>
#if Py_LIMITED_API != 0x030b0000
#error limited API
#endif
int answer(void) { return strlen(GREETING); }
"""


def c_library(file: Path, version: str) -> None:
    """A shared object that passes for a C library, with one function at the given version."""
    script = file.with_suffix(".map")
    script.write_text(f"GLIBC_{version} {{ global: strlen; local: *; }};")
    options = ["-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-Wl,-soname,libc.so.6"]
    subprocess.run(
        ["gcc", "-x", "c", *options, f"-Wl,--version-script={script}", "-o", str(file), "-"],
        input=b"unsigned long strlen(const char *text) { unsigned long n = 0; while (text[n]) n++; return n; }",
        check=True,
    )


@pytest.fixture
def sysroot(tmp_path: Path) -> Path:
    top = tmp_path / "sysroot-0123456789abcdef"
    libraries = top / "usr/lib" / TRIPLET
    libraries.mkdir(parents=True)
    python = top / "usr/include/python3.13"
    python.mkdir(parents=True)
    (python / "Python.h").write_text("unsigned long strlen(const char *);\n")
    (top / "usr/include" / TRIPLET).mkdir()
    (top / "usr/include" / TRIPLET / "guest.h").write_text('#define GREETING "hello"\n')
    c_library(libraries / "libc.so.6", "2.77")
    (libraries / "libc.so").write_text("INPUT(libc.so.6)\n")
    for name in ("crti.o", "crtn.o"):
        subprocess.run(["gcc", "-x", "c", "-c", "-o", str(libraries / name), "-"], input=b"", check=True)
    return top


@pytest.fixture
def extension(tmp_path: Path) -> Extension:
    source = tmp_path / "answer.c"
    source.write_text(SOURCE)
    return Extension("package._answer", (source,), compile_args=("-Wall", "-Werror", "-fno-builtin"))


def test_it_is_linked_against_the_guest_s_c_library(tmp_path: Path, sysroot: Path, extension: Extension) -> None:
    file = compiled(extension, sysroot, Cache(tmp_path / "cache"), print)
    assert file.name == "_answer.abi3.so"
    assert library_versions(file) == [(2, 77)], "not this host's: that has no such version"
    assert extension.file == Path("package/_answer.abi3.so")


def test_it_is_compiled_again_only_when_something_has_changed(
    tmp_path: Path, sysroot: Path, extension: Extension
) -> None:
    cache = Cache(tmp_path / "cache")
    lines: list[str] = []
    first = compiled(extension, sysroot, cache, lines.append)
    assert [line for line in lines if line.startswith("compiling")] == ["compiling package._answer for the guest"]
    lines.clear()
    assert compiled(extension, sysroot, cache, lines.append) == first
    assert lines == []
    extension.sources[0].write_text(SOURCE + "int more(void) { return 1; }\n")
    assert compiled(extension, sysroot, cache, lines.append) != first
    moved = Extension(extension.module, extension.sources, compile_args=(*extension.compile_args, "-O0"))
    assert compiled(moved, sysroot, cache, lines.append) != first
    other = sysroot.rename(sysroot.with_name("sysroot-fedcba9876543210"))
    extension.sources[0].write_text(SOURCE)
    assert compiled(extension, other, cache, lines.append) != first


def test_a_header_counts(tmp_path: Path, sysroot: Path, extension: Extension) -> None:
    cache = Cache(tmp_path / "cache")
    header = tmp_path / "more.h"
    header.write_text("#define MORE 1\n")
    with_header = Extension(extension.module, extension.sources, (header,), compile_args=extension.compile_args)
    first = compiled(with_header, sysroot, cache, print)
    header.write_text("#define MORE 2\n")
    assert compiled(with_header, sysroot, cache, print) != first


def test_what_the_compiler_says_is_passed_on_and_nothing_is_kept(
    tmp_path: Path, sysroot: Path, extension: Extension
) -> None:
    extension.sources[0].write_text("int broken(void) { return nothing; }")
    cache = Cache(tmp_path / "cache")
    with pytest.raises(ImageBuildFailed, match=r"(?s)compiling package\._answer for the guest: .*nothing.*undeclared"):
        compiled(extension, sysroot, cache, print)
    assert cache.entries() == []


def test_a_missing_compiler_is_named_with_its_package(
    tmp_path: Path, sysroot: Path, extension: Extension, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("qemu.tools.shutil.which", lambda name, path=None: None)
    with pytest.raises(ToolMissing, match=r"gcc is needed .* apt-get install gcc"):
        compiled(extension, sysroot, Cache(tmp_path / "cache"), print)


def test_asking_for_a_newer_c_library_than_the_guest_s_is_refused(tmp_path: Path, sysroot: Path) -> None:
    newer = tmp_path / "newer.so"
    c_library(newer, "2.78")
    with pytest.raises(ImageBuildFailed, match=r"newer\.so asks for version 2\.78 .* the guest has 2\.77"):
        check_library_version(newer, sysroot)


def test_versions_are_compared_as_numbers(tmp_path: Path, sysroot: Path) -> None:
    older = tmp_path / "older.so"
    c_library(older, "2.9")
    check_library_version(older, sysroot)


BUILDER = """
import cffi
builder = cffi.FFI()
builder.cdef("int answer(void);")
builder.set_source("package._answer", "int answer(void) { return 42; }", py_limited_api=True,
                   include_dirs=[INCLUDE], extra_compile_args=["-O1"], define_macros=[("A", "1"), ("B", None)])
other = 1
"""


def test_a_cffi_build_script_is_understood(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include/a.h").touch()
    script = tmp_path / "build.py"
    script.write_text(BUILDER.replace("INCLUDE", repr(str(tmp_path / "include"))))
    found = cffi_extension(script, "builder", tmp_path / "generated")
    assert found.module == "package._answer"
    assert "answer(void) { return 42; }" in found.sources[0].read_text()
    assert found.headers == (tmp_path / "include/a.h",)
    assert found.compile_args == ("-O1",)
    assert found.define_macros == (("A", "1"), ("B", None))
    assert capfd.readouterr().out == ""
    with pytest.raises(RecipeError, match=r"build\.py: expected a cffi\.FFI object named other, found 1"):
        cffi_extension(script, "other", tmp_path / "generated")
    script.write_text("raise ValueError('no')")
    with pytest.raises(RecipeError, match=r"build\.py: the cffi build script fails: ValueError: no"):
        cffi_extension(script, "builder", tmp_path / "generated")


def test_packages_of_either_layout_land_in_one_tree(tmp_path: Path) -> None:
    old = package(tmp_path, "old", {f"lib/{TRIPLET}/libold.so": b"old", "usr/share/doc/old/readme": b"x"})
    new = package(tmp_path, "new", {f"usr/lib/{TRIPLET}/libnew.so": b"new", "usr/include/new.h": b"h"})
    out = tmp_path / "out"
    out.mkdir()
    unpack_sysroot([old, new], out)
    assert (out / "lib").is_symlink()
    assert sorted(path.name for path in (out / "usr/lib" / TRIPLET).iterdir()) == ["libnew.so", "libold.so"]
    assert (out / "usr/include/new.h").read_bytes() == b"h"
    assert not (out / "usr/share").exists()


@pytest.fixture
def interpreter(sysroot: Path) -> Path:
    """This host's Python in the place of the guest's: the loader is a script that runs it."""
    loader = sysroot / "usr/lib64/ld-linux-x86-64.so.2"
    loader.parent.mkdir()
    loader.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} "$@"\n')
    loader.chmod(0o755)
    (sysroot / "usr/bin").mkdir()
    (sysroot / "usr/bin/python3.13").touch()
    return loader


def test_bytecode_lies_where_python_looks_and_is_used_without_the_source(
    tmp_path: Path, sysroot: Path, interpreter: Path
) -> None:
    module = tmp_path / "answer module.py"
    module.write_text("def where():\n    return __import__('sys')._getframe().f_code.co_filename\n")
    broken = tmp_path / "broken.py"
    broken.write_text("def\n")
    lines: list[str] = []
    compile_python([(broken, "/code/broken.py"), (module, "/code/answer module.py")], sysroot, lines.append)
    assert lines == []
    (made,) = (tmp_path / "__pycache__").iterdir()
    assert made.name == f"answer module.{sys.implementation.cache_tag}.pyc"
    data = made.read_bytes()
    assert int.from_bytes(data[4:8], "little") == 0b01, "known by a hash that is not checked"
    assert marshal.loads(data[16:]).co_filename == "/code/answer module.py"


def test_where_the_guest_s_python_does_not_run_one_is_told_and_goes_without(
    tmp_path: Path, sysroot: Path, interpreter: Path
) -> None:
    module = tmp_path / "answer.py"
    module.write_text("")
    interpreter.write_text("#!/bin/sh\necho 'Illegal instruction' >&2\nexit 132\n")
    lines: list[str] = []
    compile_python([(module, "/code/answer.py")], sysroot, lines.append)
    assert lines == ["no bytecode is made for the guest: its Python does not run here (132: Illegal instruction)"]
    interpreter.unlink()
    lines.clear()
    compile_python([(module, "/code/answer.py")], sysroot, lines.append)
    assert len(lines) == 1
    assert "python3.13-minimal" in lines[0]
    assert not (tmp_path / "__pycache__").exists()
