"""A directory of things that are expensive to make, each under a key of everything that went into it.

An entry is either complete or not there: it is made in a directory beside its place and renamed into it when all of
it is on the disk. Builders of the same entry wait for each other; builders of different ones do not. Several checkouts
and several processes share one cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qemu.errors import ImageBuildFailed

Progress = Callable[[str], None]
"""Is told, a line at a time, what is being done."""

KEY_DIGITS = 16
FLUSH_SINGLY = 50
"""More files than that are flushed to the disk together with everybody else's."""


def cache_root() -> Path:
    """Where images are kept: VFIO_GUESTS_CACHE, or else vfio-guests in the user's cache directory."""
    explicit = os.environ.get("VFIO_GUESTS_CACHE")
    if explicit:
        return Path(explicit).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG base directory specification: a relative path is to be ignored.
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "vfio-guests"


def key_of(*inputs: str | bytes) -> str:
    """A key that is another one whenever any of the inputs, or where one ends and the next begins, is."""
    digest = hashlib.sha256()
    for part in inputs:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:KEY_DIGITS]


@dataclass(frozen=True)
class Entry:
    """Something in the cache. `used` is when it was last asked for, in seconds since the epoch."""

    path: Path
    kind: str
    key: str
    used: float

    def size(self) -> int:
        """Bytes on the disk."""
        files = [self.path, *self.path.rglob("*")]
        return sum(file.lstat().st_blocks * 512 for file in files)


class Cache:
    """The cache below `root`. Making one touches nothing."""

    def __init__(self, root: Path | None = None):
        self.root = root or cache_root()

    def find(self, kind: str, key: str) -> Path | None:
        """The directory of an entry, or None while there is none."""
        place = self.root / f"{kind}-{key}"
        return _used(place) if place.is_dir() else None

    def ensure(
        self, kind: str, key: str, build: Callable[[Path], None], progress: Progress, *, durable: bool = True
    ) -> Path:
        """The directory of an entry, after `build` has filled an empty one when it was not there yet.

        Not `durable` is what may be incomplete after a power cut, because whoever uses it finds that out.

        Raises ImageBuildFailed when the disk is full or the cache cannot be written, and whatever `build` raises;
        nothing is left behind then.
        """
        place = self.root / f"{kind}-{key}"
        if place.is_dir():
            return _used(place)
        try:
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            with self._lock(place.name, progress):
                if place.is_dir():
                    return _used(place)
                for stale in self.root.glob(f".{place.name}.*"):
                    shutil.rmtree(stale)
                self._build(place, build, progress, durable)
        except OSError as error:
            raise ImageBuildFailed(
                f"{place}: {error}. The cache must be writable and have about 1 GB of room; "
                f"set VFIO_GUESTS_CACHE to keep it elsewhere"
            ) from error
        return place

    def _build(self, place: Path, build: Callable[[Path], None], progress: Progress, durable: bool) -> None:
        partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=self.root))
        started = time.monotonic()
        try:
            build(partial)
            partial.chmod(0o755)
            if durable:
                _flush(partial)
            partial.rename(place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        progress(f"{place.name} built in {time.monotonic() - started:.1f} s")

    @contextlib.contextmanager
    def _lock(self, name: str, progress: Progress) -> Iterator[None]:
        # The kernel drops the lock with its holder, so none outlives a builder that was killed. The lock's file
        # stays: whoever removed it could not know who is about to wait for it.
        with (self.root / "locks" / name).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"{name} is being built by another process; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def entries(self) -> list[Entry]:
        """What is complete, the longest unused first."""
        found = []
        for path in self.root.glob("*-*"):
            kind, _, key = path.name.rpartition("-")
            if kind and len(key) == KEY_DIGITS and path.is_dir() and not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):  # another process may be clearing up, too
                    found.append(Entry(path, kind, key, path.stat().st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    def collect(self, unused_seconds: float) -> list[Entry]:
        """Remove the entries that nobody asked for in so long, and what dead builders left. Returns those removed."""
        limit = time.time() - unused_seconds
        removed = [entry for entry in self.entries() if entry.used < limit and _remove(entry.path)]
        self._collect_partial()
        return removed

    def trim(self, kind: str, keep: int) -> None:
        """Remove all entries of that kind but the `keep` last used."""
        entries = [entry for entry in self.entries() if entry.kind == kind]
        for entry in entries[: max(0, len(entries) - keep)]:
            _remove(entry.path)

    def remove(self, kind: str, key: str) -> None:
        """Remove an entry, if it is there."""
        _remove(self.root / f"{kind}-{key}")

    def _collect_partial(self) -> None:
        for partial in self.root.glob(".*-*"):
            with (self.root / "locks" / partial.name[1:].split(".")[0]).open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                shutil.rmtree(partial, ignore_errors=True)


def _remove(place: Path) -> bool:
    """Whether it was there and is removed now."""
    # Out of the way in one step, so that no one finds half of it.
    doomed = place.with_name(f".{place.name}.removed.{os.getpid()}")
    try:
        place.rename(doomed)
    except OSError:
        return False
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def _flush(directory: Path) -> None:
    # An entry is renamed when it is on the disk: after a power cut, too, what has its name is complete.
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    if len(files) > FLUSH_SINGLY:
        os.sync()
        return
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _used(place: Path) -> Path:
    # A cache that is shared read-only serves as well; then no one counts its uses.
    with contextlib.suppress(OSError):
        os.utime(place)
    return place
