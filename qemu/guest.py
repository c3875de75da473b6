"""Boots a guest, runs things in it, and collects what is left of it.

    with boot(image, code=disk, nics=[Nic()], artefacts=Path("build/x")) as guest:
        guest.run(["uname", "-r"]).stdout
        guest.wire.send(frame)

A guest is up when its agent has greeted and been given the time, randomness and the code disk. It gets there by
booting, or in a tenth of the time from a snapshot (snapshot.py) that the first of its kind has left. What watches over
it is in vm.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from qemu import accel as accelerators
from qemu.accel import Accelerator
from qemu.cache import Cache
from qemu.command import Disk, Machine, Nic, default_mac
from qemu.errors import AcceleratorUnavailable, GuestNeverCameUp, GuestPanicked, HarnessError
from qemu.faults import Faults
from qemu.inside import Inside
from qemu.snapshot import Snapshot
from qemu.tap import Tap
from qemu.vm import VirtualMachine
from qemu.wire import Wire

if TYPE_CHECKING:
    from qemu.images import Image

__all__ = ["Guest", "Nic", "boot"]

SPIN_SECONDS = 12.0
"""Processor time that a booting guest may use without a word on the console; there is one when its kernel is up, and
when its root is mounted."""
TRIAL_SECONDS = 8.0
"""The same for the first guest under KVM, and where KVM was demanded: where that works it takes a tenth of this, and
where not it is no gain."""
CORE_SECONDS = 10.0
CORE = re.compile(r"[\w()!:+@-][\w()!:+@.-]*\.core")
CORES = f"""
import glob, os, time
_deadline = time.monotonic() + {CORE_SECONDS / 2}
while glob.glob("/tmp/cores/*.partial") and time.monotonic() < _deadline:
    time.sleep(0.05)
[os.path.basename(path) for path in glob.glob("/tmp/cores/*.core")]
"""
"""What processes have left that were ended by a fault: see images/core, which may still be at it."""


class Guest(VirtualMachine, Inside):
    """A guest that is up; made by boot()."""

    origin = ""
    """How it came to be up, in words: restored or booted, why it had to be booted, and in what time."""
    begin_seconds = 0.0
    """Of boot_seconds, those after the greeting: the clock, randomness, the code disk."""

    @property
    def wire(self) -> Wire:
        """The wire of the first NIC."""
        for nic in self.machine.nics:
            if isinstance(nic.wire, Wire):
                return nic.wire
        raise ValueError("this guest was booted without a NIC that has a wire")

    @property
    def faults(self) -> Faults:
        """What may go wrong around this guest, as verbs."""
        return Faults(self)

    def reboot(self, begin: Callable[[], object], timeout: float) -> None:
        """Have `begin` make the machine start anew, and return when it is up again and has been given the time."""
        self.agent.lose("the guest is starting anew", final=False)
        begin()
        self.agent.wait_ready(timeout)
        self.agent.begin()

    def kernel_log(self) -> str:
        return self.dmesg() if self.agent.ready else "\n".join(self._console.lines())

    def _collect(self) -> None:
        if self.agent.ready and self._failure is None:
            with contextlib.suppress(HarnessError, OSError):
                for name in self.eval(CORES, CORE_SECONDS):
                    if CORE.fullmatch(name):  # it comes out of the guest, and becomes the name of a file here
                        (self.artefacts / "cores").mkdir(exist_ok=True)
                        self.get(f"/tmp/cores/{name}", self.artefacts / "cores" / name)
            with contextlib.suppress(HarnessError, OSError):
                (self.artefacts / "dmesg.log").write_text(self.dmesg() + "\n")


def boot(
    image: Image,
    *,
    artefacts: Path,
    code: Path | None = None,
    nics: Sequence[Nic] = (),
    accel: str = "auto",
    machine: Literal["q35", "pc"] = "q35",
    iommu: Literal["intel", "virtio"] | None = None,
    memory_mb: int = 512,
    cpus: int | None = None,
    append: Sequence[str] = (),
    extra_args: Sequence[str] = (),
    timeout: float = 180.0,
    patience: float = 1.0,
    snapshot: bool = True,
    cache: Cache | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Guest:
    """A guest that is up: restored from its snapshot, or else booted, and a snapshot made of it for the next.

    With `snapshot` false it is booted, and none is made; `cache` is where snapshots are. A snapshot that cannot be
    restored is removed, `say` and Guest.origin tell why, and the guest is booted.

    `code` is a second read-only disk; `append` goes to the kernel's command line, `extra_args` to QEMU's. A NIC
    without a wire gets one, which belongs to the guest: see Guest.wires. That and a Tap are captured in `artefacts`.
    `accel` is "auto", "kvm" or "tcg"; with "auto" a KVM that does not get this kernel to its user space is given up
    for TCG, and Guest.accel tells why. `say` gets a line when that takes an attempt. `timeout` bounds each attempt, in
    case nothing else does: a guest that is idle, spins or floods its console is given up long before, and one that
    spins later by a factor of `patience`, for a kernel that is slow. `cpus` defaults to two under KVM and one under
    TCG (see command.py).

    Raises GuestPanicked, GuestNeverCameUp, AcceleratorUnavailable, ToolMissing.
    """
    artefacts = artefacts.absolute()
    artefacts.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(artefacts / "cores", ignore_errors=True)  # an earlier guest's; all else is written anew
    choice = accelerators.choose_accelerator(accel, kernel=image.kernel)
    disks = [Disk(image.root.absolute(), "root")]
    if code is not None:
        disks.append(Disk(code.absolute(), "code", loose=True))
    made: dict[str, Wire] = {}
    fitted = []
    for index, nic in enumerate(nics):
        wire = nic.wire
        pcap = artefacts / (f"wire-{nic.id}.pcap" if index else "wire.pcap")
        if wire is None:
            wire = made[nic.id] = Wire(pcap, name=nic.id)
        elif isinstance(wire, Tap):
            wire.capture(pcap)
        fitted.append(dataclasses.replace(nic, wire=wire, mac=nic.mac or default_mac(index)))
    plan = Machine(
        kernel=image.kernel,
        initrd=image.initrd,
        append=(*image.cmdline, *append),
        disks=tuple(disks),
        nics=tuple(fitted),
        machine=machine,
        iommu=iommu,
        memory_mb=memory_mb,
        cpus=cpus or 0,
        extra_args=tuple(extra_args),
    )
    try:
        kernels = {"kvm": image.kernel, "tcg": image.bare_kernel or image.kernel}
        limits = _Limits(timeout, SPIN_SECONDS * patience)
        guest = _boot(plan, choice, kernels, made, artefacts, limits, cache or Cache() if snapshot else None, say)
        for nic in fitted:
            if nic.wire is not None:
                nic.wire.attached()
        return guest
    except BaseException:
        for wire in made.values():
            wire.close()
        raise


class _Limits(NamedTuple):
    """Of an attempt to boot: seconds, and seconds of processor time without a word on the console."""

    whole: float
    spin: float


def _boot(
    plan: Machine,
    choice: Accelerator,
    kernels: Mapping[str, Path],
    wires: Mapping[str, Wire],
    artefacts: Path,
    limits: _Limits,
    cache: Cache | None,
    say: Callable[[str], None],
) -> Guest:
    def attempt(accelerator: Accelerator) -> Guest:
        machine = dataclasses.replace(plan, accel=accelerator.name, kernel=kernels[accelerator.name])
        if cache is None:
            return _cold(machine, accelerator, wires, artefacts, limits, "a snapshot was not wanted")
        return _restored_or_cold(machine, accelerator, wires, artefacts, limits, cache, say)

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
        say(f"kvm does not run this guest ({accelerators.in_brief(reason)}); trying tcg")
        fallback = Accelerator("tcg", f"kvm: {accelerators.KVM} opens, but {reason}")
        guest = attempt(fallback)
        # Only now is it KVM that is to blame, and not the guest.
        accelerators.remember(fallback, kernel=plan.kernel)
    else:
        if not choice.proven:
            guest.accel = Accelerator("kvm", "this kernel reached its user space under it")
            accelerators.remember(guest.accel, kernel=plan.kernel)
    return guest


def _restored_or_cold(
    machine: Machine,
    choice: Accelerator,
    wires: Mapping[str, Wire],
    artefacts: Path,
    limits: _Limits,
    cache: Cache,
    say: Callable[[str], None],
) -> Guest:
    kept = Snapshot(machine, cache)
    if (refusal := kept.refusal()) is not None:
        return _cold(machine, choice, wires, artefacts, limits, refusal)
    state = kept.find()
    reason = "there was no snapshot of it"
    if state is not None:
        try:
            guest = Guest(machine, choice, wires, artefacts, state)
            return _take_over(guest, limits, f"restored from snapshot {kept.key}", restored=True)
        except (HarnessError, OSError) as failure:
            reason = f"its snapshot {kept.key} could not be restored: {str(failure).splitlines()[0]}"
            say(f"booting a guest, because {reason}")
            kept.discard()
    return _cold(machine, choice, wires, artefacts, limits, reason, kept, say)


def _cold(
    machine: Machine,
    choice: Accelerator,
    wires: Mapping[str, Wire],
    artefacts: Path,
    limits: _Limits,
    reason: str,
    kept: Snapshot | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Guest:
    guest = Guest(machine, choice, wires, artefacts)
    doubtful = not choice.proven or (choice.name == "kvm" and choice.reason.startswith("demanded"))
    if doubtful:
        limits = limits._replace(spin=TRIAL_SECONDS)
    return _take_over(guest, limits, f"booted, as {reason}", kept, say)


def _take_over(
    guest: Guest,
    limits: _Limits,
    origin: str,
    kept: Snapshot | None = None,
    say: Callable[[str], None] = lambda _: None,
    restored: bool = False,
) -> Guest:
    """Wait until it is up, and make it this guest and no other; closes it when that fails."""
    try:
        if restored:
            guest.resume()
        guest.wait_up(limits.whole, limits.spin)
        if kept is not None:
            guest.agent.ping()  # answered when it has loaded all that it may need later
            try:
                kept.make(guest.save)
            except HarnessError as error:
                if guest.lost is not None:
                    raise
                say(f"no snapshot of this guest: {str(error).splitlines()[0]}")
        greeted = time.monotonic()
        guest.agent.begin()
        guest.begin_seconds = time.monotonic() - greeted
        guest.boot_seconds = time.monotonic() - guest._began
        guest.origin = f"{origin}, in {guest.boot_seconds:.1f} s"
    except BaseException:
        guest.wires.clear()  # they are for the next attempt, or for whoever made them to close
        guest.close()
        raise
    return guest
