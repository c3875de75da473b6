"""How much of the code the tests run: Python on the host and in the guest, and the C core.

    python -m tests.measure_coverage            # unit tests and the tests in a guest
    python -m tests.measure_coverage --host     # unit tests only

Python is measured by coverage.py, in the guest by the same, put there for the purpose; what a guest's own pytest runs
counts, not the driver that it starts, which may write no file. The C core is compiled anew for gcov, loaded by the unit
tests through Python; its own test programs, compiled under sanitizers, do not count. The report is in build/coverage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from netbridge.datapath import build

OUT = Path("build/coverage")
CONFIGURATION = """\
[run]
branch = true
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
"""
SUMMARY = re.compile(r"^File '(.+)'\nLines executed:([\d.]+)% of (\d+)", re.MULTILINE)


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


def c_lines(objects: Path) -> dict[str, tuple[float, int]]:
    """Of each source of the core: per cent of its lines that were run, and how many lines there are."""
    found: dict[str, tuple[float, int]] = {}
    for notes in sorted(objects.rglob("*.gcno")):
        said = subprocess.run(["gcov", "-n", str(notes)], check=False, capture_output=True, text=True).stdout
        for name, share, lines in SUMMARY.findall(said):
            path = Path(name)
            if path.parent == build.CORE:
                found[path.name] = max(found.get(path.name, (0.0, 0)), (float(share), int(lines)))
    return found


def run(*words: str, rc: Path) -> int:
    environment = os.environ | {"COVERAGE_PROCESS_START": str(rc), "COVERAGE_RCFILE": str(rc)}
    return subprocess.run([sys.executable, "-m", *words], check=False, env=environment).returncode


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
    core = c_lines(objects)
    if not options.host:
        tests = ["pytest", "tests/guest", "-q", "--accel", options.accel, f"--guest-coverage={OUT}", *options.pytest]
        ignored = ("test_vfio_selftests.py", "test_vfio_device.py")  # they want a guest of their own
        code |= run(*tests, *(f"--ignore=tests/guest/{name}" for name in ignored), rc=rc)
    run("coverage", "combine", "-q", str(OUT), rc=rc)
    run("coverage", "html", "-q", "-d", str(OUT / "html"), rc=rc)
    run("coverage", "report", rc=rc)
    print("\nC core, by gcov")
    for name, (share, lines) in sorted(core.items()):
        print(f"  {name:20} {share:6.1f} % of {lines}")
    (OUT / "core.json").write_text(json.dumps(core, indent=2) + "\n")
    print(f"\nline by line: {OUT}/html/index.html")
    return code


if __name__ == "__main__":
    sys.exit(main())
