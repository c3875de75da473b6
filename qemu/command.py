"""A guest as plain data, and the QEMU command line made of it. Nothing here touches the system.

Two machines are known:

- "q35": intel-iommu with interrupt remapping, or virtio-iommu, without. A NIC sits behind a PCIe root port of its own,
  where it has a function level reset, error and device-request interrupts and can be unplugged; or on the root bus,
  where it has none of that.
- "pc": virtio-iommu, as intel-iommu refuses this machine. A NIC at slot 1f is function 00:1f.0 with IRQ 11. The IOMMU
  is at slot 11 so that it does not share that line. There is no interrupt remapping.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

ROOT_PORT_SLOT = 0x6
"""Slot of the first root port; those of further NICs follow."""
KERNEL_WORDS = ("intel_iommu=on", "iommu=nopt", "panic=-1", "console=ttyS0", "no_timer_check")
"""no_timer_check: the kernel panics when too few timer interrupts arrive while it counts cycles, which happens to an
emulated processor on a busy host. Under KVM the kernel leaves the check out by itself."""
DEFAULT_IOMMU = {"q35": "intel", "pc": "virtio"}
AGENT_PORT = "agent.0"


class Netdev(Protocol):
    """What a NIC's other end has to offer."""

    def netdev(self, ident: str) -> str:
        """The value of -netdev for the backend to be known as `ident`."""

    def fds(self) -> Sequence[int]:
        """Descriptors that QEMU has to inherit."""

    def attached(self) -> None:
        """QEMU has its descriptors; copies kept for it can be closed."""


@dataclass(frozen=True)
class Nic:
    """A virtio-net function behind the IOMMU.

    `wire` is where its frames go; without one, booting makes a Wire. `place` is "root-port" or "root-bus" (q35; the
    machine pc has only a root bus), `addr` the slot there, such as "0x1f". Queue sizes are powers of two from
    256, QEMU's default, to 1024. `properties` go to the device as they are, such as {"packed": "on"}.
    """

    id: str = "nic0"
    wire: Netdev | None = None
    mac: str | None = None
    place: Literal["root-port", "root-bus"] = "root-port"
    addr: str | None = None
    rx_queue_size: int | None = None
    tx_queue_size: int | None = None
    properties: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, size in (("rx_queue_size", self.rx_queue_size), ("tx_queue_size", self.tx_queue_size)):
            if size is not None and (size < 256 or size > 1024 or size & (size - 1)):
                raise ValueError(f"NIC {self.id}: {name} has to be a power of two from 256 to 1024, not {size}")
        if self.place not in ("root-port", "root-bus"):
            raise ValueError(f'NIC {self.id}: place is "root-port" or "root-bus", not {self.place!r}')


@dataclass(frozen=True)
class Disk:
    """A raw image, attached read-only; the guest knows it by `serial`.

    One that is `loose` the guest does not look at before it is told to: for a snapshot only its size counts.
    """

    path: Path
    serial: str
    loose: bool = False


@dataclass(frozen=True)
class Machine:
    """All that makes up a guest, except where its channels end."""

    kernel: Path
    initrd: Path | None = None
    append: tuple[str, ...] = ()
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    machine: Literal["q35", "pc"] = "q35"
    iommu: Literal["intel", "virtio"] | None = None
    """None: intel's on q35, virtio's on pc."""
    accel: Literal["kvm", "tcg"] = "tcg"
    cpu: str | None = None
    memory_mb: int = 512
    cpus: int = 0
    """0: two under KVM, one under TCG."""
    extra_args: tuple[str, ...] = ()
    program: str = "qemu-system-x86_64"

    def __post_init__(self) -> None:
        if self.machine not in ("q35", "pc"):
            raise ValueError(f'machine is "q35" or "pc", not {self.machine!r}')
        if self.iommu not in (None, "intel", "virtio"):
            raise ValueError(f'iommu is "intel" or "virtio", not {self.iommu!r}')
        if (self.machine, self.iommu) == ("pc", "intel"):
            raise ValueError('the machine "pc" has the iommu "virtio": intel-iommu refuses it')
        if len({nic.id for nic in self.nics}) != len(self.nics):
            raise ValueError(f"two NICs have the same id: {', '.join(nic.id for nic in self.nics)}")


@dataclass(frozen=True)
class Channels:
    """Where a guest's channels end: the backends of three chardevs, and a netdev for each NIC's id."""

    console: str
    agent: str
    control: str
    netdevs: Mapping[str, str] = field(default_factory=dict)


def alone(machine: Machine) -> Channels:
    """Channels of a guest that runs by itself: its console on the terminal, the others on sockets beside it."""
    return Channels(
        console="stdio,signal=off",
        agent="socket,path=agent.sock,server=on,wait=off",
        control="socket,path=qmp.sock,server=on,wait=off",
        netdevs={nic.id: f"hubport,id={netdev_id(nic)},hubid={n}" for n, nic in enumerate(machine.nics)},
    )


def netdev_id(nic: Nic) -> str:
    return f"net-{nic.id}"


def default_mac(index: int) -> str:
    """The address of the NIC that is number `index`, unless it says another."""
    return f"52:54:00:12:34:{0x56 + index:02x}"


def device(driver: str, **properties: str | int) -> str:
    """The value of -device; underscores in the names of arguments stand for themselves."""
    return ",".join((driver, *(f"{name}={value}" for name, value in properties.items())))


def nic_device(nic: Nic, index: int, machine: Machine) -> list[str]:
    """Arguments for the NIC that is number `index`: its root port, if it has one, and itself."""
    arguments = []
    properties: dict[str, str | int] = {
        "id": nic.id,
        "netdev": netdev_id(nic),
        "mac": nic.mac or default_mac(index),
        "disable-legacy": "on",
        "iommu_platform": "on",
        "romfile": "",  # an option ROM costs firmware time and serves nothing here
    }
    if machine.machine == "pc" or nic.place == "root-bus":
        if nic.addr is not None:
            properties["addr"] = nic.addr
        elif machine.machine == "pc" and index == 0:
            properties["addr"] = "0x1f"
    else:
        port = device(
            "pcie-root-port", id=f"rp-{nic.id}", chassis=index + 1, slot=index + 1, addr=hex(ROOT_PORT_SLOT + index)
        )
        arguments += ["-device", port]
        properties["bus"] = f"rp-{nic.id}"
        if nic.addr is not None:
            properties["addr"] = nic.addr
    for name in ("rx_queue_size", "tx_queue_size"):
        if getattr(nic, name) is not None:
            properties[name] = getattr(nic, name)
    return [*arguments, "-device", device("virtio-net-pci", **{**properties, **nic.properties})]


def build(machine: Machine, channels: Channels) -> list[str]:
    """The whole command line."""
    argv = [machine.program, "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]
    # The IOMMU comes before the devices that are to be behind it.
    argv += ["-machine", "q35,kernel-irqchip=split" if machine.machine == "q35" else "pc"]
    if (machine.iommu or DEFAULT_IOMMU[machine.machine]) == "intel":
        argv += ["-device", "intel-iommu,intremap=on,caching-mode=on"]
    else:
        argv += ["-device", "virtio-iommu-pci,addr=0x11"]
    cpus = machine.cpus or (2 if machine.accel == "kvm" else 1)
    if machine.accel == "kvm":
        argv += ["-accel", "kvm", "-cpu", machine.cpu or "host"]
    else:
        # Where there is ERMS, Linux copies with "rep movsb", which QEMU carries out a byte at a time. Without it,
        # copying between kernel and user space takes a quarter of the time.
        cpu = machine.cpu or "max,-erms"
        # With a thread for each of several processors, Linux's patching of its own code races with QEMU's translation
        # and now and then ends in "Oops: int3" during boot: they take turns instead.
        argv += ["-accel", f"tcg,thread={'multi' if cpus == 1 else 'single'}", "-cpu", cpu]
    argv += ["-m", str(machine.memory_mb), "-smp", str(cpus)]

    argv += ["-kernel", str(machine.kernel)]
    if machine.initrd is not None:
        argv += ["-initrd", str(machine.initrd)]
    # The initrd waits for the disks that it is told of.
    code = ["guest.code"] if any(disk.serial == "code" for disk in machine.disks) else []
    argv += ["-append", " ".join((*KERNEL_WORDS, *code, *machine.append))]

    argv += ["-chardev", f"{channels.console},id=console", "-serial", "chardev:console"]
    argv += ["-chardev", f"{channels.control},id=control", "-mon", "chardev=control,mode=control"]
    # One port, and the one that is kept for a console. The 31 that there are otherwise have 58 virtqueues more, whose
    # eventfds QEMU asks poll() for with every frame that it takes from a wire.
    argv += ["-device", "virtio-serial-pci,max_ports=2", "-chardev", f"{channels.agent},id=agent"]
    argv += ["-device", device("virtserialport", id="agent-port", chardev="agent", name=AGENT_PORT)]

    for disk in machine.disks:
        backend = {
            "driver": "raw",
            "node-name": f"disk-{disk.serial}",
            "read-only": True,
            "file": {"driver": "file", "filename": str(disk.path)},
        }
        argv += ["-blockdev", json.dumps(backend)]
        argv += ["-device", device("virtio-blk-pci", drive=f"disk-{disk.serial}", serial=disk.serial)]
    for index, nic in enumerate(machine.nics):
        argv += ["-netdev", channels.netdevs[nic.id], *nic_device(nic, index, machine)]
    return [*argv, *machine.extra_args]


def script(machine: Machine, argv: Sequence[str]) -> str:
    """A shell script that runs the same guest alone; `argv`, as it was run by the harness, is told in a comment."""
    words = build(machine, alone(machine))
    lines: list[str] = []
    for word in words[1:]:
        if word.startswith("-") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return "\n".join(
        (
            "#!/bin/sh",
            "# Runs this guest again by itself: console on the terminal, agent and QMP on sockets beside this script,",
            "# nothing at the other end of its NICs. The harness ran it as:",
            f"# {shlex.join(argv)}",
            'cd "$(dirname "$0")" || exit 1',
            " \\\n    ".join((f"exec {shlex.quote(words[0])}", *lines, '"$@"')),
            "",
        )
    )
