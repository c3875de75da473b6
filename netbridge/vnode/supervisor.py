"""Keeps a driver running: opens the device for it, starts it, listens to it, and judges its end.

    start ──► driver starting ── up ──► driver running ── stopped, unplugged ──► the end
                   ▲     └── died ──────────┴── died
                   └───────── pause ◄────────────┘

Once a driver has run for a moment another process is started, which imports everything, goes into its sandbox and
stands by: Python's start is most of the time that a restart takes. It has no file of the device until the driver died.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

import vfio
from netbridge import device_state
from netbridge.bridge import Stop
from netbridge.errors import ExitCode, SandboxError
from netbridge.ipc.listener import PortListener
from netbridge.log import Log
from netbridge.metrics import CounterPage
from netbridge.vnode import handover, seccomp
from netbridge.vnode.backoff import Backoff
from netbridge.vnode.capabilities import MIB
from netbridge.vnode.cgroup import Cgroup
from netbridge.vnode.grants import check_irq, turned_off
from netbridge.vnode.identity import Identity
from netbridge.vnode.manifest import Manifest
from netbridge.vnode.options import DriverFailed, Options
from netbridge.vnode.process import DriverProcess
from netbridge.vnode.stopping import Stopping

STOP_SECONDS = 10.0
# A driver that has run for so long is worth another process beside it.
STANDBY_SECONDS = 2.0
MOST_FAILED_STARTS = 5


class Supervisor:
    def __init__(
        self,
        manifest: Manifest,
        options: Options,
        log: Log,
        stopping: Stopping,
        port: PortListener,
        page: CounterPage,
        cgroup: Cgroup | None,
        identity: Identity | None,
        locked: int,
    ) -> None:
        """`identity`: of the driver, None in mode permissive. `locked`: bytes of memory that it may lock."""
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
        self._driver: DriverProcess | None = None
        self._standby: DriverProcess | None = None
        # When to start another to stand by; None while there is no need.
        self._standby_at: float | None = None
        self._interface = options.interface
        self._poller = select.poll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._was_up = False
        self._failed_starts = 0
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
        """Kills what is left, and waits until it is gone."""
        for process in (self._driver, self._standby):
            if process is not None:
                self._bury(process)

    # ---- Into life

    def _start(self) -> DriverProcess:
        """Has a driver start with the device, one that stood by if there is one."""
        if self._driver is not None:
            self._bury(self._driver)
        driver, self._standby = self._standby or self._spawn(), None
        self._standby_at = None
        self._driver = driver
        driver.began = time.monotonic()
        if driver.slot is not None:
            driver.slot.hurry()
        address = self._manifest.capabilities.pci_function
        assert address is not None
        with vfio.open_device(address, interface=self._interface) as device:
            mode = check_irq(self._manifest.capabilities, device)
            mine = device.fds
            # Whoever stands by is in a sandbox for this one.
            self._interface = mine.interface
            # Copies, so that closing the device here, which ends its bus mastering, comes before the driver has it.
            fds = (os.dup(mine.device), os.dup(mine.iommu))
        try:
            self._log(
                "claimed",
                device=address,
                interface=mine.interface,
                irq=self._manifest.capabilities.irq,
                driver=driver.pid,
            )
            if not driver.prepared:
                self._prepare(driver)
            driver.tell(self._describe(mine, mode), (*fds, self._port.fileno(), self._page.fd))
        finally:
            for fd in fds:
                os.close(fd)
        return driver

    def _spawn(self) -> DriverProcess:
        slot = None
        if self._cgroup is not None:
            slot = self._cgroup.slot()
            slot.limit(self._manifest.required_mem_mb * MIB)
        process = DriverProcess(self._manifest, slot, self._locked)
        self._attend(process.channel.fileno(), lambda: self._hear(process))
        self._attend(process.pidfd, process.reap)
        return process

    def _bury(self, process: DriverProcess) -> None:
        for fd in (process.channel.fileno(), process.pidfd, process.listener):
            self._leave(fd)
        process.close()
        if process is self._driver:
            self._driver = None
        if process is self._standby:
            self._standby = None

    def _prepare(self, process: DriverProcess) -> None:
        """Tells it what its sandbox is to be; the device was opened before, so that its VFIO interface is known."""
        confinement = None
        if self._identity is not None:
            mounts = tuple((mount.path, mount.writable) for mount in self._manifest.mounts)
            allowed = seccomp.calls(self._interface, files=bool(mounts))
            confinement = (self._identity.uid, self._identity.gid, seccomp.program(allowed), mounts)
        process.prepared = True
        process.tell(confinement)

    def _describe(self, fds: vfio.DeviceFds, mode: str) -> dict[str, Any]:
        return {
            "manifest": self._manifest.as_dict(),
            "interface": fds.interface,
            "ioas_id": fds.ioas_id,
            "irq": mode,
            "without": turned_off(self._manifest, self._options.without_features),
            "service_uids": list(self._options.service_uids),
            "socket": self._options.socket_path,
            "settings": self._options.settings.as_dict(),
        }

    def _stand_by(self) -> None:
        """Starts the process that is to follow this one."""
        self._standby_at = None
        self._standby = self._spawn()
        if self._standby.slot is not None:
            self._standby.slot.yield_to_others()
        self._prepare(self._standby)

    # ---- While it lives

    def _attend(self, fd: int, react: Callable[[], None]) -> None:
        self._watched[fd] = react
        self._poller.register(fd, select.POLLIN)

    def _leave(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._poller.unregister(fd)

    def _watch(self, driver: DriverProcess) -> None:
        """Until it has ended. Tells it to stop when this process is told to."""
        give_up: float | None = None
        self._poller.register(self._stopping.fileno(), select.POLLIN)
        while driver.status is None:
            for fd, _ in self._poller.poll(self._patience_ms(give_up)):
                if fd in self._watched:
                    self._watched[fd]()
            if self._standby is not None and self._standby.status is not None:
                self._lose_standby(self._standby)
            now = time.monotonic()
            if self._stopping.received and give_up is None:
                self._poller.unregister(self._stopping.fileno())
                give_up = now + STOP_SECONDS
                driver.stop()
            elif give_up is not None and now >= give_up and driver.status is None:
                self._log("driver_killed", why=f"it did not stop within {STOP_SECONDS:g} s")
                driver.kill()
                give_up = now + STOP_SECONDS
            elif self._standby_at is not None and now >= self._standby_at and give_up is None:
                self._stand_by()
        if give_up is None:
            self._poller.unregister(self._stopping.fileno())
        while driver.heard:
            self._hear(driver)

    def _patience_ms(self, give_up: float | None) -> float | None:
        """How long nothing need happen before there is something to do."""
        times = [moment for moment in (give_up, self._standby_at) if moment is not None]
        return max(min(times) - time.monotonic(), 0) * 1000 + 1 if times else None

    def _hear(self, process: DriverProcess) -> None:
        try:
            heard = handover.hear(process.channel)
        except BlockingIOError:
            process.heard = process.status is None
            return
        if heard is None:
            process.heard = False
            self._leave(process.channel.fileno())
            # Whether it ended, is about to, or talks nonsense: it is of no use any more.
            if process.last_word is None or process.last_word[0] not in (handover.STOPPED, handover.FAILED):
                process.kill()
            return
        word, detail, fds = heard
        process.last_word = (word, detail)
        if word in (handover.CONFINED, handover.READY) and not process.ready:
            process.ready = True
            if fds:
                process.listener = fds.pop()
                self._attend(process.listener, lambda: self._answer_violation(process))
            if self._identity is not None:
                self._log("confined", user=self._identity.name, driver=process.pid)
            if process is self._standby:
                self._log("standby", driver=process.pid)
        elif word == handover.UP and process is self._driver and not process.up:
            self._is_up(process)
        for fd in fds:
            os.close(fd)

    def _is_up(self, driver: DriverProcess) -> None:
        driver.up = self._was_up = True
        self._failed_starts = 0
        now = time.monotonic()
        if driver.slot is not None and self._manifest.max_cpu_share < 1:
            # Starting takes what it takes; the share is what a running driver may use.
            driver.slot.limit_cpu(self._manifest.max_cpu_share)
        self._standby_at = now + STANDBY_SECONDS
        self._log("up", seconds=f"{now - driver.began:.3f}", socket=self._options.socket_path)

    def _answer_violation(self, process: DriverProcess) -> None:
        try:
            violation = seccomp.receive(process.listener)
        except OSError:
            self._leave(process.listener)  # the process is gone
            return
        if violation is None:
            return
        process.file_calls += violation.opens_a_file
        refused = violation.opens_a_file and process.file_calls <= seccomp.MOST_FILE_CALLS
        self._log(
            "sandbox_violation",
            syscall=violation.name,
            arguments=",".join(f"{argument:#x}" for argument in violation.arguments[:4]),
            driver=violation.pid,
            answer="EACCES" if refused else "killed",
        )
        if refused:
            seccomp.refuse(process.listener, violation)
        else:
            process.violation = violation.name
            process.kill()

    # ---- And when it has ended

    def _lose_standby(self, standby: DriverProcess) -> None:
        """Another is started beside the next driver, not beside this one: what ended it would end that one, too."""
        while standby.heard:
            self._hear(standby)
        self._log("standby_died", driver=standby.pid, reason=self._reason(standby)[0])
        self._bury(standby)

    def _judge(self, driver: DriverProcess) -> Stop | None:
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

    def _reason(self, driver: DriverProcess) -> tuple[str, int]:
        """Why it died, in words, and the exit code that goes with it."""
        word, detail = driver.last_word or ("", "")
        if word == handover.FAILED:
            code, _, text = detail.partition("\n")
            # Its own words, which go to somebody's terminal.
            plain = "".join(each if each.isprintable() or each == "\n" else "?" for each in text)
            return plain, int(code) if code.isdecimal() else ExitCode.FAILURE
        if driver.violation is not None:
            return f"it called {driver.violation}, which its sandbox does not allow", SandboxError.exit_code
        if driver.wanted_more_memory:
            limit = self._manifest.required_mem_mb
            return (
                f"it wanted more memory than runtime.required_mem_mb: {limit}; use fewer buffers (--rx-buffers, "
                "--tx-buffers), or change the manifest",
                ExitCode.FAILURE,
            )
        assert driver.status is not None
        ended = os.waitstatus_to_exitcode(driver.status)
        if ended < 0:
            return f"killed by {signal.Signals(-ended).name}", ExitCode.FAILURE
        return f"ended with exit code {ended}", ExitCode.FAILURE
