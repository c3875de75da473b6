"""How much of the code the tests run, on the host and in the guest: Python by coverage.py, the C core by gcov.

    python -m tests.measure_coverage                            # unit tests, and the tests in a guest
    python -m tests.measure_coverage --host                     # unit tests only
    python -m tests.measure_coverage -- -k control              # of both, only these

Both ends count into one table: a line has run if it has run on either. In the guest it is what the guest's own pytest
runs that counts, fetched after each test, so a crash costs only the test it came in; not the driver that end-to-end
tests start, which may write no file. The C core is compiled anew for both, and its counts in the guest's pytest are
fetched after each test as well; those of processes that tests start are written when they end. Its own test programs,
compiled under sanitizers, do not count. The report is in build/coverage.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from netbridge.datapath import build
from qemu.cache import Cache

OUT = Path("build/coverage")
# No branches: the guest's Python has only its own means to measure, and before 3.14 they know none.
CONFIGURATION = """\
[run]
branch = false
parallel = true
source = netbridge, vfio, qemu, images
data_file = {out}/data
patch = subprocess
disable_warnings = module-not-imported, no-data-collected, couldnt-parse

[paths]
project =
    {root}
    /code

[report]
skip_empty = true
omit =
    tests/*
    */tests/*
"""
# Called by this name, because it is by its options' names that the cache tells one build for the guest from another.
COMPILER = "gcc-that-keeps-counts"
WRAPPER = """\
#!/bin/sh
case " $* " in *" -shared "*) set -- "$@" {keeper} ;; esac
exec gcc "$@" --coverage -O0
"""
# Called after each test: see images/remote_pytest.py. Counts that are written down are added to those in the file.
KEEPER = """\
void __gcov_dump(void);
void __gcov_reset(void);
__attribute__((visibility("default"))) void gcov_keep_counts(void) { __gcov_dump(); __gcov_reset(); }
"""


@contextmanager
def core_for_gcov(objects: Path) -> Iterator[None]:
    """The extension in place is one that counts its lines, within the block."""
    flags = {"CFLAGS": "--coverage -O0", "LDFLAGS": "--coverage"}
    before = {name: os.environ.get(name) for name in flags}
    os.environ.update(flags)
    try:
        built = Path(build.builder(str(build.CORE)).compile(tmpdir=str(objects)))
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    beside = Path(shutil.copy(built, build.HERE / f".{built.name}.new"))
    try:
        beside.replace(build.HERE / built.name)
        yield
    finally:
        # In a process of its own: this one has been told to compile for gcov.
        subprocess.run([sys.executable, str(build.HERE / "build.py")], check=True, stdout=subprocess.DEVNULL)


Lines = dict[str, dict[int, int]]
"""Of each source of the core, how often each of its lines that can run has run."""


def counted(notes: Path, core: Path) -> Lines:
    """What gcov makes of a file of notes, and of the counts beside it."""
    command = ["gcov", "--json-format", "--stdout", notes.name]
    said = subprocess.run(command, check=False, capture_output=True, cwd=notes.parent).stdout
    found: Lines = {}
    for document in said.splitlines():
        for file in json.loads(document)["files"]:
            path = Path.cwd() / file["file"]  # as the compiler was told, from here
            if path.parent == core:
                lines = found.setdefault(path.name, {})
                for line in file["lines"]:
                    lines[line["line_number"]] = lines.get(line["line_number"], 0) + line["count"]
    return found


def add(total: Lines, more: Lines) -> None:
    for name, lines in more.items():
        known = total.setdefault(name, {})
        for number, count in lines.items():
            known[number] = known.get(number, 0) + count


def guest_counts(out: Path) -> tuple[Lines, int]:
    """What the core has counted in guests, and in how many processes."""
    total: Lines = {}
    processes = sorted(out.glob("gcov.guest.*"))
    for directory in processes:
        for counts in directory.glob("*.gcda"):
            notes = [path for path in Cache().root.glob(f"extension-*/{counts.stem}.gcno") if same_build(path, counts)]
            for path in notes[:1]:
                shutil.copy(path, directory)
                add(total, counted(directory / path.name, build.CORE))
    return total, len(processes)


def same_build(notes: Path, counts: Path) -> bool:
    """Whether the two files are of one compilation: each has its stamp in the third word (gcc's gcov-io.h)."""
    stamps = []
    for path in (notes, counts):
        with path.open("rb") as file:
            stamps.append(file.read(12)[8:])
    return stamps[0] == stamps[1]


def run(*words: str, rc: Path, **more: str) -> int:
    environment = os.environ | {"COVERAGE_PROCESS_START": str(rc), "COVERAGE_RCFILE": str(rc)} | more
    return subprocess.run([sys.executable, "-m", *words], check=False, env=environment).returncode


def make_compiler(programs: Path) -> Path:
    """A compiler, in this directory, whose code counts, and whose libraries can be told to write their counts down."""
    keeper = programs / "keeper.o"
    command = ["gcc", "-xc", "-fPIC", "-O2", "-c", "-o", str(keeper), "-"]
    subprocess.run(command, check=True, input=KEEPER.encode())
    wrapper = programs / COMPILER
    wrapper.write_text(WRAPPER.format(keeper=shlex.quote(str(keeper))))
    wrapper.chmod(0o755)
    return wrapper


def guests(options: argparse.Namespace, rc: Path) -> int:
    """Run the tests in a guest whose C counts."""
    programs = (OUT / "bin").absolute()
    programs.mkdir()
    make_compiler(programs)
    tests = ["pytest", "tests/guest", "-q", "--accel", options.accel, f"--guest-coverage={OUT.absolute()}"]
    ignored = ("test_vfio_selftests.py", "test_vfio_device.py")  # they want a guest of their own
    tests += [f"--ignore=tests/guest/{name}" for name in ignored]
    tests += [f"--artefacts={OUT / 'tests'}", *options.pytest]
    return run(*tests, rc=rc, CC=COMPILER, PATH=f"{programs}:{os.environ['PATH']}")


def report(total: Lines, parts: dict[str, Lines]) -> None:
    """A table of the core's sources: all, and what each part has run."""
    print(f"\n{'C core, by gcov':26}{'lines':>8}{'run':>8}" + "".join(f"{name:>10}" for name in parts))
    for name, lines in [*sorted(total.items()), ("all", {})]:
        rows = [lines] if lines else list(total.values())
        count = sum(len(row) for row in rows)
        ran = [[part.get(name, {})] if lines else list(part.values()) for part in parts.values()]
        shares = [share(rows), *(share(part, count) for part in ran)]
        print(f"  {name:24}{count:8}" + f"{shares[0]:>8}" + "".join(f"{text:>10}" for text in shares[1:]))


def share(rows: Sequence[dict[int, int]], of: int = 0) -> str:
    """Per cent of the lines that have run."""
    ran = sum(count > 0 for row in rows for count in row.values())
    lines = of or sum(len(row) for row in rows)
    return f"{100 * ran / lines:.1f} %" if lines else "-"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", action="store_true", help="without a guest")
    parser.add_argument("--accel", default="auto", help="kvm, tcg or auto")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, behind --")
    options = parser.parse_args(arguments)
    shutil.rmtree(OUT, ignore_errors=True)
    objects = (OUT / "objects").absolute()
    objects.mkdir(parents=True)
    rc = (OUT / "coveragerc").absolute()
    rc.write_text(CONFIGURATION.format(out=OUT.absolute(), root=Path.cwd()))
    with core_for_gcov(objects):
        # In one process: those of a parallel run end in a way that writes no counts.
        tests = ["-m", "pytest", "tests/unit", "-q", "-m", "not thorough", *options.pytest]
        code = run("coverage", "run", *tests, rc=rc)
    parts: dict[str, Lines] = {"host": {}}
    for notes in sorted(objects.rglob("*.gcno")):
        add(parts["host"], counted(notes, build.CORE))
    if not options.host:
        code = max(code, guests(options, rc))
        parts["guest"], processes = guest_counts(OUT)
        if not any(OUT.glob("data.guest.*")):
            print("coverage: nothing was measured in a guest: see what pytest said above", file=sys.stderr)
            code = max(code, 1)
    for words in (["combine", "-q", str(OUT)], ["html", "-q", "-d", str(OUT / "html")], ["report"]):
        code = max(code, run("coverage", *words, rc=rc))
    total: Lines = {}
    for part in parts.values():
        add(total, part)
    report(total, parts)
    if not options.host:
        print(f"\nIn guests {processes} runs of pytest, with what their tests have started, have counted C.")
    (OUT / "core.json").write_text(json.dumps(total, indent=2) + "\n")
    print(f"\nline by line: {OUT}/html/index.html, {OUT}/core.json")
    return code


if __name__ == "__main__":
    sys.exit(main())
