"""The rights of a service that has to be root to begin with: another user, and one Linux capability."""

from __future__ import annotations

import ctypes
import os
import pwd

from netbridge.errors import SandboxError, UsageError

CAP_NET_ADMIN = 12

_PR_SET_KEEPCAPS, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 8, 24, 38
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def find_user(name: str) -> pwd.struct_passwd:
    """The user of this name or uid. Raises UsageError."""
    try:
        return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"there is no user {name}; name one that there is with --user") from None


def become(entry: pwd.struct_passwd, capability: int) -> None:
    """Makes this process that user's, with this one capability (below 32) and none that it could gain, not by set-uid
    programs either. Raises SandboxError."""
    last = int(open("/proc/sys/kernel/cap_last_cap").read())  # noqa: SIM115
    for each in range(last + 1):
        if each != capability:
            _step("giving up capabilities", _libc.prctl(_PR_CAPBSET_DROP, each, 0, 0, 0))
    _step("keeping a capability", _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    try:
        os.setgroups([])
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    except OSError as error:
        raise SandboxError(f"cannot become {entry.pw_name}: {error.strerror}; start it as root") from None
    bit = 1 << capability
    data = (_Data * 2)(_Data(bit, bit, 0))
    _step("keeping one capability", _libc.capset(ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), data))
    _step("refusing new privileges", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _step(what: str, result: int) -> None:
    if result < 0:
        raise SandboxError(f"{what} failed: {os.strerror(ctypes.get_errno())}; start it as root")
