"""Boots a guest, runs things in it, and collects what is left of it.

    with boot(image, code=disk, nics=[Nic()], artefacts=Path("build/x")) as guest:
        guest.run(["uname", "-r"]).stdout
        guest.wire.send(frame)

A guest is up when its agent has greeted. Until then everything that can go wrong is watched for at once: QEMU
ending, a panic on the console, the virtual machine stopped by an error, and a guest that does nothing, or nothing
that can be seen. Afterwards the same watchers make every call on a lost guest fail at once, with the reason and the
end of its console.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from qemu import accel as accelerators
from qemu.accel import Accelerator
from qemu.agent import Agent, Completed, GuestProcess
from qemu.command import Channels, Disk, Machine, Nic, build, default_mac, netdev_id, script
from qemu.console import Console
from qemu.control import Control
from qemu.errors import AcceleratorUnavailable, GuestLost, GuestNeverCameUp, GuestPanicked, HarnessError
from qemu.process import Process
from qemu.wire import Wire

if TYPE_CHECKING:
    from qemu.images import Image

__all__ = ["Guest", "Nic", "boot"]

IDLE_SECONDS = 4.0
"""A guest that was silent and idle for so long while it booted hangs."""
IDLE_SHARE = 0.1
"""Share of one processor below which a guest counts as idle."""
SPIN_SECONDS = 30.0
"""Processor time that a booting guest may use without a word on the console: with "quiet", that is all of its boot."""
TRIAL_SECONDS = 8.0
"""The same for the first guest under KVM: where that works it takes a tenth of this, and where not it is no gain."""
FLOOD_BYTES = 1 << 19
"""What no guest prints while it boots."""
LOOK_SECONDS = 0.25
QUIT_SECONDS = 3.0
PANIC_SECONDS = 2.0
CONSOLE_LINES = 30

FAULT = re.compile(r"DMAR:.*\bfault addr\b|virtio_iommu.*\bfault\b")

READ_KERNEL_LOG = """
import os
def _kernel_log():
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    records = []
    try:
        while True:
            try:
                records.append(os.read(fd, 8192).decode(errors="replace"))
            except BrokenPipeError:
                continue
            except BlockingIOError:
                return records
    finally:
        os.close(fd)
_kernel_log()
"""


class Guest:
    """A guest that is up; made by boot(). Ended by close() or by leaving the with block."""

    def __init__(self, machine: Machine, accelerator: Accelerator, wires: Mapping[str, Wire], artefacts: Path):
        self.machine = machine
        self.accel = accelerator
        self.wires = dict(wires)
        """The wires that booting has made, by the id of their NIC; they are closed with the guest."""
        self.artefacts = artefacts
        self.console = artefacts / "console.log"
        self.boot_seconds = 0.0
        """From the start of QEMU until the agent greeted."""
        self._state = threading.Condition()
        self._failure: HarnessError | None = None
        self._panic: str | None = None
        self._up = False
        self._closing = False
        self._closed = False
        self._stop_expected = 0
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()

    def _start(self, stack: contextlib.ExitStack) -> None:
        ends = {}
        theirs = {}
        for name in ("console", "agent", "control"):
            ends[name], theirs[name] = socket.socketpair()
            stack.callback(ends[name].close)
            stack.callback(theirs[name].close)
        netdevs = {nic.id: nic.wire for nic in self.machine.nics if nic.wire is not None}
        channels = Channels(
            console=f"socket,fd={theirs['console'].fileno()},logfile={_escape(self.console)},logappend=off",
            agent=f"socket,fd={theirs['agent'].fileno()}",
            control=f"socket,fd={theirs['control'].fileno()}",
            netdevs={nic.id: nic.wire.netdev(netdev_id(nic)) for nic in self.machine.nics if nic.wire is not None},
        )
        self.argv = build(self.machine, channels)
        again = self.artefacts / "qemu.sh"
        again.write_text(script(self.machine, self.argv))
        again.chmod(0o755)
        fds = [end.fileno() for end in theirs.values()] + [fd for netdev in netdevs.values() for fd in netdev.fds()]
        # The watchers are there before there is anything to see, and stay until there is nothing more.
        self._console = Console(ends["console"], self._on_panic)
        stack.callback(self._console.close)
        self.agent = Agent(ends["agent"], self._on_hello, self._why_closed)
        stack.callback(self.agent.close)
        self._control = Control(ends["control"], self.artefacts / "qmp.log", self._on_event)
        stack.callback(self._control.close)
        self._began = time.monotonic()
        self._process = Process(self.argv, log=self.artefacts / "qemu.log", fds=fds, on_exit=self._on_exit)
        stack.callback(self._process.kill)
        for end in theirs.values():
            end.close()

    # What the watchers see

    def _fail(self, failure: HarnessError) -> None:
        with self._state:
            if self._failure is None and not self._closing:
                self._failure = failure
            up = self._up
            self._state.notify_all()
        if up and self._failure is not None:
            self.agent.lose(str(self._failure))

    def _with_console(self, text: str) -> str:
        tail = self._console.tail(CONSOLE_LINES)
        return f"{text}\n--- end of {self.console}\n{tail}" if tail.strip() else f"{text}\nits console is empty"

    def _on_hello(self) -> None:
        with self._state:
            self._state.notify_all()

    def _on_exit(self) -> None:
        if self._closing:
            return
        # What the console has to say last may tell more than QEMU's exit code.
        self._console.wait_ended(1.0)
        if self._panic is not None:
            self._fail(GuestPanicked(self._with_console(f"guest panicked: {self._panic}")))
            return
        what = "guest is gone" if self._up else "guest never came up"
        kind = GuestLost if self._up else GuestNeverCameUp
        self._fail(kind(self._with_console(f"{what}: {self._process.ending()}")))

    def _on_panic(self, line: str) -> None:
        if self._panic is None:
            self._panic = line.strip()
            # panic=-1 ends QEMU right after the last line of the report, which belongs into the message; if it does
            # not, the guest has panicked all the same.
            threading.Thread(target=self._after_panic, name="panic", daemon=True).start()

    def _after_panic(self) -> None:
        with self._state:
            self._state.wait_for(lambda: self._failure is not None, PANIC_SECONDS)
        self._fail(GuestPanicked(self._with_console(f"guest panicked: {self._panic}")))

    def _why_closed(self) -> str:
        """Why the agent's port was closed: QEMU's end is told a moment later than it is felt there."""
        with self._state:
            self._state.wait_for(lambda: self._failure is not None or self._closing, 2 * PANIC_SECONDS)
            return str(self._failure) if self._failure is not None else "the guest is being closed"

    def _on_event(self, event: dict[str, Any]) -> None:
        name = event.get("event")
        data = event.get("data") or {}
        if name == "STOP":
            # Asked from a thread of its own: this one is the one that would bring the answer.
            threading.Thread(target=self._look_at_stop, name="stop", daemon=True).start()
        elif name == "GUEST_PANICKED":
            self._on_panic("GUEST_PANICKED reported by the panic device")
        elif name == "VSERPORT_CHANGE" and data.get("id") == "agent-port" and not data.get("open") and self._up:
            self.agent.lose("the agent in the guest has ended", final=False)

    def _look_at_stop(self) -> None:
        try:
            status = self._control.execute("query-status").get("status")
        except HarnessError:
            return  # QEMU ends: that is told elsewhere
        if status in ("internal-error", "io-error", "guest-panicked", "watchdog"):
            words = self._process.first_words()
            said = f': "{words}"' if words else ""
            kind = GuestLost if self._up else GuestNeverCameUp
            self._fail(kind(self._with_console(f"QEMU stopped the virtual machine for {status}{said}")))

    def _wait_up(self, timeout: float, spin: float) -> None:
        """Return when the agent has greeted; raise as soon as it is clear that it will not."""
        activity = used_then = 0.0
        looked: list[tuple[float, float]] = []  # when, and the effort until then, since the console's last word
        while True:
            with self._state:
                self._state.wait_for(lambda: self._failure is not None or self.agent.ready, LOOK_SECONDS)
                if self._failure is not None:
                    break
            if self.agent.ready:
                self.agent.wait_ready(0)
                with self._state:
                    self._up = True
                self.boot_seconds = time.monotonic() - self._began
                return
            now = time.monotonic()
            used, waited = self._process.effort()
            if activity != self._console.last_activity:
                activity = self._console.last_activity
                used_then = used
                looked.clear()
            looked.append((now, used + waited))
            while looked[0][0] < now - IDLE_SECONDS - LOOK_SECONDS:
                looked.pop(0)
            span, spent = now - looked[0][0], used + waited - looked[0][1]
            stuck = None
            if span >= IDLE_SECONDS and spent < IDLE_SHARE * span:
                stuck = f"it has been idle and silent for {span:.0f} s"
            elif used - used_then >= spin:
                stuck = f"it has used {spin:.0f} s of processor time without a word on the console"
            elif self._console.size > FLOOD_BYTES:
                stuck = f"it has flooded its console with {self._console.size >> 10} KiB"
            elif now - self._began >= timeout:
                stuck = f"its agent did not greet within {timeout:g} s"
            if stuck is not None:
                self._fail(GuestNeverCameUp(self._with_console(f"guest never came up: {stuck}")))
                break
        assert self._failure is not None
        raise self._failure

    @property
    def lost(self) -> HarnessError | None:
        """Why this guest is gone, or None while it is there."""
        return self._failure

    # What one does with a guest

    @property
    def wire(self) -> Wire:
        """The wire of the first NIC."""
        for nic in self.machine.nics:
            if isinstance(nic.wire, Wire):
                return nic.wire
        raise ValueError("this guest was booted without a NIC that has a wire")

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        user: str | int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bytes | str | None = None,
    ) -> Completed:
        """Run a command to its end: see Agent.run()."""
        return self.agent.run(argv, check=check, timeout=timeout, user=user, env=env, cwd=cwd, stdin=stdin)

    def start(self, argv: Sequence[str], **options: Any) -> GuestProcess:
        """Start a command whose output is streamed: see Agent.start()."""
        return self.agent.start(argv, **options)

    def put(self, source: bytes | Path, target: str, mode: int | None = None) -> None:
        """Write bytes, or a file or directory of the host, to a path in the guest: see Agent.put()."""
        self.agent.put(source, target, mode)

    def get(self, path: str, to: Path | None = None) -> bytes:
        """The content of a file in the guest: see Agent.get()."""
        return self.agent.get(path, to)

    def eval(self, source: str, timeout: float = 5.0) -> Any:
        """Run Python in the agent's own interpreter, in well under a millisecond: see Agent.eval()."""
        return self.agent.eval(source, timeout)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """A command to QEMU; an underscore in an argument's name stands for a hyphen."""
        if self._failure is not None and not self._process.running:
            raise self._failure
        return self._control.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    def console_tail(self, lines: int = CONSOLE_LINES) -> str:
        return self._console.tail(lines)

    def wait_for_console(self, pattern: str, timeout: float = 10.0) -> re.Match[str]:
        """The first console line with `pattern`, past or to come. Raises GuestLost when there is none in time."""
        match = self._console.wait_for(pattern, timeout)
        if match is None:
            raise GuestLost(self._with_console(f"no line with /{pattern}/ on the console within {timeout:g} s"))
        return match

    def dmesg(self) -> str:
        """The kernel's log, a line each message, with times in seconds of the guest."""
        lines = []
        for record in self.agent.eval(READ_KERNEL_LOG, timeout=10.0):
            head, _, message = record.partition(";")
            fields = head.split(",")
            stamp = int(fields[2]) / 1e6 if len(fields) > 2 and fields[2].isdigit() else 0.0
            lines.append(f"[{stamp:12.6f}] {message.splitlines()[0] if message else ''}")
        return "\n".join(lines)

    def iommu_faults(self) -> list[str]:
        """The lines in which the kernel reports a DMA access that the IOMMU refused."""
        text = self.dmesg() if self.agent.ready else "\n".join(self._console.lines())
        return [line for line in text.splitlines() if FAULT.search(line)]

    def kernel_trouble(self) -> list[str]:
        """Lines of the console that tell of an oops, a warning, a stall or a panic."""
        return list(self._console.trouble)

    # The end

    def close(self) -> None:
        """Collect what is to be kept, end QEMU, politely first, and close all there is. May be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.agent.ready and self._failure is None:
                with contextlib.suppress(HarnessError, OSError):
                    (self.artefacts / "dmesg.log").write_text(self.dmesg() + "\n")
            self._closing = True
            if self._process.running:
                with contextlib.suppress(HarnessError):
                    self._control.execute("quit", timeout=QUIT_SECONDS)
                    self._process.wait(QUIT_SECONDS)
        finally:
            with self._state:
                self._closing = True
                self._state.notify_all()
            self._stack.close()
            for wire in self.wires.values():
                wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def boot(
    image: Image,
    *,
    artefacts: Path,
    code: Path | None = None,
    nics: Sequence[Nic] = (),
    accel: str = "auto",
    machine: Literal["q35", "pc"] = "q35",
    memory_mb: int = 512,
    cpus: int | None = None,
    append: Sequence[str] = (),
    extra_args: Sequence[str] = (),
    timeout: float = 180.0,
    say: Callable[[str], None] = lambda _: None,
) -> Guest:
    """Boot a guest and return it when its agent has greeted.

    `code` is a second read-only disk; `append` goes to the kernel's command line, `extra_args` to QEMU's. A NIC
    without a wire gets one, captured in `artefacts`, which belongs to the guest: see Guest.wires. `accel` is "auto",
    "kvm" or "tcg"; with "auto" a KVM that does not get this kernel to its user space is given up for TCG, and
    Guest.accel tells why. `say` gets a line when that takes an attempt. `timeout` bounds each attempt, in case nothing
    else does: a guest that is idle, spins or floods its console is given up long before. `cpus` defaults to two under
    KVM and one under TCG (see command.py).

    Raises GuestPanicked, GuestNeverCameUp, AcceleratorUnavailable, ToolMissing.
    """
    artefacts = artefacts.absolute()
    artefacts.mkdir(parents=True, exist_ok=True)
    choice = accelerators.choose_accelerator(accel, kernel=image.kernel)
    disks = [Disk(image.root.absolute(), "root")]
    if code is not None:
        disks.append(Disk(code.absolute(), "code"))
    made: dict[str, Wire] = {}
    fitted = []
    for index, nic in enumerate(nics):
        wire = nic.wire
        if wire is None:
            name = "wire.pcap" if not made else f"wire-{nic.id}.pcap"
            wire = made[nic.id] = Wire(artefacts / name, name=nic.id)
        fitted.append(dataclasses.replace(nic, wire=wire, mac=nic.mac or default_mac(index)))
    plan = Machine(
        kernel=image.kernel,
        initrd=image.initrd,
        append=(*image.cmdline, *append),
        disks=tuple(disks),
        nics=tuple(fitted),
        machine=machine,
        memory_mb=memory_mb,
        cpus=cpus or 0,
        extra_args=tuple(extra_args),
    )
    try:
        kernels = {"kvm": image.kernel, "tcg": image.bare_kernel or image.kernel}
        guest = _boot(plan, choice, kernels, made, artefacts, timeout, say)
        for nic in fitted:
            if nic.wire is not None:
                nic.wire.attached()
        return guest
    except BaseException:
        for wire in made.values():
            wire.close()
        raise


def _boot(
    plan: Machine,
    choice: Accelerator,
    kernels: Mapping[str, Path],
    wires: Mapping[str, Wire],
    artefacts: Path,
    timeout: float,
    say: Callable[[str], None],
) -> Guest:
    def attempt(accelerator: Accelerator) -> Guest:
        machine = dataclasses.replace(plan, accel=accelerator.name, kernel=kernels[accelerator.name])
        return _attempt(machine, accelerator, wires, artefacts, timeout)

    try:
        guest = attempt(choice)
    except (GuestNeverCameUp, GuestPanicked) as failure:
        if choice.name != "kvm":
            raise
        reason = str(failure).splitlines()[0]
        if choice.proven:
            # It was demanded, or has worked before: then it is not for us to look for another.
            if choice.reason.startswith("demanded"):
                raise AcceleratorUnavailable(f"KVM was demanded, but under it: {failure}") from failure
            raise
        for name in ("console.log", "qmp.log", "qemu.log"):
            with contextlib.suppress(FileNotFoundError):
                (artefacts / name).rename(artefacts / name.replace(".log", "-kvm.log"))
        say(f"kvm does not run this guest ({reason}); trying tcg")
        fallback = Accelerator("tcg", f"kvm: {accelerators.KVM} opens, but {reason}")
        guest = attempt(fallback)
        # Only now is it KVM that is to blame, and not the guest.
        accelerators.remember(fallback, kernel=plan.kernel)
    else:
        if not choice.proven:
            guest.accel = Accelerator("kvm", "this kernel reached its user space under it")
            accelerators.remember(guest.accel, kernel=plan.kernel)
    return guest


def _attempt(
    machine: Machine, choice: Accelerator, wires: Mapping[str, Wire], artefacts: Path, timeout: float
) -> Guest:
    guest = Guest(machine, choice, wires, artefacts)
    try:
        guest._wait_up(timeout, SPIN_SECONDS if choice.proven else TRIAL_SECONDS)
    except BaseException:
        guest.wires.clear()  # they are for the next attempt, or for whoever made them to close
        guest.close()
        raise
    return guest


def _escape(path: Path) -> str:
    """A path inside one of QEMU's comma-separated values."""
    return str(path).replace(",", ",,")
