"""The driver's system calls: what it may call, as data, and the filter the kernel makes of it.

A filter is a classic BPF program over `struct seccomp_data` (linux/seccomp.h, linux/filter.h). It is put together here,
in the monitor, and handed to the driver as bytes. What is not on the list does not happen: the kernel stops the caller
and asks the monitor, which writes the call's name into the log and kills the driver (`answer` says the few exceptions).
Without a monitor to ask, such a call fails with ENOSYS.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import platform
import struct

from netbridge.errors import SandboxError
from netbridge.vnode.syscalls import NUMBERS, name_of
from vfio import _abi
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# linux/seccomp.h
RET_KILL_PROCESS = 0x80000000
RET_USER_NOTIF = 0x7FC00000
RET_ERRNO = 0x00050000
RET_ALLOW = 0x7FFF0000
_NOTIF_RECV = 0xC0502100
_NOTIF_SEND = 0xC0182101
_NOTIFICATION = struct.Struct("<QII iIQ6Q")  # struct seccomp_notif with its struct seccomp_data
_RESPONSE = struct.Struct("<QqiI")

# linux/audit.h: EM_X86_64, 64 bits, little-endian. Calls above _X32 are of another ABI, which is not let in.
_ARCH = 0xC000003E
_X32 = 0x40000000

# linux/bpf_common.h and linux/filter.h
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_INSTRUCTION = struct.Struct("<HBBI")
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16


class Call(NamedTuple):
    """A system call that is allowed. With `argument` (counted from 0) only when its lower half is one of `values`, or,
    without these, has none of the bits `never`."""

    name: str
    argument: int | None = None
    values: tuple[int, ...] = ()
    never: int = 0


_VFIO_CALLS = (
    _abi.VFIO_DEVICE_GET_INFO,
    _abi.VFIO_DEVICE_GET_REGION_INFO,
    _abi.VFIO_DEVICE_GET_IRQ_INFO,
    _abi.VFIO_DEVICE_SET_IRQS,
    _abi.VFIO_DEVICE_RESET,
)
_TYPE1_CALLS = (
    _abi.VFIO_CHECK_EXTENSION,
    _abi.VFIO_IOMMU_GET_INFO,
    _abi.VFIO_IOMMU_MAP_DMA,
    _abi.VFIO_IOMMU_UNMAP_DMA,
)
_IOMMUFD_CALLS = (_abi.IOMMU_IOAS_IOVA_RANGES, _abi.IOMMU_IOAS_MAP, _abi.IOMMU_IOAS_UNMAP)
_FCNTL_CALLS = (
    fcntl.F_GETFD,
    fcntl.F_SETFD,
    fcntl.F_GETFL,
    fcntl.F_DUPFD_CLOEXEC,
    fcntl.F_ADD_SEALS,
    fcntl.F_GET_SEALS,
)

# What opens or names files. With something in storage.mounts it is allowed, and Landlock says which files.
FILE_CALLS = ("open", "openat", "openat2", "stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2",
              "readlink", "readlinkat", "getdents64", "getcwd")  # fmt: skip
# How often the driver may try to open a file before it is killed for that, too.
MOST_FILE_CALLS = 32


def calls(interface: str, *, files: bool = False) -> tuple[Call, ...]:
    """What the driver needs, for a device that was opened through this VFIO interface; the busiest first. `files`:
    there are paths in storage.mounts."""
    memory = _IOMMUFD_CALLS if interface == "iommufd" else _TYPE1_CALLS
    plain = (
        # The pump.
        "epoll_wait", "epoll_pwait", "read", "write", "poll", "ppoll", "epoll_ctl", "epoll_create1",
        # The port, with sockets that are there: there is no `socket`, no `connect`, no `bind`.
        "accept4", "recvmsg", "recvfrom", "sendmsg", "sendto", "getsockopt", "getsockname",
        # Configuration space; regions, doorbells and deadlines.
        "pread64", "pwrite64", "close", "dup", "fstat", "fstatfs", "lseek", "memfd_create", "eventfd2",
        "timerfd_create", "timerfd_settime",
        # What Python and libc do of their own accord.
        "munmap", "mremap", "madvise", "brk", "futex", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack",
        "clock_gettime", "clock_nanosleep", "sched_yield", "getrandom", "getpid", "gettid", "getrlimit",
        "restart_syscall", "exit", "exit_group",
    )  # fmt: skip
    return (
        *(Call(name) for name in plain),
        Call("ioctl", 1, values=_VFIO_CALLS + memory),
        Call("fcntl", 1, values=_FCNTL_CALLS),
        # Its own limits, and not those of a process that stands by.
        Call("prlimit64", 0, values=(0,)),
        # To size a memfd. There is no ftruncate, which could cut short the counters page, that the monitor has mapped.
        Call("fallocate", 1, values=(0,)),
        Call("mmap", 2, never=mmap.PROT_EXEC),
        Call("mprotect", 2, never=mmap.PROT_EXEC),
        *(Call(name) for name in FILE_CALLS if files),
    )


def program(allowed: Sequence[Call], otherwise: int = RET_USER_NOTIF) -> bytes:
    """The filter: an array of struct sock_filter. `otherwise` is what happens to every other call; one of the RET_
    constants. Calls of another architecture or ABI kill the process. Raises SandboxError on a machine that the table of
    system calls is not for."""
    if platform.machine() != "x86_64":
        raise SandboxError(
            f"there is no list of system calls for {platform.machine()}, so the driver cannot be confined here; "
            "use an x86-64 machine, or mode: permissive"
        )
    instructions = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, _ARCH),
        (_RETURN, 0, 0, RET_KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, RET_KILL_PROCESS),
    ]
    for call in allowed:
        body = _decide(call, otherwise)
        instructions.append((_EQUAL, 0, len(body), NUMBERS[call.name]))
        instructions += body
    instructions.append((_RETURN, 0, 0, otherwise))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


def _decide(call: Call, otherwise: int) -> list[tuple[int, int, int, int]]:
    """What follows once it is known to be this call; always ends in a return."""
    if call.argument is None:
        return [(_RETURN, 0, 0, RET_ALLOW)]
    body = [(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * call.argument)]
    if call.values:
        for value in call.values:
            body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, RET_ALLOW)]
        return [*body, (_RETURN, 0, 0, otherwise)]
    return [*body, (_ANY_BIT, 1, 0, call.never), (_RETURN, 0, 0, RET_ALLOW), (_RETURN, 0, 0, otherwise)]


class Violation(NamedTuple):
    """A system call that the kernel stopped. `id` is the kernel's, for the answer."""

    id: int
    pid: int
    name: str
    arguments: tuple[int, ...]

    @property
    def opens_a_file(self) -> bool:
        return self.name in FILE_CALLS


def receive(listener: int) -> Violation | None:
    """The call that the listener's (readable) fd tells of; None when its caller is gone already. Raises OSError."""
    raw = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _NOTIF_RECV, raw, True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    ident, pid, _, number, _, _, *arguments = _NOTIFICATION.unpack(raw)
    return Violation(ident, pid, name_of(number), tuple(arguments))


def refuse(listener: int, violation: Violation, code: int = errno.EACCES) -> None:
    """Lets the caller go on, with this error for an answer."""
    raw = bytearray(_RESPONSE.pack(violation.id, 0, -code, 0))
    try:
        fcntl.ioctl(listener, _NOTIF_SEND, raw, True)
    except OSError as error:
        if error.errno != errno.ENOENT:  # the caller was killed meanwhile
            raise
