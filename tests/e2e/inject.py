"""Makes another process call something: `python3 -m tests.e2e.inject PID CALL [ARGUMENT ...]`, as root, in a guest.

What a taken-over driver would do, the real one is made to do from outside: it is stopped while it sleeps in the kernel,
has to execute one system call, and is put back to sleep as if nothing had been. An argument is a number, or text, which
is put into the process's memory. Prints the call's result, or the signal that ended the process. Source: ptrace(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from netbridge.vnode.syscalls import NUMBERS

SEIZE, INTERRUPT, SYSCALL, DETACH, GETREGS, SETREGS = 0x4206, 0x4207, 24, 17, 12, 13
NAMES = """
    r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs
""".split()  # noqa: SIM905
ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
INSTRUCTION = 2  # bytes of `syscall`
BELOW_STACK = 8192  # well below the red zone, in the stack's own pages or those it may grow into


class Registers(ctypes.Structure):
    """struct user_regs_struct (sys/user.h)"""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in NAMES)


_libc = ctypes.CDLL(None, use_errno=True)


def _ptrace(request: int, pid: int, data: object = None) -> None:
    if _libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), None, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace request {request}")


def _ended(pid: int) -> str | None:
    """Waits until it stops; what ended it, if something did."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit {os.WEXITSTATUS(status)}" if os.WIFEXITED(status) else None


def inject(pid: int, number: int, arguments: list[int | bytes]) -> str:
    _ptrace(SEIZE, pid)
    _ptrace(INTERRUPT, pid)
    _ended(pid)
    before = Registers()
    _ptrace(GETREGS, pid, ctypes.byref(before))
    if before.orig_rax >= 1 << 63:
        raise RuntimeError("it is not asleep in a system call; try again")
    call = Registers.from_buffer_copy(before)
    place = before.rsp - BELOW_STACK
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for register, value in zip(ARGUMENTS, arguments, strict=False):
            if isinstance(value, bytes):
                memory.seek(place)
                memory.write(value + b"\0")
                value, place = place, place + len(value) + 1
            setattr(call, register, value)
    call.rip = before.rip - INSTRUCTION
    call.rax = number
    call.orig_rax = (1 << 64) - 1  # so that the kernel restarts nothing
    _ptrace(SETREGS, pid, ctypes.byref(call))
    for _ in ("entry", "exit"):
        _ptrace(SYSCALL, pid)
        ended = _ended(pid)
        if ended is not None:
            return ended
    after = Registers()
    _ptrace(GETREGS, pid, ctypes.byref(after))
    # Into the call it slept in, anew.
    again = Registers.from_buffer_copy(before)
    again.rip = before.rip - INSTRUCTION
    again.rax = before.orig_rax
    again.orig_rax = (1 << 64) - 1
    _ptrace(SETREGS, pid, ctypes.byref(again))
    _ptrace(DETACH, pid)
    return str(ctypes.c_longlong(after.rax).value)


def main() -> None:
    pid, name, *words = sys.argv[1:]
    arguments = [int(word, 0) if word.lstrip("-")[:1].isdigit() else word.encode() for word in words]
    print(inject(int(pid), NUMBERS[name], arguments))


if __name__ == "__main__":
    main()
