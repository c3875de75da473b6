"""The seccomp program as data: run by a small interpreter of classic BPF, for every call that there is."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from netbridge.errors import SandboxError
from netbridge.vnode import seccomp, syscalls
from netbridge.vnode.seccomp import RET_ALLOW, RET_ERRNO, RET_KILL_PROCESS, RET_USER_NOTIF, Call
from vfio import _abi

X86_64, I386 = 0xC000003E, 0x40000003
WANTED = """
    execve socket connect openat clone clone3 ptrace setuid unshare mount bpf io_uring_setup process_vm_writev
    pidfd_getfd userfaultfd seccomp prctl arch_prctl perf_event_open keyctl
"""
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


def decide(program: bytes, number: int, arguments: Sequence[int] = (), arch: int = X86_64) -> int:
    """What the kernel would do: runs the program over a struct seccomp_data."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *[a & (1 << 64) - 1 for a in (*arguments, *[0] * 6)][:6])
    accumulator, at = 0, 0
    instructions = list(struct.iter_unpack("<HBBI", program))
    while True:
        code, true, false, k = instructions[at]
        at += 1
        if code == 0x20:
            assert k % 4 == 0
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x06:
            return int(k)
        else:
            taken = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += true if taken else false


@pytest.fixture(scope="module")
def program() -> bytes:
    return seccomp.program(seccomp.calls("type1v2"))


def test_exactly_the_listed_calls_are_let_through(program: bytes) -> None:
    listed = {call.name for call in seccomp.calls("type1v2") if call.argument is None}
    allowed = {name for name, number in syscalls.NUMBERS.items() if decide(program, number) == RET_ALLOW}
    # With all arguments zero: no value of a list, and no bit that may not be set.
    assert allowed == listed | {"mmap", "mprotect", "prlimit64", "fallocate"}


def test_a_call_that_nobody_knows_is_asked_about(program: bytes) -> None:
    for number in (335, 400, 470, 0x3FFFFFFF):
        assert decide(program, number) == RET_USER_NOTIF


def test_other_architectures_and_abis_are_killed(program: bytes) -> None:
    assert decide(program, syscalls.NUMBERS["read"], arch=I386) == RET_KILL_PROCESS
    for number in (0x40000000, 0x40000000 | syscalls.NUMBERS["read"], -1):
        assert decide(program, number) == RET_KILL_PROCESS


@pytest.mark.parametrize(
    "name",
    [
        "execve",
        "socket",
        "connect",
        "openat",
        "clone",
        "clone3",
        "ptrace",
        "setuid",
        "unshare",
        "mount",
        "bpf",
        "io_uring_setup",
        "process_vm_writev",
        "pidfd_getfd",
        "userfaultfd",
        "seccomp",
        "prctl",
        "arch_prctl",
        "perf_event_open",
        "keyctl",
    ],
)
def test_what_a_taken_over_driver_would_want(program: bytes, name: str) -> None:
    assert decide(program, syscalls.NUMBERS[name]) == RET_USER_NOTIF


def test_only_vfios_ioctls(program: bytes) -> None:
    ioctl = syscalls.NUMBERS["ioctl"]
    assert decide(program, ioctl, (4, _abi.VFIO_DEVICE_SET_IRQS, 0)) == RET_ALLOW
    # The kernel looks at the lower half only, so the upper must not matter.
    assert decide(program, ioctl, (4, 0xFFFFFFFF_00000000 | _abi.VFIO_DEVICE_RESET, 0)) == RET_ALLOW
    for request in (0x5412, 0x8912, _abi.VFIO_GROUP_GET_DEVICE_FD, _abi.VFIO_SET_IOMMU, _abi.IOMMU_IOAS_MAP):
        assert decide(program, ioctl, (4, request, 0)) == RET_USER_NOTIF


def test_ioctls_go_with_the_interface() -> None:
    iommufd = seccomp.program(seccomp.calls("iommufd"))
    ioctl = syscalls.NUMBERS["ioctl"]
    assert decide(iommufd, ioctl, (4, _abi.IOMMU_IOAS_MAP, 0)) == RET_ALLOW
    assert decide(iommufd, ioctl, (4, _abi.VFIO_IOMMU_UNMAP_DMA, 0)) == RET_USER_NOTIF


def test_no_memory_becomes_code(program: bytes) -> None:
    for name in ("mmap", "mprotect"):
        for protection in range(8):
            wanted = RET_USER_NOTIF if protection & mmap.PROT_EXEC else RET_ALLOW
            assert decide(program, syscalls.NUMBERS[name], (0, 4096, protection)) == wanted


def test_files_only_with_mounts() -> None:
    number = syscalls.NUMBERS["openat"]
    assert decide(seccomp.program(seccomp.calls("group")), number) == RET_USER_NOTIF
    assert decide(seccomp.program(seccomp.calls("group", files=True)), number) == RET_ALLOW


def test_what_happens_otherwise_can_be_chosen() -> None:
    program = seccomp.program([Call("read")], otherwise=RET_ERRNO | 1)
    assert decide(program, syscalls.NUMBERS["write"]) == RET_ERRNO | 1
    assert decide(program, syscalls.NUMBERS["read"]) == RET_ALLOW


def test_the_kernel_takes_programs_of_this_length(program: bytes) -> None:
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096, "BPF_MAXINSNS"


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="riscv64"):
        seccomp.program([Call("read")])


@pytest.mark.skipif(not HEADER.exists(), reason=f"there is no {HEADER}")
def test_the_table_is_the_kernels() -> None:
    told = {}
    for line in HEADER.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[1].startswith("__NR_"):
            told[words[1].removeprefix("__NR_")] = int(words[2])
    assert told
    assert {name: syscalls.NUMBERS.get(name) for name in told} == told


def test_names() -> None:
    assert syscalls.name_of(257) == "openat"
    assert syscalls.name_of(9999) == "syscall_9999"
    assert len(set(syscalls.NUMBERS.values())) == len(syscalls.NUMBERS)
