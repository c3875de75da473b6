"""Confines the process that calls it, for good: what `mode: strict` means.

The driver calls `confine` when it has everything it will ever have: modules imported, files handed over. From then on
it has a uid of its own, no Linux capability and no way to get one, no network, no file system beyond
`storage.mounts`, and the system calls of its list. Any step that fails raises SandboxError, and the driver does not go
on: half a sandbox is none.

Runs in the driver process, so nothing is imported that is not needed. Sources: capabilities(7), seccomp(2),
landlock(7), linux/landlock.h, linux/prctl.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from netbridge.errors import SandboxError
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

# Numbers of system calls that glibc has no function for; the same on every architecture since Linux 5.12.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_SECCOMP = 317  # x86-64, as the filter is

_CLONE_NEWNET, _CLONE_NEWIPC = 0x40000000, 0x08000000
_PR_SET_DUMPABLE, _PR_SET_NAME, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 4, 15, 23, 24
_PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 28, 38, 47, 4
# NOROOT, KEEP_CAPS off, NO_CAP_AMBIENT_RAISE, each locked: uid 0 would mean nothing any more.
_SECUREBITS = 0x01 | 0x02 | 0x20 | 0x40 | 0x80
_MOST_CAPABILITIES = 64
_CAPABILITY_VERSION_3 = 0x20080522

_SECCOMP_SET_MODE_FILTER, _FILTER_FLAG_NEW_LISTENER = 1, 8

# Rights of Landlock by the ABI version that brought them (linux/landlock.h).
_FS_RIGHTS = {1: 0x1FFF, 2: 0x2000, 3: 0x4000, 5: 0x8000}
_NET_RIGHTS = {4: 0x3}
_SCOPES = {6: 0x3}
_READ_RIGHTS = 0x4 | 0x8  # READ_FILE, READ_DIR
_NEVER_RIGHTS = 0x1 | 0x800 | 0x40 | 0x8000  # EXECUTE, MAKE_BLOCK, MAKE_CHAR, IOCTL_DEV
_FILE_RIGHTS = 0x1 | 0x2 | 0x4 | 0x4000 | 0x8000  # those that mean something for a file that is no directory
_RULE_PATH_BENEATH = 1


class Confinement(NamedTuple):
    """What is left to the process. `filter` is a seccomp program (`seccomp.program`); `listen`: violations are told
    through a file that `confine` returns. `mounts`: (path, writable)."""

    uid: int
    gid: int
    filter: bytes
    mounts: tuple[tuple[str, bool], ...] = ()
    listen: bool = True


def confine(plan: Confinement) -> int:
    """Applies it, in an order in which each step still may do what it does. Returns the seccomp listener's fd, for the
    monitor, or -1. Needs root and a single thread. Raises SandboxError."""
    _step("unsharing the network and IPC (CONFIG_NET_NS, CONFIG_IPC_NS)", _libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC))
    _step("setting no_new_privs", _prctl(_PR_SET_NO_NEW_PRIVS, 1))
    restrict_files(plan.mounts)
    drop_privileges(plan.uid, plan.gid)
    _step("hiding its memory from others", _prctl(_PR_SET_DUMPABLE, 0))
    return filter_calls(plan.filter, listen=plan.listen)


def set_name(name: str) -> None:
    """What `ps` and /proc/PID/comm show; at most 15 bytes."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()))


# ---- Identity and Linux capabilities --------------------------------------------------------------------------------


def drop_privileges(uid: int, gid: int) -> None:
    """Takes on this identity, and drops every Linux capability out of every set. Raises SandboxError."""
    for capability in range(_MOST_CAPABILITIES):
        if _prctl(_PR_CAPBSET_READ, capability) < 0:
            break
        _step(f"dropping capability {capability} from the bounding set", _prctl(_PR_CAPBSET_DROP, capability))
    _step("clearing the ambient capabilities", _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL))
    _step("setting the secure bits", _prctl(_PR_SET_SECUREBITS, _SECUREBITS))
    try:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise _failed(f"becoming uid {uid}, gid {gid}", error.errno or 0) from None
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _step("dropping capabilities", _libc.capset(header, nothing))
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3:
        raise SandboxError(f"the process did not become uid {uid}, gid {gid}; it is not confined and must not go on")


# ---- Landlock -------------------------------------------------------------------------------------------------------


class Rights(NamedTuple):
    """What a ruleset takes away unless a rule gives it back, as masks of linux/landlock.h."""

    files: int
    network: int
    scopes: int


def landlock_abi() -> int:
    """The kernel's version of Landlock's interface; 0 when it has none, or was started without it."""
    version = _libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    return max(int(version), 0)


def rights_of(abi: int) -> Rights:
    """Everything that this version of the interface can take away. Versions to come are taken for the last known."""
    return Rights(*(
        sum(mask for version, mask in rights.items() if version <= abi)
        for rights in (_FS_RIGHTS, _NET_RIGHTS, _SCOPES)
    ))  # fmt: skip


def path_rights(handled: int, *, writable: bool, directory: bool) -> int:
    """What a path of storage.mounts leaves allowed, of the rights that are handled."""
    rights = handled & (~_NEVER_RIGHTS if writable else _READ_RIGHTS)
    return rights if directory else rights & _FILE_RIGHTS


def restrict_files(mounts: Sequence[tuple[str, bool]]) -> None:
    """Leaves the file system to this process only as far as `mounts` says: (path, writable). Files that are open stay
    usable. Raises SandboxError; also for a kernel without Landlock."""
    abi = landlock_abi()
    if abi < 1:
        raise SandboxError(
            "this kernel has no Landlock, or was started without it, so the file system cannot be taken from the "
            "driver; add landlock to the kernel command line's lsm=, or use mode: permissive"
        )
    rights = rights_of(abi)
    sizes = {1: 1, 2: 1, 3: 1, 4: 2, 5: 2}  # fields of struct landlock_ruleset_attr that this version knows
    fields = (ctypes.c_uint64 * sizes.get(abi, 3))(*rights[: sizes.get(abi, 3)])
    ruleset = _libc.syscall(_LANDLOCK_CREATE_RULESET, fields, ctypes.c_size_t(ctypes.sizeof(fields)), ctypes.c_uint(0))
    _step("making a Landlock ruleset", ruleset)
    try:
        for path, writable in mounts:
            _leave_path(ruleset, path, writable, rights.files)
        _step("restricting files with Landlock", _libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint(0)))
    finally:
        os.close(ruleset)


def _leave_path(ruleset: int, path: str, writable: bool, handled: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise SandboxError(
            f"storage.mounts names {path}, which cannot be opened: {error.strerror}; make it, or take it off the list"
        ) from None
    try:
        allowed = path_rights(handled, writable=writable, directory=stat.S_ISDIR(os.fstat(fd).st_mode))
        # struct landlock_path_beneath_attr is packed: a __u64 and a __s32.
        rule = allowed.to_bytes(8, "little") + fd.to_bytes(4, "little", signed=True)
        result = _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint(0))
        _step(f"leaving {path} to the driver", result)
    finally:
        os.close(fd)


# ---- seccomp --------------------------------------------------------------------------------------------------------


class _Program(ctypes.Structure):
    """struct sock_fprog (linux/filter.h)"""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_calls(program: bytes, *, listen: bool) -> int:
    """Loads a seccomp program. Returns its listener's fd, or -1 without `listen`. Raises SandboxError."""
    loaded = _libc.syscall(
        _SECCOMP,
        ctypes.c_uint(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_uint(_FILTER_FLAG_NEW_LISTENER if listen else 0),
        ctypes.byref(_Program(len(program) // 8, program)),
    )
    _step("loading the seccomp filter", loaded)
    return int(loaded) if listen else -1


# ---- Odds and ends --------------------------------------------------------------------------------------------------


def _prctl(option: int, argument: Any, third: int = 0) -> int:
    value = ctypes.c_ulong(argument) if isinstance(argument, int) else argument
    return int(_libc.prctl(option, value, ctypes.c_ulong(third), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def _step(what: str, result: int) -> None:
    if result < 0:
        raise _failed(what, ctypes.get_errno())


def _failed(what: str, code: int) -> SandboxError:
    hint = "; start it as root" if code == errno.EPERM else ""
    return SandboxError(f"the driver cannot be confined: {what} failed: {os.strerror(code)}{hint}")
