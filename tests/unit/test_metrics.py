"""The counters page: written by one process, read by another, and never trusted to be what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from netbridge import metrics
from netbridge.datapath._core import ffi, lib


@pytest.fixture
def page(tmp_path: Path) -> Iterator[metrics.CounterPage]:
    page = metrics.CounterPage(str(tmp_path / "counters"))
    yield page
    page.close()


def test_a_reader_sees_what_the_driver_counted(page: metrics.CounterPage) -> None:
    page.counters.packets_rx = 7
    page.counters.drops[lib.NB_DROP_CLIENT_SLOW] = 3
    page.counters.refused_handles[lib.NB_REFUSE_LEASE] = 1
    seen = metrics.read(page.path)
    assert seen["packets_rx"] == 7
    assert seen["drops"] == {"client_slow": 3, "too_short": 0, "device_reset": 0}
    assert seen["refused_handles"]["lease"] == 1
    assert seen == page.snapshot()


def test_every_counter_of_the_core_has_a_name(page: metrics.CounterPage) -> None:
    fields = {name for name, _ in ffi.typeof("struct nb_counters").fields}
    assert set(page.snapshot()) == fields - {"magic", "size", "exported", "device"}
    assert len(metrics.DROP_REASONS) == len(page.counters.drops)
    assert len(metrics.REFUSALS) == len(page.counters.refused_handles)
    assert len(metrics.DEVICE_FAULTS) == len(page.counters.device_faults)
    assert len(metrics.LATENCY_STAGES) == len(page.counters.irq_latency_ns)


def test_clients_are_counted_by_name(page: metrics.CounterPage) -> None:
    assert page.snapshot()["clients"] == {}
    for _ in range(2):
        metrics.client_row(page.counters, "echo").sessions += 1
    metrics.client_row(page.counters, "a" * 32).client_slow += 5
    assert metrics.read(page.path)["clients"] == {
        "echo": {"sessions": 2, "client_slow": 0},
        "a" * 32: {"sessions": 0, "client_slow": 5},
    }


def test_clients_for_whom_there_is_no_place_are_counted_together(page: metrics.CounterPage) -> None:
    places = len(page.counters.clients)
    for number in range(places + 5):
        metrics.client_row(page.counters, f"client-{number}").sessions += 1
    metrics.client_row(page.counters, "client-3").sessions += 1
    seen = page.snapshot()["clients"]
    assert len(seen) == places
    assert seen["(others)"]["sessions"] == 6
    assert seen["client-3"]["sessions"] == 2


@pytest.mark.parametrize("value", [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 100, 1000, 999_999, 10**9])
def test_a_quantile_is_at_most_a_quarter_too_high(value: int) -> None:
    histogram = ffi.new("struct nb_histogram *")
    lib.nb_histogram_add(histogram, value)
    # A larger one, so that the exact maximum does not help.
    lib.nb_histogram_add(histogram, value * 4 + 10)
    assert value <= metrics.quantile(histogram, 0.5) <= value * 1.25


def test_quantiles_of_a_known_distribution() -> None:
    histogram = ffi.new("struct nb_histogram *")
    for value in range(1, 10_001):
        lib.nb_histogram_add(histogram, value)
    summary = metrics.summary(histogram)
    assert summary["count"] == 10_000
    assert summary["mean"] == 5000
    assert summary["max"] == 10_000
    assert 5000 <= summary["p50"] <= 6250
    assert 9900 <= summary["p99"] <= 10_000


def test_an_interrupt_later_than_any_bucket_is_counted() -> None:
    histogram = ffi.new("struct nb_histogram *")
    lib.nb_histogram_add(histogram, 2**63)
    assert histogram.buckets[159] == 1
    assert metrics.summary(histogram)["max"] == 2**63


def test_the_page_is_gone_with_the_driver(tmp_path: Path) -> None:
    page = metrics.CounterPage(str(tmp_path / "counters"))
    page.close()
    assert not list(tmp_path.iterdir())


def test_no_driver_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(metrics.CountersUnreadable, match="is the driver running"):
        metrics.read(str(tmp_path / "counters"))


@pytest.mark.parametrize("damage", ["empty", "short", "long", "magic"])
def test_a_page_that_is_none_is_refused(page: metrics.CounterPage, tmp_path: Path, damage: str) -> None:
    data = Path(page.path).read_bytes()
    broken = tmp_path / "broken"
    broken.write_bytes({"empty": b"", "short": data[:-1], "long": data + b"\0", "magic": bytes(8) + data[8:]}[damage])
    with pytest.raises(metrics.CountersUnreadable, match="no counters page"):
        metrics.read(str(broken))


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="missing/counters: No such file"):
        metrics.CounterPage(str(tmp_path / "missing" / "counters"))


def test_a_failed_start_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "counters").mkdir()
    with pytest.raises(Exception, match="cannot make the counters page"):
        metrics.CounterPage(str(tmp_path / "counters"))
    assert [path.name for path in tmp_path.iterdir()] == ["counters"]
