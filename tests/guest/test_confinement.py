"""The sandbox by itself: a child process confines itself as the driver does, and tries what must not work.

Each attempt runs in a child of its own, which answers with what came of it. The real driver's case is in
tests/e2e/test_sandbox.py; here the parts are taken one by one, so that one cannot cover for another.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netbridge.errors import SandboxError
from netbridge.vnode import sandbox, seccomp, syscalls
from netbridge.vnode.sandbox import Confinement

UID, GID = 61234, 61235
EVERYTHING = seccomp.program([], otherwise=seccomp.RET_ALLOW)
NOTHING_MORE = seccomp.program(seccomp.calls("type1v2"), otherwise=seccomp.RET_ERRNO | errno.EPERM)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every uid can reach, unlike pytest's own: what is refused there is refused by the sandbox."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        path = Path(directory)
        path.chmod(0o777)
        yield path


def in_child(act: Callable[[], object]) -> str:
    """What `act` returned, or the error it ended with, in a child process; "killed by N" when it did not live."""
    readable, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = str(act())
        except OSError as error:
            answer = errno.errorcode.get(error.errno or 0, str(error))
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(written, answer.encode())
        os._exit(0)
    os.close(written)
    with os.fdopen(readable, "rb") as pipe:
        answer = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return f"killed by {-status}" if status < 0 else answer


def confined(
    act: Callable[[], object], *, filter: bytes = EVERYTHING, mounts: tuple[tuple[str, bool], ...] = ()
) -> str:
    plan = Confinement(UID, GID, filter, mounts, listen=False)

    def both() -> object:
        sandbox.confine(plan)
        return act()

    return in_child(both)


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


# ---- Identity -------------------------------------------------------------------------------------------------------


def test_no_capability_is_left_in_any_set_and_no_way_back_to_root() -> None:
    def look() -> object:
        sandbox.drop_privileges(UID, GID)
        facts = status()
        sets = [int(facts[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")]
        return sets, facts["Uid"].split(), facts["Gid"].split(), facts["Groups"]

    assert in_child(look) == str(([0] * 5, [str(UID)] * 4, [str(GID)] * 4, ""))
    assert confined(lambda: os.setuid(0)) == "EPERM"
    assert confined(lambda: os.setgroups([0])) == "EPERM"


def test_a_program_with_privileges_of_its_own_gives_none(place: Path) -> None:
    """no_new_privs: a set-uid program runs as whoever starts it, also where such programs are honoured."""
    assert sandbox._libc.mount(b"none", bytes(place), b"tmpfs", ctypes.c_ulong(0), b"mode=0755") == 0
    try:
        program = place / "id"
        program.write_bytes(Path("/usr/bin/id").read_bytes())
        program.chmod(0o4755)

        def run(forbid: bool) -> Callable[[], object]:
            def act() -> object:
                if forbid:
                    sandbox._prctl(sandbox._PR_SET_NO_NEW_PRIVS, 1)
                os.setresuid(UID, UID, UID)
                return subprocess.run([program, "-u"], capture_output=True, text=True, check=True).stdout.strip()

            return act

        assert in_child(run(False)) == "0", "else this shows nothing"
        assert in_child(run(True)) == str(UID)
    finally:
        assert sandbox._libc.umount2(bytes(place), 0) == 0


def test_locked_memory_is_limited_without_the_capability() -> None:
    """What holds the driver to its DMA budget in the kernel, which takes pinned memory for locked memory."""

    def lock() -> object:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        sandbox.drop_privileges(UID, GID)
        memory = mmap.mmap(-1, 2 << 20)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if sandbox._libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(2 << 20)) < 0:
            raise OSError(ctypes.get_errno(), "mlock")
        return "locked"

    assert in_child(lock) == "ENOMEM"


# ---- Network --------------------------------------------------------------------------------------------------------


def test_there_is_no_network() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]

        def reach_it() -> object:
            with socket.socket() as client:
                client.connect(("127.0.0.1", port))
            return "connected"

        assert in_child(reach_it) == "connected"
        # Landlock says EACCES before the empty namespace would say ENETUNREACH.
        assert confined(reach_it) in ("EACCES", "ENETUNREACH")
    assert confined(lambda: sorted(name for _, name in socket.if_nameindex())) == "['lo']"


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_no_file_is_left_however_it_is_asked_for(place: Path) -> None:
    file = place / "file"
    file.write_text("x")
    file.chmod(0o666)
    assert confined(lambda: os.open(file, os.O_RDONLY)) == "EACCES"
    assert confined(lambda: os.open(file, os.O_WRONLY)) == "EACCES"
    assert confined(lambda: os.open(place / "new", os.O_WRONLY | os.O_CREAT)) == "EACCES"
    assert confined(lambda: list(Path("/").iterdir())) == "EACCES"
    assert confined(lambda: file.unlink()) == "EACCES"
    assert confined(lambda: file.rename(place / "other")) == "EACCES"
    assert confined(lambda: (place / "directory").mkdir()) == "EACCES"
    if sandbox.landlock_abi() >= 3:  # Linux 6.2; before, only the filter forbids it
        assert confined(lambda: os.truncate(file, 0)) == "EACCES"
    assert confined(lambda: os.execv(sys.executable, ["python3"])) == "EACCES"
    assert confined(lambda: Path("/proc/self/status").read_text()) == "EACCES"
    assert confined(lambda: Path("/dev/null").read_bytes()) == "EACCES"


def test_what_is_open_stays_usable(place: Path) -> None:
    with (place / "file").open("w+b", buffering=0) as file:
        assert confined(lambda: (file.write(b"abc"), file.seek(0), file.read())) == "(3, 0, b'abc')"


def test_mounts_are_left_as_far_as_they_say(place: Path) -> None:
    for name in ("ro", "rw", "none"):
        (place / name).mkdir()
        (place / name).chmod(0o777)
        (place / name / "file").write_text(name)
        (place / name / "file").chmod(0o666)
    mounts = ((f"{place}/ro", False), (f"{place}/rw", True))

    def read(name: str) -> str:
        return confined(lambda: (place / name / "file").read_text(), mounts=mounts)

    def write(name: str) -> str:
        return confined(lambda: (place / name / "file").write_text("new"), mounts=mounts)

    assert [read(name) for name in ("ro", "rw", "none")] == ["ro", "rw", "EACCES"]
    assert [write(name) for name in ("ro", "rw", "none")] == ["EACCES", "3", "EACCES"]
    assert confined(lambda: (place / "rw" / "directory").mkdir(), mounts=mounts) == "None"
    assert confined(lambda: os.mknod(place / "rw" / "node", 0o20600, os.makedev(1, 3)), mounts=mounts) != "None"


def test_a_mount_that_is_a_file(place: Path) -> None:
    file = place / "file"
    file.write_text("x")
    assert confined(lambda: file.read_text(), mounts=((str(file), False),)) == "x"


def test_a_mount_that_is_not_there(place: Path) -> None:
    assert "cannot be opened: No such file" in confined(lambda: "ran", mounts=((f"{place}/none", False),))


def test_a_kernel_without_landlock_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "landlock_abi", lambda: 0)
    with pytest.raises(SandboxError, match="lsm="):
        sandbox.restrict_files(())


# ---- System calls ---------------------------------------------------------------------------------------------------


def test_calls_that_are_not_listed_do_not_happen() -> None:
    assert confined(lambda: socket.socket(), filter=NOTHING_MORE) == "EPERM"
    assert confined(lambda: os.open("/", os.O_RDONLY), filter=NOTHING_MORE) == "EPERM"
    assert confined(lambda: os.fork(), filter=NOTHING_MORE) == "EPERM"
    assert confined(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC), filter=NOTHING_MORE) == "EPERM"
    assert confined(lambda: len(mmap.mmap(-1, 4096)), filter=NOTHING_MORE) == "4096"
    assert confined(lambda: os.memfd_create("x") > 0, filter=NOTHING_MORE) == "True"


def test_ways_around() -> None:
    """What a driver that was taken over would try next, on the kernel itself: with the filter, and the files with
    Landlock alone, so that one does not cover for the other."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = Path(sys.executable).read_bytes()

    def call(name: str, *arguments: object) -> Callable[[], object]:
        def act() -> object:
            if libc.syscall(ctypes.c_long(syscalls.NUMBERS[name]), *arguments) < 0:
                raise OSError(ctypes.get_errno(), name)
            return "it did it"

        return act

    def run_from_memory() -> object:
        fd = os.memfd_create("program")
        os.write(fd, own)
        arguments = (ctypes.c_char_p * 2)(b"program", None)
        return call("execveat", fd, b"", arguments, None, 0x1000)()  # AT_EMPTY_PATH

    def code_from_memory() -> object:
        fd = os.memfd_create("code")
        os.write(fd, bytes(4096))
        return mmap.mmap(fd, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)

    def code_later() -> object:
        return call("mprotect", ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page))), 4096, 5)()

    page = mmap.mmap(-1, 4096)
    new_user, file, parent = 0x10000000, b"/proc/self/mem", os.getpid()
    attempts: dict[str, Callable[[], object]] = {
        "another ring of calls": call("io_uring_setup", 8, bytes(120)),
        "a child": call("clone", new_user, None, None, None, None),
        "a child, the new way": call("clone3", bytes(88), 88),
        "a user namespace": call("unshare", new_user),
        "its own monitor": call("ptrace", 16, parent, None, None),
        "another's memory": call("process_vm_readv", parent, None, 0, None, 0, 0),
        "another's files": call("pidfd_getfd", 0, 0, 0),
        "another's limits": call("prlimit64", parent, 7, None, bytes(16)),
        "a signal": call("kill", parent, 0),
        "a program": call("execve", b"/bin/true", None, None),
        "a program from memory": run_from_memory,
        "code from memory": code_from_memory,
        "code later": code_later,
        "a file without a name": call("openat", -100, b"/var/tmp", os.O_TMPFILE | os.O_RDWR, 0o600),
        "its own memory as a file": call("openat", -100, file, os.O_RDWR, 0),
        "a file by its handle": call("open_by_handle_at", -100, bytes(16), os.O_RDONLY),
        "a shorter file": call("ftruncate", 1, 0),
        "a shorter file by its name": call("truncate", b"/var/tmp/file", 0),
        "a hole in a file": call("fallocate", 1, 3, 0, 4096),
        "the end of the port": call("shutdown", 0, 2),
        "flags that others share": call("fcntl", 0, 4, os.O_NONBLOCK),
        "another filter": call("seccomp", 1, 0, None),
        "its old rights": call("setresuid", 0, 0, 0),
        "the kernel's programs": call("bpf", 0, bytes(120), 120),
        "page faults": call("userfaultfd", 0),
        "keys": call("keyctl", 0, 0, 0),
    }
    assert {name: confined(act, filter=NOTHING_MORE) for name, act in attempts.items()} == dict.fromkeys(
        attempts, "EPERM"
    )
    for name in ("a file without a name", "its own memory as a file"):
        assert confined(attempts[name]) == "EACCES", name


def test_killing_is_possible_too() -> None:
    strict = seccomp.program(seccomp.calls("type1v2"), otherwise=seccomp.RET_KILL_PROCESS)
    assert confined(lambda: socket.socket(), filter=strict) == "killed by 31"


def test_the_monitor_hears_of_it_by_name_and_decides() -> None:
    ours, theirs = socket.socketpair()

    def act() -> object:
        program = seccomp.program(seccomp.calls("type1v2"))
        listener = sandbox.confine(Confinement(UID, GID, program))
        socket.send_fds(theirs, [b"x"], [listener])
        os.close(listener)
        try:
            os.open("/etc/passwd", os.O_RDONLY)
        except OSError as error:
            first = errno.errorcode[error.errno or 0]
        try:
            os.setuid(0)
        except OSError as error:
            return first, errno.errorcode[error.errno or 0]
        return first, "it became root"

    readable, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(written, in_child_answer(act))
        os._exit(0)
    os.close(written)
    _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
    try:
        opened = seccomp.receive(listener)
        assert opened is not None
        assert (opened.name, opened.pid, opened.opens_a_file) == ("openat", pid, True)
        seccomp.refuse(listener, opened)
        became = seccomp.receive(listener)
        assert became is not None
        assert (became.name, became.opens_a_file, became.arguments[0]) == ("setuid", False, 0)
        seccomp.refuse(listener, became, errno.EPERM)
        assert os.read(readable, 100) == b"('EACCES', 'EPERM')"
    finally:
        os.waitpid(pid, 0)
        for fd in (listener, readable):
            os.close(fd)
        ours.close()
        theirs.close()


def in_child_answer(act: Callable[[], object]) -> bytes:
    try:
        return str(act()).encode()
    except BaseException as error:
        return f"{type(error).__name__}: {error}".encode()


def test_without_a_monitor_they_fail() -> None:
    program = seccomp.program(seccomp.calls("type1v2"))

    def act() -> object:
        os.close(sandbox.confine(Confinement(UID, GID, program)))
        return os.open("/etc/passwd", os.O_RDONLY)

    assert in_child(act) == "ENOSYS"


def test_all_of_it_needs_root() -> None:
    def act() -> object:
        os.setuid(UID)
        return sandbox.confine(Confinement(UID, GID, EVERYTHING, listen=False))

    assert "start it as root" in in_child(act)
