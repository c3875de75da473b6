"""The monitor: the small privileged process that keeps a driver process running, and never touches a frame.

It checks the manifest's grants, takes the PCI function from its driver, opens the VFIO device, the port and the
counters page, and starts the driver process with just these files. It keeps no copy of the device's: when the driver
dies, for whatever reason, the kernel closes the device, which ends its DMA and resets it where there is a way to. Then
the monitor opens the device anew for the next driver, after a pause that grows while drivers keep dying.

    start ──► driver starting ── up ──► driver running ── stopped, unplugged ──► given back, ended
                   ▲     └── died ──────────┴── died
                   └───────── pause ◄────────────┘

When the monitor itself dies, the driver sees its channel end, quiesces the device and ends; the function stays with
vfio-pci, which the next start (or `netbridge restore`) puts right.
"""

from __future__ import annotations

import os
import pwd
import resource
import select
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import _cffi_backend

import netbridge
import vfio
from netbridge import device_state, metrics
from netbridge.bridge import Stop
from netbridge.errors import ExitCode, NetbridgeError, SandboxError, UsageError
from netbridge.ipc.listener import PortListener
from netbridge.log import Log
from netbridge.session import Settings
from netbridge.virtio import features
from netbridge.virtio.pci import require_virtio_net
from netbridge.vnode import handover, seccomp
from netbridge.vnode.capabilities import IRQ, MIB, NETWORK, PCI, Capabilities, Msix
from netbridge.vnode.cgroup import Cgroup, NoCgroup
from netbridge.vnode.manifest import Manifest
from vfio._record import NamedTuple

MSIX_VECTORS = 3  # configuration, receive, transmit
QUEUE_MEMORY = MIB // 4  # two virtqueues of 256 entries and the TX header, with room
DRIVER_USER = "netbridge"
# Where systemd's DynamicUser= puts users that nobody added (systemd.exec(5)); passwd rarely has one there.
FIRST_DYNAMIC_UID, LAST_DYNAMIC_UID = 61184, 65519
MOST_FILES = 256
STOP_SECONDS = 10.0
ORPHAN_SECONDS = 5.0  # for a driver whose monitor was killed, to quiesce its device and end
MOST_FAILED_STARTS = 5


class Options:
    """What the command line adds to the manifest. `driver_user`: a name or uid for the driver process; None: the user
    `netbridge` if there is one, else a uid that no user has."""

    def __init__(
        self,
        *,
        pci: vfio.PciAddress | None,
        socket_path: str,
        counters_path: str,
        service_uids: Collection[int],
        driver_user: str | None,
        without_features: Collection[str],
        interface: str,
        settings: Settings,
    ) -> None:
        self.pci = pci
        self.socket_path = socket_path
        self.counters_path = counters_path
        self.service_uids = service_uids
        self.driver_user = driver_user
        self.without_features = without_features
        self.interface = interface
        self.settings = settings


class Outcome(NamedTuple):
    """How it ended: why, the number of the signal that asked for it (0 for none), how often the driver was restarted,
    and the final counters."""

    why: Stop
    signal: int
    restarts: int
    counters: dict[str, Any]


class DriverFailed(NetbridgeError):
    """The driver process ended with an error, whose message and exit code this is."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(manifest: Manifest, options: Options, log: Log, warn: Callable[[str], None]) -> Outcome:
    """Claims the manifest's function and keeps a driver for it running until a signal or an unplug.

    `warn` is given what the user must know even where nothing may be logged. Raises NetbridgeError or vfio.VfioError;
    whatever was claimed has then been given back. Main thread only.
    """
    granted = manifest.capabilities
    address = check_grants(granted, options)
    features.select(turned_off(manifest, options))
    driver_command(manifest)
    identity = driver_identity(options.driver_user, options.service_uids, f"{manifest.name} {address}")
    strict = manifest.mode == "strict"
    if not strict:
        warn("mode: permissive: the driver runs as root and is not confined; for debugging only")
    with ExitStack() as stack:
        stopping = stack.enter_context(stop_signals())
        group = _make_cgroup(address, stack, log)
        # Before the device is touched: a socket that is taken should cost nobody a reset.
        port = stack.enter_context(PortListener(options.socket_path))
        page = metrics.CounterPage(options.counters_path, manifest.metrics)
        stack.callback(page.close)
        function = vfio.PciFunction(address)
        # Before it is taken from its driver: this could be the disk that the system runs from.
        require_virtio_net(str(address), function.vendor_id, function.device_id, function.class_code)
        locked = _locked_memory_limit(granted, options.settings)
        cgroup = None
        if isinstance(group, NoCgroup):
            warn(f"required_mem_mb and max_cpu_share are not enforced: {group}")
        else:
            cgroup = group
            if cgroup.taken:
                raise vfio.DeviceBusy(
                    "it has a driver already",
                    device=address,
                    cause=f"process {', '.join(map(str, cgroup.members)) or 'about to start'}, of another monitor",
                    fix="stop that one first",
                )
            cgroup.limit(manifest.required_mem_mb * MIB)
        stack.enter_context(vfio.bind(address))
        supervisor = _Supervisor(
            manifest, options, log, stopping, port, page, cgroup, identity if strict else None, locked
        )
        try:
            why = supervisor.run()
        finally:
            supervisor.end()
        return Outcome(why, stopping.received, supervisor.restarts, page.snapshot())


def _make_cgroup(address: vfio.PciAddress, stack: ExitStack, log: Log) -> Cgroup | NoCgroup:
    """The driver's cgroup, without the driver of a monitor that was killed; or why there is none to be had."""
    try:
        cgroup = Cgroup(f"netbridge-{address}")
        stack.callback(cgroup.close)
        if not cgroup.taken and cgroup.clear(ORPHAN_SECONDS):
            log("orphan_gone", device=address)
    except NoCgroup as error:
        return error
    return cgroup


# ---- What the manifest allows ---------------------------------------------------------------------------------------


def check_grants(granted: Capabilities, options: Options) -> vfio.PciAddress:
    """Everything that can be refused before anything is touched. Returns the function to claim. CAP_MEM_SHARE is not
    asked for here: without it the driver runs, and refuses its clients."""
    granted.require(NETWORK, "opening a network device")
    granted.require(PCI, "claiming the network device")
    assert granted.pci_function is not None
    if options.pci is not None:
        granted.require_pci_function(options.pci, "claiming the function named with --pci")
    granted.require(IRQ, "receiving the device's interrupts")
    if isinstance(granted.irq, Msix):
        granted.require_msix(MSIX_VECTORS, "one interrupt vector each for configuration, receive and transmit")
    granted.require_dma(options.settings.dma_bytes + QUEUE_MEMORY, "the frame buffers and the virtqueues")
    return granted.pci_function


def turned_off(manifest: Manifest, options: Options) -> list[str]:
    """Features not to be used, by name: the manifest's and the command line's."""
    return [*manifest.without, *options.without_features]


def check_irq(granted: Capabilities, device: vfio.Device) -> str:
    """Which kind of interrupt the manifest grants, a value of `InterruptMode`; for INTx also that this function has
    that very line."""
    if isinstance(granted.irq, Msix):
        return "msix"
    granted.require_intx(device.config.interrupt_line, f"the interrupt of {device.address}")
    return "intx"


class Identity(NamedTuple):
    """Who the driver process is, in mode strict."""

    uid: int
    gid: int
    name: str


def driver_identity(user: str | None, service_uids: Collection[int], purpose: str) -> Identity:
    """The user named, or the system user made for it, or a uid that no user has: the same one for the same `purpose`.
    Raises UsageError for one that there is not, and for one that is root's or a service's."""
    if user is None:
        try:
            entry = pwd.getpwnam(DRIVER_USER)
        except KeyError:
            taken = {entry.pw_uid for entry in pwd.getpwall()}.union(service_uids)
            span = LAST_DYNAMIC_UID - FIRST_DYNAMIC_UID + 1
            first = zlib.crc32(purpose.encode())
            free = next(uid for i in range(span) if (uid := FIRST_DYNAMIC_UID + (first + i) % span) not in taken)
            return Identity(free, free, f"uid {free}")
        identity = Identity(entry.pw_uid, entry.pw_gid, entry.pw_name)
    elif user.isdecimal():
        identity = Identity(int(user), int(user), f"uid {user}")
    else:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise UsageError(f"there is no user {user}; name one that there is with --driver-user, or a uid") from None
        identity = Identity(entry.pw_uid, entry.pw_gid, entry.pw_name)
    if identity.uid == 0 or identity.gid == 0:
        raise UsageError(f"{identity.name} is root: name an ordinary user for the driver with --driver-user")
    if identity.uid in service_uids:
        raise UsageError(
            f"{identity.name} is a service's user, and could then send signals to the driver; "
            "name another one with --driver-user"
        )
    return identity


def _locked_memory_limit(granted: Capabilities, settings: Settings) -> int:
    """RLIMIT_MEMLOCK for the driver, bytes: the manifest's DMA budget, which the kernel holds it to once it is without
    CAP_IPC_LOCK. Raises vfio.LockedMemoryLimit when this process may not give so much and the rest is too little."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY or hard >= granted.dma_budget:
        return granted.dma_budget
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (granted.dma_budget, granted.dma_budget))
    except (ValueError, OSError):  # without CAP_SYS_RESOURCE
        needed = settings.dma_bytes + QUEUE_MEMORY
        if hard < needed:
            raise vfio.LockedMemoryLimit(
                f"cannot map {needed // 1024} KiB for DMA",
                cause=f"the limit on locked memory is {hard // 1024} KiB",
                fix=f"raise it: ulimit -l {-(-needed // 1024)} (in KiB), or LimitMEMLOCK= in a systemd unit",
            ) from None
        return hard
    return granted.dma_budget


# ---- Signals --------------------------------------------------------------------------------------------------------


class Stopping:
    """Readable once SIGTERM or SIGINT has come; `received` is the signal's number, 0 before."""

    def __init__(self, readable: socket.socket) -> None:
        self._readable = readable
        self.received = 0

    def fileno(self) -> int:
        return self._readable.fileno()

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number


@contextmanager
def stop_signals() -> Iterator[Stopping]:
    """Turns SIGTERM and SIGINT into a readable fd while the body runs. Main thread only."""
    readable, written = socket.socketpair()
    with readable, written:
        written.setblocking(False)
        stopping = Stopping(readable)
        before = {number: signal.signal(number, stopping.note) for number in (signal.SIGTERM, signal.SIGINT)}
        wakeup = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        try:
            yield stopping
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)


# ---- Keeping a driver running ---------------------------------------------------------------------------------------


class Backoff:
    """How long to wait before a driver is started again, in seconds: twice as long each time, up to `most`, and from
    the beginning after one that ran for `calm` seconds."""

    def __init__(self, first: float = 0.1, most: float = 10.0, calm: float = 30.0) -> None:
        self.first, self.most, self.calm = first, most, calm
        self._next = first

    def after(self, ran: float) -> float:
        """The pause after a driver that ran for so many seconds."""
        if ran >= self.calm:
            self._next = self.first
        pause = self._next
        self._next = min(pause * 2, self.most)
        return pause


class _Driver:
    """One driver process and what is known of it."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel
        self.pidfd = os.pidfd_open(pid)
        self.listener = -1  # of seccomp
        self.began = time.monotonic()
        self.up = False
        self.heard = True
        self.last_word: tuple[str, str] | None = None
        self.violation: str | None = None
        self.file_calls = 0
        self.status: int | None = None  # as waitpid has it

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def reap(self) -> None:
        _, self.status = os.waitpid(self.pid, 0)

    def close(self) -> None:
        self.channel.close()
        os.close(self.pidfd)
        if self.listener >= 0:
            os.close(self.listener)


class _Supervisor:
    def __init__(
        self,
        manifest: Manifest,
        options: Options,
        log: Log,
        stopping: Stopping,
        port: PortListener,
        page: metrics.CounterPage,
        cgroup: Cgroup | None,
        identity: Identity | None,
        locked: int,
    ) -> None:
        self._manifest = manifest
        self._options = options
        self._log = log
        self._stopping = stopping
        self._port = port
        self._page = page
        self._cgroup = cgroup
        self._identity = identity
        self._locked = locked
        self._backoff = Backoff()
        self._driver: _Driver | None = None
        self._was_up = False
        self._failed_starts = 0
        self._oom_kills = cgroup.out_of_memory_kills if cgroup is not None else 0
        self.restarts = 0

    def run(self) -> Stop:
        """Until the driver was told to stop, or the device went. Raises DriverFailed, or an error of opening it."""
        while True:
            driver = self._start()
            self._watch(driver)
            why = self._judge(driver)
            if why is not None:
                return why
            device_state.withdraw(self._page.counters)
            pause = self._backoff.after(time.monotonic() - driver.began)
            self._log("driver_restarts", pause=f"{pause:.1f}", restarts=self.restarts + 1)
            if select.select([self._stopping], [], [], pause)[0]:
                return Stop.SIGNAL
            self.restarts += 1

    def end(self) -> None:
        """Kills the driver, if there is one left, and waits until it is gone."""
        driver, self._driver = self._driver, None
        if driver is not None:
            if driver.status is None:
                driver.kill()
                driver.reap()
            driver.close()

    # ---- Into life

    def _start(self) -> _Driver:
        self.end()
        address = self._manifest.capabilities.pci_function
        assert address is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as stack:
            with theirs:
                stack.enter_context(ours)
                if self._cgroup is not None:
                    # Starting takes what it takes; the share is what a running driver may use.
                    self._cgroup.limit_cpu(None)
                pid = self._spawn(theirs)
            self._driver = _Driver(pid, ours)
            stack.pop_all()
        with vfio.open_device(address, interface=self._options.interface) as device:
            mode = check_irq(self._manifest.capabilities, device)
            mine = device.fds
            # Copies, so that closing the device here, which ends its bus mastering, comes before the driver has it.
            fds = [os.dup(mine.device), os.dup(mine.iommu)]
        try:
            self._log(
                "claimed", device=address, interface=mine.interface, irq=self._manifest.capabilities.irq, driver=pid
            )
            start = self._describe(mine, mode)
            handover.send_start(ours, start, [*fds, self._port.fileno(), self._page.fd])
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died already, which is seen when it is watched
        finally:
            for fd in fds:
                os.close(fd)
        return self._driver

    def _describe(self, fds: vfio.DeviceFds, mode: str) -> dict[str, Any]:
        manifest, options, settings = self._manifest, self._options, self._options.settings
        confinement = None
        if self._identity is not None:
            mounts = tuple((mount.path, mount.writable) for mount in manifest.mounts)
            allowed = seccomp.calls(fds.interface, files=bool(mounts))
            confinement = (self._identity.uid, self._identity.gid, seccomp.program(allowed), mounts)
        return {
            "manifest": manifest.as_dict(),
            "interface": fds.interface,
            "ioas_id": fds.ioas_id,
            "irq": mode,
            "without": turned_off(manifest, options),
            "service_uids": list(options.service_uids),
            "socket": options.socket_path,
            "settings": settings.as_dict(),
            "confinement": confinement,
        }

    def _spawn(self, theirs: socket.socket) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        try:
            self._become_driver(theirs)
        except BaseException as error:
            handover.say(theirs, handover.FAILED, f"{ExitCode.FAILURE}\nthe driver process cannot be started: {error}")
        finally:
            os._exit(ExitCode.FAILURE)

    def _become_driver(self, theirs: socket.socket) -> None:
        """In the child: nothing of the monitor's stays but its end of the channel and, if it may log, stderr."""
        signal.set_wakeup_fd(-1)
        # It is the monitor that is told to stop, also from a terminal.
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self._cgroup is not None:
            self._cgroup.join()
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        may_log = self._manifest.capabilities.log
        channel = os.dup(theirs.fileno())
        os.dup2(null, 0)
        os.dup2(null, 1)
        if not may_log:
            os.dup2(null, 2)
        os.dup2(channel, handover.CHANNEL_FD)
        for fd in range(handover.CHANNEL_FD + 1):
            os.set_inheritable(fd, True)
        os.closerange(handover.CHANNEL_FD + 1, 1 << 16)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (self._locked, self._locked))
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, MOST_FILES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir("/")
        os.execve(sys.executable, driver_command(self._manifest), {})

    # ---- While it lives

    def _watch(self, driver: _Driver) -> None:
        """Until it has ended. Tells it to stop when this process is told to."""
        give_up: float | None = None
        poller = select.poll()
        watched = [self._stopping.fileno(), driver.channel.fileno(), driver.pidfd]
        for fd in watched:
            poller.register(fd, select.POLLIN)
        while True:
            timeout = None if give_up is None else max(give_up - time.monotonic(), 0) * 1000
            ready = {fd for fd, _ in poller.poll(timeout)}
            if driver.listener in ready:
                self._answer_violation(driver, poller)
            if driver.channel.fileno() in ready:
                self._hear(driver, poller)
            if driver.pidfd in ready:
                driver.reap()
                while driver.heard:
                    self._hear(driver, poller)
                return
            if self._stopping.fileno() in ready:
                poller.unregister(self._stopping.fileno())
                give_up = time.monotonic() + STOP_SECONDS
                try:
                    driver.channel.send(handover.STOP)
                except (BrokenPipeError, ConnectionResetError):
                    pass
            elif give_up is not None and time.monotonic() >= give_up:
                self._log("driver_killed", why=f"it did not stop within {STOP_SECONDS:g} s")
                driver.kill()
                give_up = None

    def _hear(self, driver: _Driver, poller: select.poll) -> None:
        try:
            heard = handover.hear(driver.channel)
        except BlockingIOError:
            driver.heard = driver.status is None
            return
        if heard is None:
            driver.heard = False
            poller.unregister(driver.channel)
            # Whether it ended, is about to, or talks nonsense: it is of no use any more.
            if driver.last_word is None or driver.last_word[0] not in (handover.STOPPED, handover.FAILED):
                driver.kill()
            return
        word, detail, fds = heard
        driver.last_word = (word, detail)
        if word == handover.CONFINED and driver.listener < 0:
            driver.listener = fds.pop()
            poller.register(driver.listener, select.POLLIN)
            assert self._identity is not None
            self._log("confined", user=self._identity.name, driver=driver.pid)
        elif word == handover.UP and not driver.up:
            driver.up = self._was_up = True
            self._failed_starts = 0
            share = self._manifest.max_cpu_share
            if self._cgroup is not None and share < 1:
                self._cgroup.limit_cpu(share)
            self._log("up", seconds=f"{time.monotonic() - driver.began:.3f}", socket=self._options.socket_path)
        for fd in fds:
            os.close(fd)

    def _answer_violation(self, driver: _Driver, poller: select.poll) -> None:
        try:
            violation = seccomp.receive(driver.listener)
        except OSError:
            poller.unregister(driver.listener)  # the driver is gone
            return
        if violation is None:
            return
        driver.file_calls += violation.opens_a_file
        refused = violation.opens_a_file and driver.file_calls <= seccomp.MOST_FILE_CALLS
        self._log(
            "sandbox_violation",
            syscall=violation.name,
            arguments=",".join(f"{argument:#x}" for argument in violation.arguments[:4]),
            driver=violation.pid,
            answer="EACCES" if refused else "killed",
        )
        if refused:
            seccomp.refuse(driver.listener, violation)
        else:
            driver.violation = violation.name
            driver.kill()

    # ---- And when it has ended

    def _judge(self, driver: _Driver) -> Stop | None:
        """What its end means: why this ends too, or None to start another. Raises DriverFailed."""
        word, detail = driver.last_word or ("", "")
        if word == handover.STOPPED and driver.status == 0:
            return Stop.UNPLUG if detail == Stop.UNPLUG.name else Stop.SIGNAL
        reason, code = self._reason(driver)
        self._log("driver_died", driver=driver.pid, reason=reason)
        if self._stopping.received:
            return Stop.SIGNAL
        if word == handover.FAILED and not self._was_up:
            raise DriverFailed(reason, code)
        self._failed_starts += not driver.up
        if self._failed_starts >= MOST_FAILED_STARTS:
            raise DriverFailed(f"the driver did not come up {self._failed_starts} times in a row; last: {reason}", code)
        return None

    def _reason(self, driver: _Driver) -> tuple[str, int]:
        """Why it died, in words, and the exit code that goes with it."""
        word, detail = driver.last_word or ("", "")
        if word == handover.FAILED:
            code, _, text = detail.partition("\n")
            # Its own words, which go to somebody's terminal.
            plain = "".join(each if each.isprintable() or each == "\n" else "?" for each in text)
            return plain, int(code) if code.isdecimal() else ExitCode.FAILURE
        if driver.violation is not None:
            return f"it called {driver.violation}, which its sandbox does not allow", SandboxError.exit_code
        assert driver.status is not None
        if self._cgroup is not None and self._cgroup.out_of_memory_kills > self._oom_kills:
            self._oom_kills = self._cgroup.out_of_memory_kills
            limit = self._manifest.required_mem_mb
            return (
                f"it wanted more memory than runtime.required_mem_mb: {limit}; use fewer buffers (--rx-buffers, "
                "--tx-buffers), or change the manifest",
                ExitCode.FAILURE,
            )
        ended = os.waitstatus_to_exitcode(driver.status)
        if ended < 0:
            return f"killed by {signal.Signals(-ended).name}", ExitCode.FAILURE
        return f"ended with exit code {ended}", ExitCode.FAILURE


def driver_command(manifest: Manifest) -> list[str]:
    """The driver process's command: this Python, without site-packages, environment or current directory, which
    saves memory and leaves nobody a say in what it imports. Raises UsageError for an entry point that there is not, or
    that somebody else could change."""
    program = manifest.entrypoint_path
    if os.path.exists(program):
        _refuse_others_program(program)
    else:
        # A manifest of one's own for the V-Node that comes with the package need not bring its program along.
        program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "net-bridge", manifest.entrypoint)
    if not os.path.isfile(program):
        raise UsageError(
            f"{manifest.path}: runtime.entrypoint: there is no {manifest.entrypoint_path}; "
            'expected a program there, or "bin/net-bridge.vnode", which comes with the package'
        )
    where = (netbridge.__file__, vfio.__file__)
    paths = [os.path.dirname(os.path.dirname(os.path.abspath(str(file)))) for file in where]
    paths.append(os.path.dirname(os.path.abspath(_cffi_backend.__file__)))
    cache = ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
    return [sys.executable, "-I", "-S", *cache, os.path.abspath(program), *dict.fromkeys(paths)]


def _refuse_others_program(program: str) -> None:
    """It is started as root: nobody else may have a hand in it."""
    for path in (program, os.path.dirname(os.path.abspath(program))):
        status = os.stat(path)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise UsageError(
                f"runtime.entrypoint: {path} belongs to uid {status.st_uid} and has mode "
                f"{status.st_mode & 0o7777:o}; expected that nobody but root can change it"
            )
