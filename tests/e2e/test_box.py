"""Tests on a machine of metal: `pytest --target ssh://… --nic … --wire …`, with a guest as the box (desk.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu.session import Session
from tests.e2e.desk import BOX, DRIVER_OF, Desk, outcomes, set_up

pytestmark = [pytest.mark.needs_root, pytest.mark.thorough]


@pytest.fixture(scope="module")
def desk(guests: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with set_up(guests, tmp_path_factory.mktemp("desk")) as made:
        yield made


def test_guest_tests_and_end_to_end_tests_run_on_the_box(desk: Desk, artefacts: Path) -> None:
    junit = artefacts / "junit.xml"
    asks_qemu = artefacts / "test_asks_qemu.py"
    asks_qemu.write_text("def test_it_asks_qemu(guest): guest.qmp('query-status')\n")
    echo = "tests/e2e/test_echo.py"
    wanted = {
        f"{echo}::test_every_frame_comes_back_once_and_unchanged[raw]": "passed",
        f"{asks_qemu}::test_it_asks_qemu": "skipped",
        f"{echo}::test_the_nic_goes_back_to_its_driver_and_works_again": "passed",
        "tests/guest/test_virtio_bringup.py::test_the_interrupts_arrive[msix]": "passed",
    }
    done = desk.pytest(artefacts, f"--nic={desk.nics[1]}", "--wire=eth1", f"--junitxml={junit}", *wanted)
    (artefacts / "pytest.log").write_text(done.stdout)
    assert done.returncode == 0, done.stdout
    assert outcomes(junit) == {name.partition("::")[2]: outcome for name, outcome in wanted.items()}
    assert f"tests run on {BOX}, not in guests" in done.stdout
    assert f"needs a guest of QEMU's: the box {BOX} has no qmp" in done.stdout
    # Nothing is left there, and the NIC is where it was.
    assert not desk.guest.run(["sh", "-c", "ls -d /var/tmp/harness-*"], check=False).stdout
    assert desk.guest.eval(DRIVER_OF.format(desk.nics[1])) == "virtio-pci"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": "ssh://root@10.9.8.2:23"}, "Connection refused"),
        ({"target": "ssh://nobody@10.9.8.2"}, "Permission denied"),
        ({"nic": "0000:77:00.0"}, "there is no PCI function 0000:77:00.0; its NICs are 0000:"),
        ({"nic": "0000:00:00.0"}, "the PCI function 0000:00:00.0 is no NIC (class 0x060000)"),
        ({"nic": "ssh"}, "carries this connection (10.9.8.2) (interface "),
        ({"wire": "eth7"}, "there is no interface eth7 on this machine, only eth1, lo, office"),
        ({"wire": "office"}, "office has the address 10.9.8.1, so this machine uses it"),
        ({"wire": "eth1", "down": "eth1"}, "the interface eth1 is down: ip link set eth1 up"),
    ],
    ids=["port", "user", "nic", "no-nic", "the-ssh-nic", "wire", "used-wire", "down"],
)
def test_what_cannot_be_is_told_in_a_line(desk: Desk, artefacts: Path, change: dict[str, str], said: str) -> None:
    nic = change.get("nic", desk.nics[1])
    words = [f"--nic={desk.nics[0] if nic == 'ssh' else nic}", f"--wire={change.get('wire', 'eth1')}"]
    one = "tests/e2e/test_echo.py::test_the_nic_goes_back_to_its_driver_and_works_again"
    if "down" in change:
        desk.office.run(["ip", "link", "set", change["down"], "down"])
    try:
        done = desk.pytest(artefacts, *words, one, target=change.get("target", f"ssh://root@{BOX}"))
    finally:
        desk.office.run(["ip", "link", "set", "eth1", "up"])
    assert done.returncode != 0
    assert said in done.stdout
    assert "trouble with the harness, not with what is tested" in done.stdout
