"""The console watcher, fed through a socket pair."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from qemu.console import LINE_LENGTH, LINES, Console


class Feed:
    def __init__(self) -> None:
        here, self.guest = socket.socketpair()
        self.panics: list[str] = []
        self.console = Console(here, self.panics.append)

    def say(self, data: bytes) -> None:
        """Print something, and return when the watcher has seen all of it."""
        before = self.console.size
        self.guest.sendall(data)
        deadline = time.monotonic() + 10
        while self.console.size < before + len(data):
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def feed() -> Iterator[Feed]:
    it = Feed()
    yield it
    it.console.close()
    it.guest.close()


def test_lines_are_kept_clean_and_in_order(feed: Feed) -> None:
    feed.say(b"\x1b[2J\x1b[1;1HLinux \x1b[0mversion\r\nsec")
    assert feed.console.tail() == "Linux version\nsec"
    feed.say(b"ond\nthird")
    assert feed.console.lines() == ["Linux version", "second", "third"]
    assert feed.console.tail(2) == "second\nthird"


def test_a_panic_is_told_once_and_at_once(feed: Feed) -> None:
    feed.say(b"[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs\n")
    feed.say(b"[    1.1] CPU: 0\n")
    assert feed.panics == ["[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs"]


def test_words_that_only_resemble_a_panic(feed: Feed) -> None:
    feed.say(b"Kernel command line: panic=-1\nThe kernel does not panic\nDEBUG: all well\n")
    assert feed.panics == []
    assert feed.console.trouble == []


def test_trouble_is_kept(feed: Feed) -> None:
    feed.say(b"fine\nWARNING: CPU: 0 PID: 1 at x.c:1\nBUG: kernel NULL pointer dereference\nOops: 0000 [#1]\n")
    assert [line.split(":")[0] for line in feed.console.trouble] == ["WARNING", "BUG", "Oops"]


@pytest.mark.thorough
def test_a_flood_is_taken_in_bounded_memory(feed: Feed) -> None:
    line = b"x" * 99 + b"\n"
    for _ in range(50):
        feed.say(line * 1000)
    feed.say(b"y" * (1 << 20))
    lines = feed.console.lines()
    assert len(lines) <= LINES + 1
    assert max(map(len, lines)) <= 4 * LINE_LENGTH
    assert feed.console.size == 50 * 100_000 + (1 << 20)


def test_waiting_for_a_line_past_or_to_come(feed: Feed) -> None:
    feed.say(b"one 1\n")
    match = feed.console.wait_for(r"one (\d)", 0)
    assert match is not None
    assert match[1] == "1"
    later = threading.Timer(0.05, lambda: feed.guest.sendall(b"noise\n" * 3000 + b"two 2\n"))
    later.start()
    match = feed.console.wait_for(r"two (\d)", 5)
    assert match is not None
    later.join()
    assert feed.console.wait_for("three", 0.05) is None


def test_waiting_ends_with_the_console(feed: Feed) -> None:
    feed.guest.sendall(b"last words")
    feed.guest.close()
    began = time.monotonic()
    assert feed.console.wait_for("last words", 10) is not None
    assert feed.console.wait_for("more", 10) is None
    assert time.monotonic() - began < 5


def test_typing(feed: Feed) -> None:
    feed.console.write(b"root\n")
    assert feed.guest.recv(10) == b"root\n"
