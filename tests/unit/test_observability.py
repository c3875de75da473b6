"""The exporter and `netbridge top`: what the manifest lists and nothing else, and no crash whatever the page."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from netbridge import cli, metrics, top
from netbridge.datapath._core import ffi, lib
from netbridge.errors import ExitCode
from netbridge.vnode.metric_names import METRIC_NAMES
from tests.unit.port_fakes import DEADLINE_SECONDS

PRINTED = ("packets_rx", "packets_tx", "irq_latency_ns")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[metrics.CounterPage]:
    page = metrics.CounterPage(str(tmp_path / "counters"), PRINTED)
    yield page
    page.close()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def exported(text: str) -> dict[str, dict[str, float]]:
    """Samples by family and name with labels."""
    return {
        family.name: {
            sample.name + "".join(f" {key}={value}" for key, value in sample.labels.items()): sample.value
            for sample in family.samples
        }
        for family in text_string_to_metric_families(text)
    }


def test_the_listed_metrics_are_exported_and_no_others(
    page: metrics.CounterPage, capsys: pytest.CaptureFixture[str]
) -> None:
    page.counters.packets_rx, page.counters.bytes_rx = 7, 420
    for value in (5, 100, 100, 1 << 62):
        lib.nb_histogram_add(ffi.addressof(page.counters.irq_latency_ns[1]), value)
    code, out, _ = run(capsys, "exporter", "--print", "--counters", page.path)
    assert code == 0
    found = exported(out)
    assert set(found) == {"netbridge_up", *(f"netbridge_{name}" for name in PRINTED)}
    assert found["netbridge_up"] == {"netbridge_up": 1}
    assert found["netbridge_packets_rx"] == {"netbridge_packets_rx_total": 7}
    drain = {name: value for name, value in found["netbridge_irq_latency_ns"].items() if "stage=drain" in name}
    buckets = {float(name.split("le=")[1].split()[0]): value for name, value in drain.items() if "le=" in name}
    assert (buckets[7], buckets[127], buckets[math.inf]) == (1, 3, 4)
    assert list(buckets.values()) == sorted(buckets.values())
    assert drain["netbridge_irq_latency_ns_count stage=drain"] == 4


@pytest.mark.parametrize("listed", [(), ("drops", "rx_bursts"), METRIC_NAMES])
def test_whatever_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str], listed: tuple[str, ...]) -> None:
    page = metrics.CounterPage(str(tmp_path / "counters"), listed)
    page.counters.drops[0], page.counters.rx_bursts[1] = 3, 2
    for command in ("exporter --print", "top --once --json --interval 0.01"):
        code, out, _ = run(capsys, *command.split(), "--counters", page.path)
        assert code == 0
        if command.startswith("top"):
            assert set(json.loads(out)) == {"seconds", *listed}
        else:
            assert set(exported(out)) == {"netbridge_up", *(f"netbridge_{name}" for name in listed)}
    page.close()


def test_over_http_with_a_driver_that_comes_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "counters"
    command = [sys.executable, "-m", "netbridge", "exporter", "--listen", "127.0.0.1:0", "--counters", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()

        def scrape() -> dict[str, dict[str, float]]:
            with urllib.request.urlopen(address, timeout=DEADLINE_SECONDS) as answer:
                return exported(answer.read().decode())

        assert scrape() == {"netbridge_up": {"netbridge_up": 0}}
        page = metrics.CounterPage(str(path), ["resets"])
        page.counters.resets = 2
        assert scrape()["netbridge_resets"] == {"netbridge_resets_total": 2}
        path.write_bytes(path.read_bytes()[:100])  # a page that shrinks under its reader
        assert scrape() == {"netbridge_up": {"netbridge_up": 0}}
        path.unlink()
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=DEADLINE_SECONDS) == ("", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_for_the_node_exporter(page: metrics.CounterPage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "netbridge.prom"
    assert run(capsys, "exporter", "--textfile", str(file), "--counters", page.path)[0] == 0
    assert set(exported(file.read_text())) == {"netbridge_up", *(f"netbridge_{name}" for name in PRINTED)}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("exporter", "--listen", "9117"), ExitCode.USAGE, "expected ADDRESS:PORT"),
        (("exporter", "--listen", "192.0.2.1:9117"), ExitCode.USAGE, "cannot listen at 192.0.2.1:9117"),
        (("exporter", "--textfile", "/nowhere/x"), ExitCode.USAGE, "cannot write /nowhere/x"),
        (("top", "--once", "--counters", "/nowhere"), ExitCode.FAILURE, "is the driver running?"),
        (("top", "--once", "--counters", __file__), ExitCode.FAILURE, "is no counters page of this version"),
    ],
)
def test_what_a_user_can_do_wrong(
    words: tuple[str, ...], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, _, err = run(capsys, *words)
    assert got == code
    assert says in err


def test_top_shows_what_came_between_two_readings(tmp_path: Path) -> None:
    page = metrics.CounterPage(str(tmp_path / "counters"))
    page.counters.packets_rx = 1000
    drain = ffi.addressof(page.counters.irq_latency_ns[1])
    lib.nb_histogram_add(drain, 10**9)
    before = top.Reading(page.path)
    page.counters.packets_rx = 1500
    page.counters.drops[0] = 100
    page.counters.rx_bursts[0], page.counters.rx_bursts[2] = 7, 14
    for _ in range(10):
        lib.nb_histogram_add(drain, 5000)
    after = top.Reading(page.path)
    after.at = before.at + 2
    found = top.rates(before, after)
    assert (found["packets_rx"], found["packets_tx"], found["drops"]["client_slow"]) == (250.0, 0.0, 50.0)
    assert found["irq_latency_ns"]["drain"]["count"] == 10
    assert 5000 <= found["irq_latency_ns"]["drain"]["p99"] <= 6250
    text = "\n".join(top.lines(found))
    assert "client_slow 50.0" in text
    assert "▄ █" in text, "bursts of 1 and of 4"
    page.close()


def test_pictures() -> None:
    assert top.picture([0, 0]) == ""
    assert top.picture([0, 1, 0, 800, 400, 0]) == "▁ █▄"


def test_top_ends_with_ctrl_c_and_code_0(page: metrics.CounterPage) -> None:
    command = [sys.executable, "-m", "netbridge", "top", "--json", "--interval", "0.05", "--counters", page.path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for _ in range(3):
            assert set(json.loads(process.stdout.readline())) == {"seconds", *PRINTED}
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_SECONDS)
        assert (process.returncode, err) == (0, "")
    finally:
        process.kill()
        process.communicate()
