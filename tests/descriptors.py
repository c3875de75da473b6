"""The file descriptors that this process has open, for tests of what is left behind."""

from __future__ import annotations

from pathlib import Path


def open_fds() -> set[str]:
    """Their numbers, apart from that of the one that lists them."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            fd.readlink()
            found.add(fd.name)
        except OSError:
            continue
    return found


def count_open_fds() -> int:
    """For what closes one and opens another, whatever its number."""
    return len(open_fds())
