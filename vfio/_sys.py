"""The lowest seam: every ioctl and every write to sysfs of this package goes through here.

Tests replace `ioctl` and `write_file` to play the kernel; nothing above needs to know.
"""

from __future__ import annotations

import fcntl
import os

from vfio._abi import ffi
from vfio.errors import Malformed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# No info struct of VFIO is anywhere near this long; a kernel that asks for more is not believed.
_INFO_LIMIT = 1 << 20
_CAPABILITY_LIMIT = 64


def ioctl(fd: int, request: int, argument: Any = 0) -> int:
    """One ioctl. `argument` is an int, or a *mutable* buffer that the kernel may change in place.

    With an immutable buffer Python would return the buffer instead of the call's result, and a file descriptor in
    that result would be lost.
    """
    if isinstance(argument, int):
        return fcntl.ioctl(fd, request, argument)
    result: int = fcntl.ioctl(fd, request, argument, True)
    return result


def write_file(path: str, text: str) -> None:
    """Write `text` to an existing file (a sysfs attribute) with a single write."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def read_file(path: str, limit: int = 65536) -> str:
    """The text of a small file, without the white space around it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, limit).decode(errors="replace").strip()
    finally:
        os.close(fd)


def struct(name: str, **lengths: int) -> Any:
    """A zeroed kernel struct with its size filled in; `lengths` gives the number of elements of its flexible array."""
    value = ffi.new(f"struct {name} *", lengths)
    # VFIO calls the leading field argsz, iommufd calls it size.
    setattr(value, "size" if name.startswith("iommu_") else "argsz", len(ffi.buffer(value)))
    return value


def call(fd: int, request: int, value: Any) -> int:
    """An ioctl on a struct made by `struct()`; the kernel's answer is in the struct afterwards."""
    return ioctl(fd, request, ffi.buffer(value))


def query(fd: int, request: int, name: str, index: int | None = None) -> tuple[Any, bytearray]:
    """Ask for an info struct that may carry a chain of capabilities; gives the struct and all of its bytes.

    The kernel says how much room it needs, so the question is put again with that much.
    """
    size = ffi.sizeof(f"struct {name}")
    for _ in range(8):
        raw = bytearray(size)
        info: Any = ffi.from_buffer(f"struct {name} *", raw, require_writable=True)
        info.argsz = size
        if index is not None:
            info.index = index
        ioctl(fd, request, raw)
        if info.argsz <= size:
            return info, raw
        size = info.argsz
        if size > _INFO_LIMIT:
            break
    raise Malformed(f"the kernel asked for {size} bytes for struct {name}, which cannot be right")


def capabilities(raw: bytearray, first: int) -> Iterator[tuple[int, int]]:
    """Walk the capability chain of an info struct: (id, offset of its header) of each. A chain that leaves the
    struct or runs in a circle is refused."""
    header_size = ffi.sizeof("struct vfio_info_cap_header")
    seen: set[int] = set()
    offset = first
    while offset:
        if offset in seen or len(seen) >= _CAPABILITY_LIMIT or offset + header_size > len(raw):
            raise Malformed(f"the kernel's capability chain is broken at offset {offset} of {len(raw)} bytes")
        seen.add(offset)
        header: Any = at("struct vfio_info_cap_header", raw, offset)
        yield header.id, offset
        offset = header.next


def at(name: str, raw: bytearray, offset: int) -> Any:
    """View the bytes at `offset` as a C struct; refused when it would not fit."""
    if offset + ffi.sizeof(name) > len(raw):
        raise Malformed(f"{name} at offset {offset} leaves the {len(raw)} bytes the kernel gave")
    return ffi.from_buffer(f"{name} *", memoryview(raw)[offset:], require_writable=True)


def array_at(name: str, raw: bytearray, offset: int, count: int) -> Any:
    """View `count` structs at `offset`; refused when they would not fit."""
    if offset + count * ffi.sizeof(name) > len(raw):
        raise Malformed(f"{count} of {name} at offset {offset} leave the {len(raw)} bytes the kernel gave")
    end = offset + count * ffi.sizeof(name)
    return ffi.from_buffer(f"{name}[]", memoryview(raw)[offset:end], require_writable=True)


def close_all(fds: list[int]) -> None:
    """Close file descriptors that an error left without an owner, the last opened first."""
    while fds:
        os.close(fds.pop())
