"""The cache: built once, all or nothing, and in nobody's way."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qemu.cache import Cache, cache_root, key_of
from qemu.errors import ImageBuildFailed

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef"


def leftovers(cache: Cache) -> list[str]:
    return [path.name for path in cache.root.iterdir() if path.name != "locks"]


def write_first(out: Path) -> None:
    (out / "file").write_text("first")


def test_it_is_built_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    lines: list[str] = []
    first = cache.ensure("root", KEY, write_first, lines.append)
    again = cache.ensure("root", KEY, lambda _out: pytest.fail("built again"), lines.append)
    assert first == again == tmp_path / f"root-{KEY}"
    assert (first / "file").read_text() == "first"
    assert len(lines) == 1
    assert lines[0].startswith(f"root-{KEY} built in ")


def test_a_failed_build_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail(out: Path) -> None:
        (out / "half").write_text("half")
        raise ImageBuildFailed("the mirror is down")

    with pytest.raises(ImageBuildFailed, match="the mirror is down"):
        cache.ensure("root", KEY, fail, print)
    assert leftovers(cache) == []
    cache.ensure("root", KEY, lambda _out: None, print)
    assert leftovers(cache) == [f"root-{KEY}"]


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fill(_out: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ImageBuildFailed, match=r"No space left on device\. The cache must .* VFIO_GUESTS_CACHE"):
        cache.ensure("root", KEY, fill, print)
    assert leftovers(cache) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def interrupted(out: Path) -> None:
        (out / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.ensure("root", KEY, interrupted, print)
    assert leftovers(cache) == []


def test_what_a_killed_builder_leaves_is_not_taken_for_complete_and_is_cleared(tmp_path: Path) -> None:
    builder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from pathlib import Path\n"
            "from qemu.cache import Cache\n"
            "def build(out):\n"
            "    (out / 'half').write_text('half')\n"
            "    print('started', flush=True)\n"
            "    time.sleep(60)\n"
            f"Cache(Path({str(tmp_path)!r})).ensure('root', {KEY!r}, build, print)\n",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert builder.stdout is not None
    assert builder.stdout.readline() == b"started\n"
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    cache = Cache(tmp_path)
    assert len(leftovers(cache)) == 1
    assert cache.entries() == []
    assert list(cache.ensure("root", KEY, lambda out: (out / "whole").touch(), print).iterdir()) == [
        tmp_path / f"root-{KEY}" / "whole"
    ]
    assert leftovers(cache) == [f"root-{KEY}"]


def test_two_builders_build_once_and_the_second_says_that_it_waits(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    building, waiting, go_on = threading.Event(), threading.Event(), threading.Event()
    built: list[str] = []

    def slow(_out: Path) -> None:
        building.set()
        assert go_on.wait(10)
        built.append("first")

    def told(line: str) -> None:
        if line == f"root-{KEY} is being built by another process; waiting for it":
            waiting.set()

    threads = [threading.Thread(target=lambda: cache.ensure("root", KEY, slow, print))]
    threads[0].start()
    assert building.wait(10)
    threads.append(
        threading.Thread(target=lambda: cache.ensure("root", KEY, lambda _out: built.append("second"), told))
    )
    threads[1].start()
    assert waiting.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert built == ["first"]


def test_another_entry_can_be_built_meanwhile(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def build_another(_out: Path) -> None:
        cache.ensure("kernel", KEY, lambda _inner: None, print)

    cache.ensure("root", KEY, build_another, print)
    assert sorted(leftovers(cache)) == [f"kernel-{KEY}", f"root-{KEY}"]


def test_gc_removes_what_was_not_used_for_so_long_and_nothing_else(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    old = cache.ensure("root", KEY, lambda _out: None, print)
    cache.ensure("kernel", KEY, lambda _out: None, print)
    foreign = tmp_path / "something-of-mine"
    foreign.mkdir()
    for path in (old, foreign):
        os.utime(path, (time.time() - 10 * 86400,) * 2)
    (tmp_path / f".root-{KEY}.dead").mkdir()
    assert [entry.path for entry in cache.collect(9 * 86400)] == [old]
    assert sorted(leftovers(cache)) == [f"kernel-{KEY}", "something-of-mine"]


def test_gc_leaves_a_build_that_is_under_way_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def build(out: Path) -> None:
        assert cache.collect(0) == []
        assert out.exists()

    cache.ensure("root", KEY, build, print)


def test_asking_for_an_entry_counts_as_use(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    place = cache.ensure("root", KEY, lambda _out: None, print)
    os.utime(place, (0, 0))
    cache.ensure("root", KEY, lambda _out: None, print)
    assert cache.collect(3600) == []


def test_a_key_depends_on_each_input_and_on_where_it_ends() -> None:
    assert key_of("ab", "c") == key_of("ab", b"c")
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("ab", "c", ""), key_of("c", "ab")}) == 5


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VFIO_GUESTS_CACHE", str(tmp_path / "explicit"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "explicit"
    monkeypatch.delenv("VFIO_GUESTS_CACHE")
    assert cache_root() == tmp_path / "xdg/vfio-guests"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache/vfio-guests"
