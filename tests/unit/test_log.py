"""The log is nobody's brake: not a reader's who does not read, not a device's or a client's who causes events."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from netbridge.log import MOST_A_SECOND, Log


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_an_event_without_end_is_left_out_and_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("netbridge.log.time.monotonic", lambda: now)
    log = Log(True)
    for _ in range(MOST_A_SECOND + 5):
        log("link", up=True)
    assert lines(capsys) == ["netbridge: 100.000 link up=True"] * MOST_A_SECOND
    log("serving")
    assert lines(capsys) == ["netbridge: 100.000 serving left_out=5"], "others are written meanwhile"
    now = 101.0
    log("link", up=False)
    assert lines(capsys) == ["netbridge: 101.000 link up=False"]


FLOOD = """\
from netbridge.log import Log
import netbridge.log
netbridge.log.MOST_A_SECOND = 10**9
log = Log(True)
for number in range(2000):
    log("event", text="x" * 100)
print("done", flush=True)
input()
log("event", text="x" * 10_000)
log("last")
"""


def test_a_reader_who_does_not_read_keeps_nobody_waiting() -> None:
    read, write = os.pipe()
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", FLOOD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=write,
        text=True,
        cwd=root,
    ) as process:
        os.close(write)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "done\n", "2000 lines into a pipe that nobody reads"
            held = os.read(read, 1 << 20).decode().splitlines()
            process.stdin.write("\n")
            process.stdin.close()
            with os.fdopen(read) as rest:
                *long, last = rest.read().splitlines()
        finally:
            process.kill()
    assert all(line.endswith("x" * 100) for line in held), "no line was cut"
    assert long[0].endswith(" ...")
    assert len(long[0]) < 4096
    assert " left_out=" in long[0]
    assert last.endswith(" last"), "what was left out has been told, once"
