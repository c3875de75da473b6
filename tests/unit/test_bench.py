"""The benches' arithmetic: rounds that turn, ratios taken within a round, a report that is merged."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bench import __main__ as command
from tests.bench import guest, machine, native, port, report
from tests.bench.contest import Contest, Row, Unavailable, Work
from tests.bench.wire import LoadWire


@pytest.fixture(autouse=True)
def _near(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.cycle([60.0, 280.0])
    monkeypatch.setattr(machine, "cache_line_ns", lambda: next(times))


def figures(*numbers: float) -> Work:
    """Work that measures these, the first of them in the warm-up."""
    return iter(numbers).__next__


def a_row(**changes: object) -> Row:
    contest = Contest("port", "64 B", "frames/s", figures(1, 4, 6, 9), {"memif": figures(1, 2, 2, 2)})
    return Row(**{**contest.run(3)[0].as_dict(), **changes})


def test_the_ratio_is_taken_within_each_round_and_the_warm_up_does_not_count() -> None:
    contest = Contest("port", "64 B", "frames/s", figures(99, 4, 6, 9), {"memif": figures(1, 2, 2, 3)})
    (row,) = contest.run(3)
    assert (row.ratio_median, row.ratio_min, row.ratio_max, row.rounds) == (3.0, 2.0, 3.0, 3)
    assert (row.ours, row.peer, row.peer_name) == (6, 2, "memif")
    assert row.cache_line_ns == (60.0, 280.0)


def test_where_less_is_better_a_ratio_above_one_still_means_ahead() -> None:
    contest = Contest("guest", "round trip", "µs", figures(1, 2, 2, 2), {"kernel": figures(1, 4, 4, 6)}, better="lower")
    (row,) = contest.run(3)
    assert (row.ratio_min, row.ratio_median, row.ratio_max) == (2.0, 2.0, 3.0)


def test_everybody_begins_in_turn() -> None:
    order: list[str] = []

    def work(name: str) -> Work:
        def do() -> float:
            order.append(name)
            return 1.0

        return do

    Contest("b", "m", "u", work("us"), {"x": work("x"), "y": work("y")}).run(3)
    rounds = [order[start : start + 3] for start in range(3, 12, 3)]
    assert rounds == [["us", "x", "y"], ["x", "y", "us"], ["y", "us", "x"]]


def test_a_figure_without_a_peer_is_not_reported() -> None:
    with pytest.raises(Unavailable, match="without one"):
        Contest("b", "m", "u", figures(1), {}).run(3)


def test_a_figure_of_nothing_is_an_error_that_names_who_measured_it() -> None:
    with pytest.raises(ValueError, match="memif measured 0"):
        Contest("b", "m", "u", figures(1, 1), {"memif": figures(1, 0)}).run(1)


def test_a_goal_is_reached_by_the_median() -> None:
    assert a_row(goal=3.0).reached
    assert not a_row(goal=3.1).reached
    assert "BELOW 3.1" in report.table([a_row(goal=3.1)])


def test_a_later_run_replaces_its_bench_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.merge([a_row(bench="port"), a_row(bench="tcp")], path)
    report.merge([a_row(bench="port", metric="1518 B")], path)
    assert [(row.bench, row.metric) for row in report.load(path)] == [("port", "1518 B"), ("tcp", "64 B")]
    assert report.load(path)[1] == a_row(bench="tcp")
    wanted = {
        "bench",
        "metric",
        "unit",
        "ours",
        "peer",
        "peer_name",
        "ratio_median",
        "ratio_min",
        "ratio_max",
        "rounds",
    }
    assert wanted <= set(json.loads(path.read_text())[0])


def test_the_page_keeps_what_is_written_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"# Before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "load", lambda: [a_row(commands=("make bench",))])
    monkeypatch.setattr(report, "MACHINE", tmp_path / "none")
    report.write_page(page)
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\nafter\n")
    assert "| 64 B | frames/s |" in text
    assert "make bench" in text
    assert "old" not in text


def test_a_page_without_its_marks_is_not_touched(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="lacks the line"):
        report.write_page(page)
    assert page.read_text() == "no marks\n"


@pytest.mark.parametrize(
    ("program", "header", "libraries"),
    [("frames_packet", "linux/if_packet.h", ()), ("frames_xdp", "xdp/xsk.h", guest.XDP_LIBRARIES)],
)
def test_the_programs_of_the_kernels_sockets_compile_for_a_guest(
    program: str, header: str, libraries: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/usr/include", header).exists():
        pytest.skip(f"{header} is missing, which comes with DPDK's packages: make bench installs them")
    monkeypatch.setattr(native, "OUT", tmp_path)
    built = native.build(program, flags=guest.FLAGS, libraries=libraries)
    assert subprocess.run([built], check=False).returncode == 2, "it did not ask for its arguments"


@pytest.fixture
def echoing_wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LoadWire, threading.Event]]:
    """A wire with somebody at the other end who sends everything back, once he may."""
    monkeypatch.setattr(native, "OUT", tmp_path)
    may, load = threading.Event(), LoadWire()
    (fd,) = load.fds()
    other = socket.socket(fileno=os.dup(fd))

    def send_back() -> None:
        may.wait()
        while frame := other.recv(2048):  # nothing: it was shut down
            other.send(frame)

    thread = threading.Thread(target=send_back)
    thread.start()
    try:
        yield load, may
    finally:
        may.set()
        other.shutdown(socket.SHUT_RD)
        thread.join()
        other.close()
        load.close()


def test_the_first_answer_has_its_time(echoing_wire: tuple[LoadWire, threading.Event]) -> None:
    load, may = echoing_wire
    with load.first(64, guest.MAC, 20.0) as came:
        begin = time.monotonic()
        may.set()
        assert begin < came() < time.monotonic()


def test_nobody_who_answers_is_told(echoing_wire: tuple[LoadWire, threading.Event]) -> None:
    load, _ = echoing_wire
    with load.first(64, guest.MAC, 0.1) as came, pytest.raises(RuntimeError, match="no frame came back"):
        came()


def test_a_paced_load_is_no_more_than_it_should_be(echoing_wire: tuple[LoadWire, threading.Event]) -> None:
    load, may = echoing_wire
    may.set()
    assert 1 < load.paced(64, guest.MAC, 0.3, 500) < 1000


# ---- The command


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """`python -m tests.bench port`, where that measures one thing, at once, and what it finds is not kept."""
    monkeypatch.setattr(report, "OUT", tmp_path)
    monkeypatch.setattr(report, "MACHINE", tmp_path / "machine.json")
    monkeypatch.setattr(machine, "claim_processors", lambda: None)
    contest = Contest("port", "64 B", "Mpps", figures(*range(1, 7)), {"memif": figures(*range(1, 7))})
    monkeypatch.setattr(port, "contests", lambda quick: [contest])
    return lambda: command.main(["port", "--only", "64 B"])


def test_without_matplotlib_there_are_figures_and_no_pictures(
    bench: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench() == 0
    told = capsys.readouterr()
    assert "64 B" in told.out
    first, *_ = told.err.splitlines()
    assert first == "bench: no pictures will be drawn: matplotlib is missing, which make bench installs"


def test_with_matplotlib_the_pictures_are_named(
    bench: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "can_plot", lambda: True)
    monkeypatch.setattr(report, "plot", lambda rows: [Path(f"{row.bench}.svg") for row in rows])
    assert bench() == 0
    told = capsys.readouterr().err
    assert "port.svg" in told.splitlines()
    assert "matplotlib" not in told
