"""The counters page: written by the driver in shared memory, read by whoever may, without disturbing it.

The monitor makes a file in the run directory, and the driver counts into a mapping of it (`struct nb_counters` in the
core's api.h); `netbridge stats` copies the same file. Nothing is locked: a reader sees each counter whole, all of them
almost at one moment.
"""

from __future__ import annotations

import mmap
import os
import struct

from netbridge.datapath._core import ffi, lib
from netbridge.errors import NetbridgeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

MAGIC = int.from_bytes(b"NBCOUNT1", "little")
_HEADER = struct.Struct("<QQ")


def _names(enum: str, prefix: str, count: int) -> tuple[str, ...]:
    """The enumerators of `enum` in order, in lower case and without their prefix."""
    elements = ffi.typeof(f"enum {enum}").elements
    return tuple(elements[value].removeprefix(prefix).lower() for value in range(count))


DROP_REASONS = _names("nb_drop", "NB_DROP_", lib.NB_DROPS)
REFUSALS = _names("nb_refusal", "NB_REFUSE_", lib.NB_REFUSALS)
DEVICE_FAULTS = _names("nb_device_fault", "NB_FAULT_", lib.NB_FAULTS)
LATENCY_STAGES = _names("nb_latency_stage", "NB_LATENCY_", lib.NB_LATENCY_STAGES)
RECOVERIES = _names("nb_recovery", "NB_RECOVERY_", lib.NB_RECOVERIES)

# Arrays of counters and what each place in them counts.
_LABELS: dict[str, tuple[str, ...]] = {
    "drops": DROP_REASONS,
    "refused_handles": REFUSALS,
    "device_faults": DEVICE_FAULTS,
    "recoveries": RECOVERIES,
    "rx_bursts": tuple(f"{1 << i}+" for i in range(12)),
    "tx_bursts": tuple(f"{1 << i}+" for i in range(12)),
}


OTHERS = "(others)"  # no client can be called that


class CountersUnreadable(NetbridgeError):
    """There is no driver's counters page where one was looked for."""


class CounterPage:
    """The page, for those who write it. The monitor makes it with a `path`, keeps it over the lives of its drivers, and
    removes it in `close`; a driver takes over the file it is handed, with `adopt`. `counters` is a
    `struct nb_counters *` for the core, good until `close`; `fd` is the file, for handing it over."""

    def __init__(self, path: str, exported: Iterable[str] | None = None) -> None:
        """`exported`: the metrics that the manifest lists; all of them if not said. Raises
        NetbridgeError when the file cannot be made."""
        self.path = path
        size = ffi.sizeof("struct nb_counters")
        temporary = f"{path}.{os.getpid()}"
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                # Whatever this process's umask is: everybody may read it.
                os.fchmod(fd, 0o644)
                os.ftruncate(fd, size)
                # A page that is full of zeroes is in memory and on the file system before anything counts on it.
                os.posix_fallocate(fd, 0, size)
                self._attach(fd)
                os.rename(temporary, path)
            except OSError:
                os.close(fd)
                os.unlink(temporary)
                raise
        except OSError as error:
            raise NetbridgeError(f"cannot make the counters page {path}: {error.strerror}") from error
        self.counters.size = size
        # Not needed by a driver, which has no room for it.
        from netbridge.vnode.metric_names import METRIC_NAMES

        listed = METRIC_NAMES if exported is None else exported
        self.counters.exported = sum(1 << METRIC_NAMES.index(name) for name in listed)
        self.counters.magic = MAGIC

    @classmethod
    def adopt(cls, fd: int) -> CounterPage:
        """The page that the monitor made. Takes ownership of `fd`, and closes it: the mapping is enough. Raises
        OSError."""
        page = cls.__new__(cls)
        page.path = ""  # not its own to remove
        try:
            page._attach(fd)
        finally:
            os.close(fd)
        page.fd = -1
        return page

    def _attach(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, ffi.sizeof("struct nb_counters"))
        self._buffer = ffi.from_buffer("uint8_t[]", self._map)
        self.counters = ffi.cast("struct nb_counters *", self._buffer)

    def snapshot(self) -> dict[str, Any]:
        """All counters as plain data; see `as_dict`."""
        return as_dict(self.counters)

    def close(self) -> None:
        """Removes the file, if this made it, and unmaps. Nothing may count any more."""
        if self.path:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.counters = ffi.NULL
        ffi.release(self._buffer)
        self._map.close()


def read(path: str) -> dict[str, Any]:
    """The counters of a running driver. Raises CountersUnreadable for a file that is not such a page."""
    return as_dict(load(path))


def exported(counters: Any) -> tuple[str, ...]:
    """The metrics that the driver's manifest lists."""
    from netbridge.vnode.metric_names import METRIC_NAMES

    return tuple(name for bit, name in enumerate(METRIC_NAMES) if counters.exported >> bit & 1)


def load(path: str) -> Any:
    """A copy of the page as a `struct nb_counters *`. Raises CountersUnreadable."""
    size = ffi.sizeof("struct nb_counters")
    try:
        with open(path, "rb") as file:
            # A copy, not a mapping: a file that shrinks then cannot end this process with SIGBUS.
            data = file.read(size + 1)
    except OSError as error:
        raise CountersUnreadable(
            f"no counters at {path}: {error.strerror}; is the driver running? Name its page with --counters"
        ) from error
    if len(data) < _HEADER.size or _HEADER.unpack_from(data) != (MAGIC, size) or len(data) != size:
        raise CountersUnreadable(f"{path} is no counters page of this version ({size} bytes were expected)")
    counters = ffi.new("struct nb_counters *")
    ffi.memmove(counters, data, size)
    return counters


def as_dict(counters: Any) -> dict[str, Any]:
    """A `struct nb_counters *` as plain data: counters by name, arrays by label, histograms summed up (ns)."""
    data: dict[str, Any] = {}
    for name, field in ffi.typeof("struct nb_counters").fields:
        value = getattr(counters, name)
        if name in ("magic", "size", "exported", "device"):
            continue
        if name in _LABELS:
            data[name] = {label: int(value[i]) for i, label in enumerate(_LABELS[name])}
        elif name == "clients":
            data[name] = {
                _client_name(row): {"sessions": int(row.sessions), "client_slow": int(row.client_slow)}
                for row in value
                if row.name[0]
            }
        elif field.type.kind == "struct":
            data[name] = summary(value)
        elif field.type.kind == "array":
            data[name] = {stage: summary(value[i]) for i, stage in enumerate(LATENCY_STAGES)}
        else:
            data[name] = int(value)
    return data


def client_row(counters: Any, name: str) -> Any:
    """The `struct nb_client_counters *` of the client of this name: the one it had before, else a new one; the last is
    for everybody who came when all were taken. For the driver only."""
    rows = counters.clients
    padded = name.encode().ljust(len(rows[0].name), b"\0")
    for row in rows[0 : len(rows) - 1]:
        if bytes(row.name) == padded:
            return ffi.addressof(row)
        if not row.name[0]:
            break
    else:
        row = rows[len(rows) - 1]
        padded = OTHERS.encode().ljust(len(row.name), b"\0")
    ffi.buffer(row.name)[:] = padded
    return ffi.addressof(row)


def _client_name(row: Any) -> str:
    return bytes(row.name).rstrip(b"\0").decode("ascii", "replace")


def summary(histogram: Any) -> dict[str, int]:
    """A `struct nb_histogram` in five numbers, nanoseconds. Quantiles are a bucket's upper end: at most a quarter too
    high."""
    return {
        "count": int(histogram.count),
        "mean": int(histogram.sum_ns // histogram.count) if histogram.count else 0,
        "p50": quantile(histogram, 0.5),
        "p99": quantile(histogram, 0.99),
        "max": int(histogram.max_ns),
    }


def quantile(histogram: Any, fraction: float) -> int:
    """The value, in nanoseconds, that `fraction` of what was added does not exceed; 0 when nothing was added."""
    wanted = fraction * histogram.count
    seen = 0
    for bucket, count in enumerate(histogram.buckets):
        seen += count
        if count and seen >= wanted:
            return min(bucket_end(bucket), int(histogram.max_ns))
    return 0


def bucket_end(bucket: int) -> int:
    """The largest value of a bucket (nb_histogram_add in the core)."""
    if bucket < 8:
        return bucket
    power, quarter = divmod(bucket, 4)
    return ((5 + quarter) << (power - 2)) - 1
