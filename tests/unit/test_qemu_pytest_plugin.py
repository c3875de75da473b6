"""The pytest plugin: what tests need of the guest that they share, and what a kernel's complaints do to a test."""

import pytest

from qemu.pytest_inside import _blame
from qemu.remote import Report
from qemu.session import MEMORY_MB, Needs, patience


def test_needs_add_up() -> None:
    needs = Needs()
    assert (needs.arguments, needs.words, needs.memory_mb) == ([], [], MEMORY_MB)
    needs.add(devices=("-device edu",), words=("hugepages=1",), memory_mb=2048)
    needs.add(devices=("-device edu", "-device nvme"), words=("hugepages=1",), memory_mb=1024)
    assert needs == Needs(["-device edu", "-device nvme"], ["hugepages=1"], 2048)


def test_a_wrong_need_is_refused() -> None:
    with pytest.raises(TypeError, match="memory"):
        Needs().add(memory=1)  # type: ignore[call-arg]


def reports(outcome: str = "passed") -> list[Report]:
    return [Report("x", "setup", "passed"), Report("x", "call", outcome), Report("x", "teardown", "passed")]


COMPLAINT = "[    1.2] BUG: KASAN: slab-use-after-free in vfio_pci_core_close_device"


@pytest.mark.parametrize("outcome", ["passed", "skipped"])
def test_a_complaint_of_the_kernel_fails_a_test_that_passed(outcome: str) -> None:
    made = reports(outcome)
    _blame(made, ["[    1.1] INFO: task python3 blocked for more than 120 seconds", COMPLAINT])
    assert [report.outcome for report in made] == ["passed", outcome, "failed"]
    assert made[-1].longrepr == f"the guest's kernel: {COMPLAINT}"


@pytest.mark.parametrize(
    "trouble",
    [
        [],
        ["rcu: INFO: rcu_preempt detected stalls on CPUs/tasks"],
        ["watchdog: BUG: soft lockup - CPU#0 stuck for 26s!"],
    ],
)
def test_a_busy_host_fails_nothing(trouble: list[str]) -> None:
    made = reports()
    _blame(made, trouble)
    assert made == reports()


def test_a_test_that_failed_keeps_its_own_reason() -> None:
    made = reports("failed")
    _blame(made, [COMPLAINT])
    assert made == reports("failed")


def test_patience_is_a_number() -> None:
    assert patience("8") == 8.0
    for wrong in ("", "long", "0", "-1", "nan", "inf"):
        with pytest.raises(pytest.UsageError, match="guest_patience: expected a number from 1 to 1000"):
            patience(wrong)
