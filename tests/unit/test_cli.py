"""The command: what a user can do wrong ends in one clear message and a meaning exit code, never in a traceback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from netbridge import cli
from netbridge.datapath._core import ffi
from netbridge.errors import ExitCode
from netbridge.metrics import CounterPage
from netbridge.virtio import features
from netbridge.virtio.features import select
from netbridge.virtio.negotiation import negotiate
from tests.unit.virtio_fakes import ALL_SUPPORTED, mask_of

# No machine has this function: the domain is beyond what a host bridge uses.
NOWHERE = "fffe:00:1f.0"
MANIFEST = f"""\
vnode:
  name: net-bridge
  version: 0.1.0
runtime:
  entrypoint: bin/net-bridge.vnode
  required_mem_mb: 16
  max_cpu_share: 0.5
capabilities:
  - NetworkAccess
  - CAP_HARDWARE_IO_PCI: "{NOWHERE}"
  - CAP_IRQ_REGISTER: msix
  - CAP_DMA_ALLOC
  - CAP_MEM_SHARE
"""


class Command:
    """Runs `netbridge` in this process, with a run directory of its own."""

    def __init__(self, directory: Path, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self.directory = directory
        self.manifest = directory / "vnode.yml"
        self.manifest.write_text(MANIFEST)
        self.stdout = self.stderr = ""

    def __call__(self, *words: str) -> int:
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        self.stdout, self.stderr = self._capture.readouterr()
        return code

    def run(self, *words: str) -> int:
        socket = str(self.directory / "run" / "port.sock")
        return self("run", str(self.manifest), "--socket", socket, "--service-uid", "0", *words)

    def without(self, capability: str) -> None:
        kept = [line for line in MANIFEST.splitlines() if capability not in line]
        self.manifest.write_text("\n".join(kept) + "\n")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


VERBS = ("run", "check", "stats", "features", "top", "exporter", "capture", "tap", "debug", "restore")


def test_help_tells_every_verb_and_exit_code(command: Command) -> None:
    assert command("--help") == ExitCode.OK
    assert re.findall(r"^    (\w+)  ", command.stdout, re.MULTILINE) == list(VERBS)
    for word in ("exit codes", "130"):
        assert word in command.stdout


@pytest.mark.parametrize("verb", [*VERBS, "debug config", "debug bar"])
def test_every_verb_has_help(command: Command, verb: str) -> None:
    assert command(*verb.split(), "--help") == ExitCode.OK
    assert f"usage: netbridge {verb} " in command.stdout


def test_a_function_that_is_not_there(command: Command) -> None:
    assert command.run() == ExitCode.DEVICE
    assert NOWHERE in command.stderr
    assert "no such PCI function" in command.stderr
    assert len(command.stderr.splitlines()) == 1
    left = {path.name for path in (command.directory / "run").iterdir()}
    assert left <= {"port.sock.lock"}, "socket and counters are gone again"


@pytest.mark.parametrize(
    "capability",
    ["NetworkAccess", "CAP_HARDWARE_IO_PCI", "CAP_IRQ_REGISTER", "CAP_DMA_ALLOC"],
)
def test_a_capability_that_is_missing_is_refused_by_name(command: Command, capability: str) -> None:
    command.without(capability)
    assert command.run() == ExitCode.REFUSED
    assert capability in command.stderr
    assert str(command.manifest) in command.stderr
    assert not (command.directory / "run").exists(), "nothing was touched"


@pytest.mark.parametrize("words", [("config", "{}"), ("bar", "{}", "4", "0x14", "--width", "1")], ids=" ".join)
def test_registers_are_not_read_without_a_grant(command: Command, words: tuple[str, ...]) -> None:
    assert command("debug", *(word.format(command.manifest) for word in words)) == ExitCode.REFUSED
    assert "CAP_SYSCALL_RAW" in command.stderr


def test_another_function_than_the_manifests_is_refused(command: Command) -> None:
    assert command.run("--pci", "0000:00:02.0") == ExitCode.REFUSED
    assert "0000:00:02.0" in command.stderr
    assert NOWHERE in command.stderr


def test_a_pool_beyond_the_budget_is_refused(command: Command) -> None:
    assert command.run("--rx-buffers", "8192") == ExitCode.REFUSED
    assert "CAP_DMA_ALLOC" in command.stderr
    assert "required_mem_mb" in command.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--pci", "nonsense"), "nonsense"),
        (("--without", "MRG_RXBUFF"), "MRG_RXBUF"),
        (("--without", "VERSION_1"), "cannot be turned off"),
        (("--rx-buffers", "1"), "from 2 to 65536"),
        (("--spin-us", "-1"), "microseconds"),
        (("--interface", "magic"), "iommufd"),
    ],
)
def test_wrong_words_are_told(command: Command, words: tuple[str, ...], said: str) -> None:
    assert command.run(*words) in (ExitCode.USAGE, ExitCode.DEVICE)
    assert said in command.stderr
    assert "Traceback" not in command.stderr


def test_a_user_who_is_not_there(command: Command) -> None:
    assert command("run", str(command.manifest), "--service-uid", "nobody-of-that-name") == ExitCode.USAGE
    assert "nobody-of-that-name" in command.stderr


def test_a_manifest_that_is_not_there(command: Command) -> None:
    command.manifest.unlink()
    assert command.run() == ExitCode.USAGE
    assert str(command.manifest) in command.stderr


def test_a_manifest_that_is_wrong_tells_line_and_column(command: Command) -> None:
    command.manifest.write_text(MANIFEST.replace("required_mem_mb: 16", "required_mem_mb: sixteen"))
    assert command.run() == ExitCode.USAGE
    assert f"{command.manifest}:6:20" in command.stderr


def test_stats_without_a_driver(command: Command) -> None:
    assert command("stats", "--counters", str(command.directory / "none")) == ExitCode.FAILURE
    assert "is the driver running" in command.stderr


def test_stats_of_a_driver(command: Command) -> None:
    page = CounterPage(str(command.directory / "counters"))
    page.counters.packets_rx = 42
    try:
        assert command("stats", "--counters", page.path, "--json") == ExitCode.OK
        assert json.loads(command.stdout)["packets_rx"] == 42
        assert command("stats", "--counters", page.path) == ExitCode.OK
        assert "packets_rx                 42" in command.stdout
        assert "irq_latency_ns.delivery" in command.stdout
    finally:
        page.close()


def test_features_without_a_driver(command: Command) -> None:
    assert command("features", "--counters", str(command.directory / "nothing")) == ExitCode.FAILURE
    assert "is the driver running?" in command.stderr
    assert command.stdout == ""


def test_features_of_a_driver_that_has_no_device_yet(command: Command) -> None:
    page = CounterPage(str(command.directory / "counters"))
    try:
        assert command("features", "--json", "--counters", page.path) == ExitCode.FAILURE
    finally:
        page.close()
    assert "no configured device at this moment: it is starting, its device is away" in command.stderr
    assert command.stdout == ""


def test_features_of_a_driver(command: Command) -> None:
    page = CounterPage(str(command.directory / "counters"))
    device = page.counters.device
    outcome = negotiate(ALL_SUPPORTED & ~mask_of("MTU"), select(["MRG_RXBUF"]), turned_off=[features.MRG_RXBUF])
    device.features_wanted, device.features_agreed = outcome.wanted, outcome.agreed
    device.features_turned_off, device.features_offered = outcome.turned_off, outcome.offered
    device.mtu, device.queue_pairs, device.speed_mbps, device.duplex, device.link_up = 1500, 2, 10_000, 1, 1
    ffi.buffer(device.mac)[:] = bytes.fromhex("525400123456")
    try:
        assert command("features", "--counters", page.path) == ExitCode.OK
        lines = command.stdout.splitlines()
        assert command("features", "--json", "--counters", page.path) == ExitCode.OK
    finally:
        page.close()
    assert lines[0] == ("MAC 52:54:00:12:34:56, MTU 1500, 2 queue pairs, link up, 10,000 Mbit/s, full duplex")
    assert lines[2].split()[:5] == ["bit", "feature", "offered", "wanted", "agreed"]
    assert any(re.match(r"15 +MRG_RXBUF +yes +- +- +turned off", line) for line in lines)
    told = json.loads(command.stdout)
    assert (told["mac"], told["speed_mbps"], told["duplex"]) == ("52:54:00:12:34:56", 10_000, "full")
    assert int(told["agreed"], 16) == outcome.agreed
    rows = {row["name"]: row for row in told["features"]}
    assert rows["MTU"]["note"] == "the device does not offer it"
    assert rows["RING_PACKED"]["agreed"]


def test_which_features_there_are_takes_no_driver(command: Command) -> None:
    assert command("features", "--known") == ExitCode.OK
    assert re.search(r"^15 +MRG_RXBUF +yes +a received frame", command.stdout, re.MULTILINE)
    assert command("features", "--known", "--json") == ExitCode.OK
    rows = {row["name"]: row for row in json.loads(command.stdout)}
    assert rows["STANDBY"]["accepted"] == "never"
    assert "never fails over" in rows["STANDBY"]["refused"]


@pytest.mark.parametrize("listed", [(), ("MRG_RXBUF",)])
def test_a_feature_that_cannot_be_turned_off_is_refused_before_anything_is_touched(
    command: Command, listed: tuple[str, ...]
) -> None:
    command.manifest.write_text(MANIFEST + f"device:\n  without: [{', '.join(listed)}]\n")
    assert command.run("--without", "VERSION_1") == ExitCode.USAGE
    assert "VERSION_1 cannot be turned off" in command.stderr


def test_a_feature_that_there_is_not_is_told_with_its_place(command: Command) -> None:
    command.manifest.write_text(MANIFEST + "device:\n  without: [MTU, MRG_RXBUFS]\n")
    assert command.run() == ExitCode.USAGE
    assert f'{command.manifest}:15:18: device.without[1]: it is the text "MRG_RXBUFS"' in command.stderr
    assert "did you mean MRG_RXBUF?" in command.stderr


def test_restore_with_nothing_to_do(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not this machine's own leftovers: a test must not touch them.
    monkeypatch.setattr("vfio.leftovers", tuple)
    assert command("restore") == ExitCode.OK
    assert "nothing was left behind" in command.stdout
