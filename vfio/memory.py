"""Memory for a device to read and write: memfds that can be shared with other processes, anonymous, or huge pages."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from vfio._abi import ffi
from vfio.errors import VfioError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
HUGE_2M = 2 << 20
HUGE_1G = 1 << 30
_HUGE_FLAGS = {HUGE_2M: os.MFD_HUGE_2MB, HUGE_1G: os.MFD_HUGE_1GB}


class Memory:
    """A piece of memory mapped into this process, ready to be mapped for DMA with `Device.iommu.map`.

    Made by `memfd`, `anonymous`, `hugetlb` or `from_fd`. It owns its mapping and its file descriptor: `close()` it or
    use it as a context manager. Unmap it from the IOMMU first: pages that are still mapped for DMA stay pinned, and a
    device can still write to them.

    - `size`: bytes, a multiple of `page_size`
    - `page_size`: bytes of the pages that it is made of (the system's, mostly 4096, or a huge page's)
    - `address`: where it is in this process, for C code
    - `view`: a writable memoryview of all of it, format "B". While views cut from it are alive, the memory stays
      mapped even after `close()`, so they never point into nothing.
    """

    def __init__(self, mapping: mmap.mmap, fd: int, page_size: int, name: str) -> None:
        self._mapping: mmap.mmap | None = mapping
        self._fd = fd
        self.size = len(mapping)
        self.page_size = page_size
        self.name = name
        self.view = memoryview(mapping)
        with ffi.from_buffer(mapping) as start:
            self.address = int(ffi.cast("uintptr_t", start))

    @classmethod
    def memfd(cls, size: int, name: str = "vfio", huge: bool | int = False, seal: bool = True) -> Memory:
        """Memory behind a memfd, which other processes can map when they are sent `fd`.

        `size` in bytes, rounded up to whole pages. `huge`: True for 2 MiB pages, or the page size in bytes. `seal`:
        forbid every later change of its size (F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL), so that nobody it is shared
        with can cut it short under us. `name` shows in /proc/<pid>/maps. See memfd_create(2).
        """
        page_size = _page_size(huge)
        size = _round(size, page_size)
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if huge:
            flags |= os.MFD_HUGETLB | _HUGE_FLAGS[page_size]
        try:
            fd = os.memfd_create(name, flags)
        except OSError as error:
            raise _refused(size, page_size, error) from None
        try:
            os.ftruncate(fd, size)
            if seal:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(mmap.mmap(fd, size), fd, page_size, name)
        except OSError as error:
            os.close(fd)
            raise _refused(size, page_size, error) from None
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def anonymous(cls, size: int, huge: bool | int = False) -> Memory:
        """Memory that no other process can share; it has no `fd`. `size` and `huge` as for `memfd`. A forked child
        does not get it."""
        page_size = _page_size(huge)
        size = _round(size, page_size)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if huge:
            flags |= _MAP_HUGETLB | (page_size.bit_length() - 1) << _MAP_HUGE_SHIFT
        try:
            mapping = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            raise _refused(size, page_size, error) from None
        # Copy-on-write after a fork would part this process from the pages that the device uses.
        mapping.madvise(mmap.MADV_DONTFORK)
        return cls(mapping, -1, page_size, "anonymous")

    @classmethod
    def hugetlb(cls, size: int, page_size: int = HUGE_2M, name: str = "vfio", seal: bool = True) -> Memory:
        """A memfd made of huge pages; the same as `memfd(size, name, huge=page_size)`."""
        return cls.memfd(size, name, page_size, seal)

    @classmethod
    def from_fd(cls, fd: int, size: int | None = None, *, name: str = "shared", require_seals: bool = False) -> Memory:
        """Memory behind a memfd that came from elsewhere. Takes ownership of `fd`, even when it fails.

        `size` in bytes, or None for all of it. `require_seals`: refuse a file that somebody could still shrink, which
        would kill this process with SIGBUS on the next access. Raises `VfioError`.
        """
        if fd < 0:
            raise VfioError(f"{fd} is not a file descriptor")
        try:
            page_size = max(mmap.PAGESIZE, os.fstatvfs(fd).f_bsize)
            whole = os.fstat(fd).st_size
            wanted = whole if size is None else size
            if wanted <= 0 or wanted > whole or wanted % page_size:
                raise VfioError(f"cannot map {wanted} bytes of shared memory that has {whole} in pages of {page_size}")
            if require_seals and not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise VfioError(
                    "shared memory without F_SEAL_SHRINK is refused",
                    cause="whoever sent it could shrink it under this process",
                    fix="seal it before sending it",
                )
            return cls(mmap.mmap(fd, wanted), fd, page_size, name)
        except OSError as error:
            try:
                os.close(fd)
            except OSError:
                pass  # there is no such file
            raise VfioError("cannot map the shared memory", errno=error.errno) from None
        except BaseException:
            os.close(fd)
            raise

    @property
    def fd(self) -> int:
        """The memfd, still owned by this object. Raises `VfioError` for anonymous memory, which has none."""
        if self._fd < 0:
            raise VfioError(f"{self!r} has no file descriptor to share", fix="use Memory.memfd for memory to be shared")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._mapping is None

    def close(self) -> None:
        """Unmap it and close its file descriptor. Doing it twice is harmless."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        try:
            self.view.release()
            mapping.close()
        except BufferError:
            pass  # views cut from it are still alive: it goes with the last of them

    def __del__(self) -> None:
        if getattr(self, "_mapping", None) is not None:
            self.close()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Memory {self.name} {self.size:#x} bytes{' closed' if self.closed else ''}>"


# <linux/mman.h>; Python's mmap module does not have them all.
_MAP_HUGETLB = 0x40000
_MAP_HUGE_SHIFT = 26


def _page_size(huge: bool | int) -> int:
    if not huge:
        return mmap.PAGESIZE
    size = HUGE_2M if huge is True else huge
    if size not in _HUGE_FLAGS:
        raise VfioError(f"there are no huge pages of {size} bytes", fix="give True, vfio.HUGE_2M or vfio.HUGE_1G")
    return size


def _round(size: int, page_size: int) -> int:
    rounded = (size + page_size - 1) // page_size * page_size
    if not 0 < rounded < 1 << 63:
        raise VfioError(f"memory of {size} bytes makes no sense", fix="give a positive number of bytes")
    return rounded


def _refused(size: int, page_size: int, error: OSError) -> VfioError:
    doing = f"no memory of {size:#x} bytes in pages of {page_size:#x} to be had"
    if page_size == mmap.PAGESIZE:
        fix = "free some memory, or raise the limit (ulimit -v, or the cgroup's memory.max)"
        if error.errno == errno.EMFILE:
            fix = "close file descriptors, or raise the limit (ulimit -n)"
        return VfioError(doing, errno=error.errno, fix=fix)
    directory = f"/sys/kernel/mm/hugepages/hugepages-{page_size // 1024}kB"
    try:
        with open(f"{directory}/free_hugepages", encoding="ascii") as file:
            free: str | None = file.read().strip()
    except OSError:
        free = None
    needed = size // page_size
    if free is None:
        cause, fix = "this kernel has no pages of that size", "use another page size, or huge=False"
    else:
        cause = f"{needed} huge pages are needed, {free} are free"
        fix = f"reserve more: echo {needed} > {directory}/nr_hugepages"
    return VfioError(doing, errno=error.errno, cause=cause, fix=fix)
