"""The pytest plugin on the host: tests that a stand-in for the guest's pytest reports on, in a pytest of their own."""

from pathlib import Path

import pytest

from qemu.session import for_guest

pytest_plugins = ["pytester"]

pytestmark = pytest.mark.thorough  # each starts a pytest of its own

ROOT = Path(__file__).parents[2]

STAND_IN = """
import pytest
from qemu import pytest_plugin
from qemu.errors import GuestLost
from qemu.remote import Report

class Guest:
    def kernel_trouble(self):
        return list(trouble)

class Remote:
    guest = Guest()
    asked = []

    def run(self, nodeid, following, timeout):
        name = nodeid.split("::")[-1]
        print("ASKED", nodeid, following, timeout)
        good = [Report(nodeid, when, "passed", duration=0.5) for when in ("setup", "call", "teardown")]
        if name == "test_bad":
            good[1] = Report(nodeid, "call", "failed", longrepr="THE TRACEBACK", crash=("x.py", 3, "assert 1 == 2"),
                             sections=[("Captured stdout call", "SAID")])
        if name == "test_skipped":
            return [Report(nodeid, "setup", "skipped", longrepr=("/code/g/test_it.py", "4", "Skipped: no such thing")),
                    good[2]]
        if name == "test_known":
            good[1] = Report(nodeid, "call", "skipped", longrepr="text", wasxfail="for a reason")
        if name == "test_lost":
            raise GuestLost("the guest is gone\\nand this is its console")
        if name.startswith("test_trouble"):
            trouble.append("BUG: something in the kernel")
        return good

trouble = []
pytest_plugin.Session.remote = lambda self, items: Remote()
"""

TESTS = """
import pytest
def test_good(): raise SystemExit("this is not to run here")
def test_bad(): pass
def test_skipped(): pass
def test_known(): pass
@pytest.mark.guest_timeout(7)
def test_lost(): pass
@pytest.mark.parametrize("n", [1, 2])
def test_trouble(n): pass
"""


def test_reports_from_the_guest_count_as_our_own(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini("[pytest]\nguest_tests = g\naddopts = -p qemu.pytest_plugin --strict-markers")
    pytester.makeconftest(STAND_IN)
    pytester.mkdir("g").joinpath("test_it.py").write_text(TESTS)
    pytester.makepyfile(test_here="def test_here(): pass")
    outcome = pytester.runpytest_subprocess("-rA", "--accel=tcg", "--junitxml=junit.xml", "-p", "no:cacheprovider")
    outcome.assert_outcomes(passed=4, failed=1, skipped=1, xfailed=1, errors=3)
    assert outcome.ret == 1
    outcome.stdout.fnmatch_lines(
        [
            "guest accelerator: tcg (demanded)",
            "*ERROR at teardown of test_trouble*1*",
            "the guest's kernel: BUG: something in the kernel",
            "*trouble on the guest's console*",
            "BUG: something in the kernel",
            "*THE TRACEBACK*",
            "*Captured stdout call*",
            "SAID",
            "*trouble with the harness*",
            "g/test_it.py::test_lost: the guest is gone",
            "SKIPPED*g/test_it.py:4: no such thing",
            "XFAIL*test_known - for a reason",
            "FAILED g/test_it.py::test_bad - assert 1 == 2",
        ]
    )
    # The guest is told what comes next, and how long it may take; the test that comes last runs here.
    text = outcome.stdout.str()
    assert "ASKED g/test_it.py::test_good g/test_it.py::test_bad 60.0" in text
    assert "ASKED g/test_it.py::test_lost g/test_it.py::test_trouble[1] 7.0" in text
    assert "ASKED g/test_it.py::test_trouble[2] None 60.0" in text
    junit = (pytester.path / "junit.xml").read_text()
    assert 'message="assert 1 == 2"' in junit
    assert 'errors="3" failures="1"' in junit


@pytest.mark.parametrize(
    ("options", "names", "code"),
    [([], "test_lost or test_good", 8), (["-n1"], "test_lost", 8), (["-n1"], "test_lost or test_bad", 1)],
)
def test_the_exit_code_tells_trouble_with_the_harness_from_a_failure(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, options: list[str], names: str, code: int
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini("[pytest]\nguest_tests = g\naddopts = -p qemu.pytest_plugin --strict-markers")
    pytester.makeconftest(STAND_IN)
    pytester.mkdir("g").joinpath("test_it.py").write_text(TESTS)
    outcome = pytester.runpytest_subprocess("--accel=tcg", "-p", "no:cacheprovider", "-k", names, *options)
    assert outcome.ret == code
    said = "(nothing else failed: exit code 8)" in outcome.stdout.str()
    assert said == (code == 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--require-kvm", "--accel=tcg"], "--require-kvm and --accel tcg: it can be one of the two"),
        (["--shell-on-fail", "-n2"], "--shell-on-fail: parallel runs (-n) have no terminal to give"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    outcome = pytester.runpytest_subprocess("-p", "qemu.pytest_plugin", *options)
    assert outcome.ret == 4
    assert said in outcome.stderr.str() + outcome.stdout.str()


def test_options_of_the_host_do_not_reach_the_guest() -> None:
    given = ["-ra", "-p", "qemu.pytest_plugin", "-n", "2", "--strict-markers", "-pno:x", "-n4"]
    assert for_guest(given) == ["-ra", "--strict-markers"]


def test_an_accelerator_that_is_none_is_refused_in_a_line(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("QEMU_GUEST_ACCEL", "xen")
    outcome = pytester.runpytest_subprocess("-p", "qemu.pytest_plugin")
    assert outcome.ret == 4
    assert "one of auto, kvm, tcg, not 'xen'" in outcome.stderr.str() + outcome.stdout.str()


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ('guest_with(rign="split")', "there is no dimension 'rign'; did you mean 'ring'?"),
        ('guest_with(kernel="no-such")', "kernel is the name of a recipe, not 'no-such'"),
        ('guest_allows("driver")', "there is no 'driver'; there are: iommu-faults, kernel-trouble, drivers"),
    ],
)
def test_a_pin_that_is_none_ends_the_run_before_it_begins(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, marker: str, said: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(test_here=f"import pytest\n@pytest.mark.{marker}\ndef test_here(guest): pass")
    outcome = pytester.runpytest_subprocess("-p", "qemu.pytest_plugin")
    assert outcome.ret == 4
    assert f"test_here.py::test_here: {marker.partition('(')[0]}: {said}" in outcome.stderr.str()
