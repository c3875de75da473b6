"""What tests of a run pin, need and are told of guests; and how often a test may fail."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qemu import capabilities, flakes, timing
from qemu.dimensions import UNSAFE_INTERRUPTS, Dimensions, UnknownDimension
from qemu.errors import GuestPanicked
from qemu.pytest_summary import phases, summary
from qemu.session import Booted, Session
from qemu.truth import DRIVERS, FAULTS, FILES, KERNEL, Truth

# Dimensions


def test_of_pins_the_nearest_counts() -> None:
    pinned = Dimensions.pinned([{"machine": "pc"}, {"machine": "q35", "ring": "packed"}])
    assert (pinned.machine, pinned.ring) == ("pc", "packed")
    assert Dimensions.pinned([]) == Dimensions()


def test_a_pin_that_is_none_is_refused() -> None:
    with pytest.raises(UnknownDimension, match=r"no dimension 'colour'; there are: machine, iommu, kernel, ring, irq"):
        Dimensions.pinned([{"colour": "red"}])


@pytest.mark.parametrize(
    ("pin", "said"),
    [
        ({"ring": "round"}, 'ring is "split" or "packed", not \'round\''),
        ({"ring": "pakced"}, "did you mean 'packed'?"),
        ({"irqs": "msix"}, "there is no dimension 'irqs'; did you mean 'irq'?"),
        ({"irq": "msi"}, "did you mean 'msix'?"),
        ({"machine": "microvm"}, 'machine is "q35" or "pc"'),
        ({"queue_pairs": 0}, "from 1 to 8, not 0"),
        ({"queue_pairs": "2"}, "from 1 to 8, not '2'"),
        ({"offloads": "on"}, "offloads is True or False"),
        ({"machine": "pc", "iommu": "intel"}, 'iommu="virtio"'),
        ({"queue_pairs": 2, "nics": 2}, "one NIC"),
    ],
)
def test_a_value_that_is_none_is_refused_with_the_nearest(pin: dict[str, Any], said: str) -> None:
    with pytest.raises(UnknownDimension) as refused:
        Dimensions.pinned([pin])
    assert said in str(refused.value)


def test_a_kernel_that_there_is_no_recipe_for() -> None:
    with pytest.raises(UnknownDimension, match=r"not 'trixi'; did you mean 'trixie'"):
        Dimensions(kernel="trixi").recipe(Path("images/trixie.toml"))


def test_what_the_nic_offers_is_what_was_pinned() -> None:
    def properties(**pins: Any) -> dict[str, Any]:
        return dict(Dimensions(**pins).boot_options()["nics"][0].properties)

    assert properties(irq="intx") == {"vectors": 0}
    assert properties(queue_pairs=4) == {"mq": "on", "vectors": 10}
    assert properties(queue_pairs=4, irq="intx", ring="packed") == {"packed": "on", "mq": "on", "vectors": 0}
    assert Dimensions().boot_options()["append"] == []
    assert Dimensions(iommu="virtio").boot_options()["append"] == list(UNSAFE_INTERRUPTS)
    assert [Dimensions(**pins).needs_tap for pins in ({}, {"queue_pairs": 2}, {"offloads": True})] == [
        False,
        True,
        True,
    ]


def test_what_guests_are_made_of() -> None:
    plain = Dimensions().boot_options()
    assert [nic.id for nic in plain["nics"]] == ["nic0"]
    assert dict(plain["nics"][0].properties) == {}
    wanted = Dimensions(machine="pc", ring="packed", queue_size=1024, nics=2, words=("a",), devices=("-device edu",))
    made = wanted.boot_options()
    assert [nic.id for nic in made["nics"]] == ["nic0", "nic1"]
    assert made["nics"][1].properties["packed"] == "on"
    assert made["nics"][0].rx_queue_size == made["nics"][0].tx_queue_size == 1024
    assert made["append"] == [*UNSAFE_INTERRUPTS, "a"]
    assert made["extra_args"] == ["-device", "edu"]


def test_a_kernel_is_a_recipe_beside_the_configured_one() -> None:
    configured = Path("images/trixie.toml")
    assert Dimensions().recipe(configured) == configured
    assert Dimensions(kernel="iommufd").recipe(configured) == Path("images/iommufd.toml")


# Truth


class FakeGuest:
    """A guest of which is known what it answers."""

    lost: object = None

    class agent:  # noqa: N801
        ready = True

    def __init__(self) -> None:
        self.drivers: dict[str, str] = {"0000:01:00.0": "virtio-pci"}
        self.files: list[str] = []
        self.log = ["[0.0] Linux version"]
        self.console: list[str] = []

        self.boot = "one"

    def eval(self, _source: str, _timeout: float = 5.0) -> Any:
        return [dict(self.drivers), list(self.files), self.boot]

    def kernel_records(self) -> list[tuple[int, str]]:
        return [*enumerate(self.log)]

    def kernel_trouble(self) -> list[str]:
        return self.console

    @staticmethod
    def is_fault(line: str) -> bool:
        return "DMAR" in line


def test_all_is_well() -> None:
    guest = FakeGuest()
    truth = Truth(guest)  # type: ignore[arg-type]
    guest.log += ["[1.0] all is well", "[2.0] watchdog: BUG: soft lockup - CPU#0 stuck for 26s!"]
    assert truth.problems() == []


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda guest: guest.drivers.update({"0000:01:00.0": "vfio-pci"}), DRIVERS, "has the driver vfio-pci; it had"),
        (lambda guest: guest.drivers.update({"0000:01:00.0": ""}), DRIVERS, "has the driver none; it had virtio-pci"),
        (lambda guest: guest.drivers.clear(), DRIVERS, "the NIC 0000:01:00.0 is gone; it had virtio-pci"),
        (
            lambda guest: guest.files.append("/dev/vfio/6 in process 9"),
            FILES,
            "left open: /dev/vfio/6 in process 9",
        ),
        (lambda guest: guest.log.append("DMAR: fault"), FAULTS, "the IOMMU refused: DMAR: fault"),
        (lambda guest: guest.log.append("WARNING: CPU: 0 PID: 1"), KERNEL, "the kernel: WARNING: CPU"),
        (lambda guest: guest.log.append("WARNING: possible circular locking"), KERNEL, "the kernel: WARNING: possible"),
    ],
)
def test_what_is_wrong_is_told_unless_it_is_allowed(change: Any, kind: str, said: str) -> None:
    guest = FakeGuest()
    truth = Truth(guest)  # type: ignore[arg-type]
    change(guest)
    (line,) = truth.problems()
    assert said in line
    assert truth.problems([kind]) == []


def test_a_lost_guest_is_judged_by_its_console() -> None:
    guest = FakeGuest()
    truth = Truth(guest)  # type: ignore[arg-type]
    guest.lost = RuntimeError("gone")
    guest.console = ["BUG: kernel NULL pointer dereference"]
    assert truth.problems() == ["the kernel: BUG: kernel NULL pointer dereference"]


def test_a_boot_begins_the_log_anew() -> None:
    guest = FakeGuest()
    guest.log = ["[0.0] Linux version", "[1.0] WARNING: CPU: of before"]
    truth = Truth(guest)  # type: ignore[arg-type]
    assert truth.problems() == []
    guest.boot, guest.log = "two", ["[0.1] WARNING: CPU: of now"]
    assert truth.problems() == ["the kernel: [0.1] WARNING: CPU: of now"]


# Needs


def test_needs_are_probed() -> None:
    class Guest:
        class accel:  # noqa: N801
            name = "tcg"

            def __str__(self) -> str:
                return "tcg (demanded)"

        class agent:  # noqa: N801
            hello = {"kernel": "6.12"}  # noqa: RUF012

        def __init__(self, answer: object) -> None:
            self.answer = answer

        def eval(self, _source: str) -> object:
            return self.answer

    assert "needs KVM" in str(capabilities.lacks_kvm(Guest(None)))  # type: ignore[arg-type]
    assert capabilities.lacks_iommufd(Guest(True)) is None  # type: ignore[arg-type]
    assert "(6.12) has no /dev/iommu" in str(capabilities.lacks_iommufd(Guest(False)))  # type: ignore[arg-type]
    assert capabilities.lacks_hugepages(Guest(4), 4) is None  # type: ignore[arg-type]
    lacking = str(capabilities.lacks_hugepages(Guest(3), 4))  # type: ignore[arg-type]
    assert lacking == "needs 4 huge pages: the guest could make 3"


def test_every_need_has_its_marker() -> None:
    known = {line.partition(":")[0].partition("(")[0] for line in capabilities.MARKERS}
    assert known == {*capabilities.OF_HOST, *capabilities.OF_GUEST}


# What a run says of its guests


def test_guests_in_one_line() -> None:
    booted = [
        Booted("tcg (x)", "booted, as there was no snapshot of it", 5.0),
        *(Booted("tcg (x)", "restored from snapshot 1", seconds) for seconds in (0.4, 0.9)),
    ]
    assert summary(booted) == "1 booted in 5.0-5.0 s, 2 restored in 0.4-0.9 s, under tcg (x)"


def test_stages_of_a_boot() -> None:
    log = (
        "[    3.000000] Run /init as init process\n[    3.500000] EXT4-fs (vda): mounted filesystem x\n[    4.0] later"
    )
    found = timing.stages(log, greeted=4.25, seconds=5.0)
    assert [found[name] for name in timing.STAGES] == [0.0, 3.0, 0.5, 0.75, 0.0]


# Flakes

JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="good"/><testcase classname="a" name="bad"><{kind}>text</{kind}></testcase>
<testcase classname="a" name="left"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_test_that_fails_now_and_then_is_found(tmp_path: Path) -> None:
    rounds = []
    for kind in ("failure", "system-out", "error"):
        path = tmp_path / f"{kind}.xml"
        path.write_text(JUNIT.format(kind=kind))
        rounds.append(list(flakes.outcomes(path)))
    assert flakes.flaky(rounds) == {"a::bad": Counter(failed=1, passed=1, error=1)}
    assert flakes.flaky(rounds[1:2]) == {}


def test_where_the_time_went_is_told() -> None:
    guests = [Booted("tcg (demanded)", "booted, as it was", 3.0), Booted("tcg (demanded)", "restored", 0.5)]
    said = phases({"setup": 6.04, "call": 20.0, "teardown": 1.0}, {"image": 0.01, "code disk": 1.24}, guests)
    assert said == (
        "setting up 6.0 s, tests 20.0 s, tearing down 1.0 s; within these code disk 1.2 s, guests coming up 3.5 s"
    )


def test_a_guest_that_panics_while_it_boots_is_booted_once_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "console.log").write_text("Oops")
    tries: list[int] = []

    def boot(*_: object, **__: object) -> str:
        tries.append(1)
        if len(tries) != 2:
            raise GuestPanicked("guest panicked: Oops\n--- end of console.log")
        return "a guest"

    monkeypatch.setattr("qemu.session.boot", boot)
    said: list[str] = []
    session: Any = SimpleNamespace(panics=[], say=said.append)
    assert Session._boot(session, None, tmp_path, {}) == "a guest"  # type: ignore[arg-type, comparison-overlap]
    assert session.panics == ["guest panicked: Oops"]
    assert said == [f"{tmp_path.name}: guest panicked: Oops; booting it once more"]
    assert (tmp_path / "console-panicked.log").read_text() == "Oops"
    tries.append(1)  # from here on it panics each time
    with pytest.raises(GuestPanicked):
        Session._boot(session, None, tmp_path, {})  # type: ignore[arg-type]
    assert len(tries) == 5


def test_the_end_of_a_guest_s_init_is_no_slip_of_the_emulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tries: list[int] = []

    def boot(*_: object, **__: object) -> str:
        tries.append(1)
        raise GuestPanicked("guest panicked: Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000200")

    monkeypatch.setattr("qemu.session.boot", boot)
    session: Any = SimpleNamespace(panics=[], say=lambda _: None)
    with pytest.raises(GuestPanicked):
        Session._boot(session, None, tmp_path, {})  # type: ignore[arg-type]
    assert len(tries) == 1
