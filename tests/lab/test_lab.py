"""Boxes out of a labgrid farm: the environment as labgrid itself reads it, and a farm with one box.

`make lab-test` runs this with labgrid installed. The farm is labgrid's own coordinator and exporter, in the namespace
of the desk whose box a guest stands in for; the power switch is a script that writes down what it is told.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu.errors import HarnessError
from qemu.lab import Lab
from qemu.session import Session
from tests.e2e.desk import BOX, Desk, outcomes, set_up

labgrid = pytest.importorskip("labgrid", reason="labgrid is not installed: make lab-test does that")

HERE = Path(__file__).parent
COORDINATOR = "127.0.0.1:20408"
START_SECONDS = 60.0
TEST = "tests/e2e/test_echo.py::test_the_nic_goes_back_to_its_driver_and_works_again"

ENVIRONMENT = """
targets:
  main:
    resources:
      RemotePlace:
        name: box-1
    drivers:
      ExternalPowerDriver:
        cmd_on: {switch} on
        cmd_off: {switch} off
      SSHDriver: {{}}
      BoxStrategy: {{}}
options:
  coordinator_address: "{coordinator}"
  nic: "{nic}"
  wire: eth1
imports:
  - {here}/strategy.py
"""
EXPORTS = f"""
box-1:
  NetworkService:
    address: {BOX}
    username: root
"""


def test_labgrid_reads_the_environment_of_a_farm() -> None:
    lab = Lab(f"lab:{HERE}/farm.yaml")
    assert (lab.place, lab.nic, lab.wire, lab.coordinator) == ("box-1", "0000:03:00.0", "eth1", "lab.example:20408")
    assert issubclass(sys.modules["strategy"].BoxStrategy, labgrid.strategy.Strategy)
    drivers = lab._environment.config.get_targets()["main"]["drivers"]
    assert all(name in labgrid.target_factory.drivers for name in drivers)


def test_labgrid_knows_what_the_exporter_exports() -> None:
    exported = labgrid.util.yaml.load((HERE / "exporter.yaml").read_text())
    for resources in exported.values():
        for name in resources:
            assert name in labgrid.target_factory.resources or hasattr(labgrid.resource, name), name


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("lab:no-such.yaml", "there is no file no-such.yaml"),
        (f"lab:{HERE}/farm.yaml#other", "has no target 'other', only main"),
        (f"lab:{HERE}/exporter.yaml", "options: nic: expected a PCI address|has no target 'main'"),
    ],
)
def test_an_environment_that_is_none_is_refused(target: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Lab(target)


def test_the_strategy_switches_on_waits_and_switches_off(tmp_path: Path) -> None:
    """With a power switch that writes down what it is told, and an ssh that answers at the third time."""
    switch = switch_of(tmp_path)
    ssh = tmp_path / "ssh"
    ssh.write_text(
        "#!/bin/sh\n"
        f'echo asked >>{tmp_path}/asked; [ "$(wc -l <{tmp_path}/asked)" -ge 3 ] || exit 255\n'
        'while [ "$1" != -S ]; do shift; done; touch "$2"\n'
    )
    ssh.chmod(0o755)
    path = tmp_path / "env.yaml"
    text = ENVIRONMENT.format(switch=switch, coordinator=COORDINATOR, nic="0000:03:00.0", here=HERE)
    text = text.replace(
        "RemotePlace:\n        name: box-1", "NetworkService:\n        address: box\n        username: root"
    )
    path.write_text(text + f"tools:\n  ssh: {ssh}\n")
    lab = Lab(f"lab:{path}")
    with lab.acquired(tmp_path, print) as box:
        assert (box.host, box.nic) == ("box", "0000:03:00.0")
        assert box.connect[-3:] == ("-l", "root", "box")
        assert lab.cycle().host == "box"
    assert (tmp_path / "power").read_text().split() == ["on", "off", "on"]
    assert (tmp_path / "asked").read_text().count("asked") >= 4


def test_a_coordinator_that_is_not_there_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    path = tmp_path / "env.yaml"
    path.write_text(ENVIRONMENT.format(switch="true", coordinator=f"127.0.0.1:{port}", nic="0000:03:00.0", here=HERE))
    with pytest.raises(HarnessError, match=r"labgrid-client -p box-1 show: .*(connect|Connect)"):
        with Lab(f"lab:{path}").acquired(tmp_path, print):
            pass


# A farm


def switch_of(directory: Path) -> Path:
    switch = directory / "switch"
    switch.write_text(f'#!/bin/sh\necho "$1" >>{directory}/power\n')
    switch.chmod(0o755)
    return switch


@pytest.fixture(scope="module")
def desk(guests: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with set_up(guests, tmp_path_factory.mktemp("desk")) as made:
        yield made


def labgrid_program(name: str) -> str:
    return str(Path(sys.executable).with_name(f"labgrid-{name}"))


def client(desk: Desk, *words: str) -> str:
    return desk.office.run([labgrid_program("client"), "-x", COORDINATOR, *words], START_SECONDS).stdout


@contextmanager
def farm(desk: Desk, here: Path) -> Iterator[None]:
    """A coordinator, and an exporter that has the box."""
    (here / "exports.yaml").write_text(EXPORTS)
    coordinator = [labgrid_program("coordinator"), "-l", COORDINATOR]
    exporter = [labgrid_program("exporter"), "-c", COORDINATOR, "--hostname", "localhost", "-n", "lab", "exports.yaml"]
    running = []
    try:
        for command in (coordinator, exporter):
            with (here / f"{Path(command[0]).name}.log").open("wb") as log:
                running.append(subprocess.Popen([*desk.enter, *command], stdout=log, stderr=log, cwd=here))
            await_farm(desk, "box-1" if command is exporter else "", here)
        client(desk, "-p", "box-1", "create")
        client(desk, "-p", "box-1", "add-match", "*/box-1/*")
        yield
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(START_SECONDS)


def await_farm(desk: Desk, word: str, here: Path) -> None:
    """Wait until the coordinator answers, and knows of `word`: it has no event for somebody who is not connected."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if word in client(desk, "resources"):
                return
            said = f"the coordinator knows of no {word}"
        except subprocess.CalledProcessError as error:
            said = str(error.stderr)
        assert time.monotonic() < deadline, f"the farm is not up after {START_SECONDS:g} s ({here}): {said}"
        time.sleep(0.2)


@pytest.mark.needs_root
def test_a_box_is_reserved_powered_and_let_go(desk: Desk, artefacts: Path, tmp_path: Path) -> None:
    with farm(desk, tmp_path):
        path = tmp_path / "env.yaml"
        path.write_text(
            ENVIRONMENT.format(
                switch=shlex.quote(str(switch_of(tmp_path))), coordinator=COORDINATOR, nic=desk.nics[1], here=HERE
            )
        )
        junit = artefacts / "junit.xml"
        done = desk.pytest(artefacts, f"--junitxml={junit}", "-s", TEST, target=f"lab:{path}")
        (artefacts / "pytest.log").write_text(done.stdout)
        assert done.returncode == 0, done.stdout
        assert outcomes(junit) == {TEST.partition("::")[2]: "passed"}
        assert (tmp_path / "power").read_text().split() == ["on"]
        shown = client(desk, "-p", "box-1", "show")
        assert "acquired: None" in shown
        assert not client(desk, "reservations").strip()
        client(desk, "-p", "box-1", "lock")
        done = desk.pytest(artefacts, TEST, target=f"lab:{path}")
        assert done.returncode == 0, done.stdout  # it is our own: used, and still ours afterwards
        assert "acquired: None" not in client(desk, "-p", "box-1", "show")
        client(desk, "-p", "box-1", "unlock")
