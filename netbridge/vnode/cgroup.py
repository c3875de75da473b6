"""A cgroup (v2) for the driver processes: how much memory and CPU each may have at most.

The group itself is the V-Node's, and holds no process but those in its slots, one for each driver process: so what a
driver left behind (memory that a client still maps, say) is not charged to the next one.

Where a process may make cgroups depends on who manages them. In the root cgroup (a system without a manager of
cgroups, a container) one is simply made. In a cgroup of one's own, such as a systemd unit's with Delegate=yes, the
monitor first moves into a child of it, because a cgroup with children must hold no process. Anywhere else there is none
to be had, and `NoCgroup` says why. Source: Documentation/admin-guide/cgroup-v2.rst of the kernel.
"""

from __future__ import annotations

import fcntl
import glob
import os
import select
import time

from netbridge.errors import NetbridgeError

ROOT = "/sys/fs/cgroup"
CONTROLLERS = ("memory", "cpu")
MONITOR = "monitor"
CPU_PERIOD_US = 100_000


class NoCgroup(NetbridgeError):
    """There is no cgroup to be had here; the limits are not enforced."""


class Cgroup:
    """The cgroup of one V-Node. Owns its directory, and removes it in `close`.

    - `path`: its directory
    - `taken`: another monitor that is alive has it; then nothing else here may be called but `members` and `close`
    """

    def __init__(self, name: str, *, root: str = ROOT, own: str | None = None) -> None:
        """Makes it, or takes it over from a monitor that was killed. `own` is the path of this process's cgroup, read
        from /proc when not given. Raises NoCgroup."""
        if not os.path.exists(f"{root}/cgroup.controllers"):
            raise NoCgroup(f"no cgroup v2 is mounted at {root}")
        base = f"{root}{_own_path() if own is None else own}".rstrip("/")
        self.path = f"{base}/{name}"
        try:
            if base != root.rstrip("/"):
                _make_room(base)
            _delegate(base)
            os.makedirs(self.path, exist_ok=True)
            _delegate(self.path)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NoCgroup(f"no cgroup can be made in {base}: {error.strerror}") from None
        self.taken = False
        try:
            # The kernel drops it when the monitor dies, however it dies.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.taken = True
        self._slots = 0

    @property
    def members(self) -> tuple[int, ...]:
        """The processes in it."""
        files = glob.glob(f"{glob.escape(self.path)}/*/cgroup.procs")
        return tuple(int(pid) for file in files for pid in _read(file).split())

    def slot(self) -> Slot:
        """A place for one more driver process. Raises NoCgroup."""
        self._slots += 1
        path = f"{self.path}/driver-{self._slots}"
        try:
            os.mkdir(path)
        except OSError as error:
            raise NoCgroup(f"no cgroup can be made in {self.path}: {error.strerror}") from None
        return Slot(path)

    def clear(self, seconds: float) -> bool:
        """Sees to it that nobody is in it: a driver whose monitor was killed ends by itself, and is killed when it
        takes longer than `seconds`. Whether there was one. Its slots are gone then. Raises NoCgroup."""
        deadline = time.monotonic() + seconds
        with open(f"{self.path}/cgroup.events", encoding="ascii") as events:
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            found = killed = False
            while "populated 1" in events.read():
                found = True
                left = deadline - time.monotonic()
                if left <= 0 and killed:
                    raise NoCgroup(f"processes {self.members} in {self.path} cannot be ended")
                if left <= 0:
                    killed, deadline = True, time.monotonic() + seconds
                    _write(f"{self.path}/cgroup.kill", "1")
                poller.poll(max(left, 0) * 1000)
                events.seek(0)
        self._remove_slots()
        return found

    def close(self) -> None:
        """Removes it. A process that is still in it keeps it, and that is left to the next start."""
        if not self.taken:
            self._remove_slots()
            _remove(self.path)
        os.close(self._fd)

    def _remove_slots(self) -> None:
        for path in glob.glob(f"{glob.escape(self.path)}/driver-*"):
            _remove(path)


class Slot:
    """One driver process's place. Owns its directory, `path`, and removes it in `close`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def limit(self, memory_bytes: int) -> None:
        """At most so much memory: the process, its shared memory, and what the kernel holds for it; none of it swapped.
        Raises NoCgroup."""
        try:
            _write(f"{self.path}/memory.max", str(memory_bytes))
            _write(f"{self.path}/memory.oom.group", "1")
            if os.path.exists(f"{self.path}/memory.swap.max"):
                _write(f"{self.path}/memory.swap.max", "0")
        except OSError as error:
            raise NoCgroup(f"cannot limit the memory of {self.path}: {error.strerror}") from None

    def limit_cpu(self, share: float | None) -> None:
        """At most this share of one CPU, above 0; None lifts the limit. Raises NoCgroup."""
        # The kernel takes no quota below 1 ms.
        quota = "max" if share is None else str(max(round(share * CPU_PERIOD_US), 1000))
        try:
            _write(f"{self.path}/cpu.max", f"{quota} {CPU_PERIOD_US}")
        except OSError as error:
            raise NoCgroup(f"cannot limit the CPU of {self.path}: {error.strerror}") from None

    def yield_to_others(self) -> None:
        """Runs when the others of the group do not, until `hurry`."""
        self._weigh(1)

    def hurry(self) -> None:
        self._weigh(100)

    def _weigh(self, weight: int) -> None:
        try:
            _write(f"{self.path}/cpu.weight", str(weight))
        except OSError as error:
            raise NoCgroup(f"cannot weigh the CPU of {self.path}: {error.strerror}") from None

    def join(self) -> None:
        """Puts the calling process into it. Raises OSError."""
        _write(f"{self.path}/cgroup.procs", "0")

    @property
    def out_of_memory_kills(self) -> int:
        """Processes that the kernel killed in it because they wanted more memory than `limit` allows."""
        events = dict(line.split() for line in _read(f"{self.path}/memory.events").splitlines())
        return int(events.get("oom_kill", 0))

    @property
    def memory_peak(self) -> int | None:
        """The most memory that was ever charged to it, bytes; None where the kernel does not tell (before 5.19)."""
        try:
            return int(_read(f"{self.path}/memory.peak"))
        except OSError:
            return None

    def close(self) -> None:
        """Removes it, when nobody is in it any more."""
        _remove(self.path)


def _delegate(path: str) -> None:
    """Lets the controllers work in the groups below this one. Raises OSError."""
    missing = [word for word in CONTROLLERS if word not in _read(f"{path}/cgroup.subtree_control").split()]
    if missing:
        _write(f"{path}/cgroup.subtree_control", " ".join(f"+{word}" for word in missing))


def _remove(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        pass


def _own_path() -> str:
    for line in _read("/proc/self/cgroup").splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            return "" if path == "/" else path
    raise NoCgroup("this process is in no cgroup of version 2")


def _make_room(base: str) -> None:
    """Moves this process, when it is alone in its cgroup, into a child."""
    members = _read(f"{base}/cgroup.procs").split()
    if os.path.basename(base) == MONITOR or members not in ([str(os.getpid())], []):
        raise NoCgroup(
            f"other processes are in the cgroup {base}, too; start the command in one of its own, such as a systemd "
            "unit with Delegate=yes, or with systemd-run --scope --property=Delegate=yes"
        )
    os.makedirs(f"{base}/{MONITOR}", exist_ok=True)
    _write(f"{base}/{MONITOR}/cgroup.procs", "0")


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    # Unbuffered and at once: the kernel answers with the write.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
