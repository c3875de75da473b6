"""The command line of QEMU, made of plain data."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from qemu.command import KERNEL_WORDS, Channels, Disk, Machine, Nic, alone, build, script

KERNEL = Path("/images/vmlinuz")
CHANNELS = Channels(console="null", agent="null", control="null", netdevs={"nic0": "N0", "nic1": "N1"})


def values(argv: Sequence[str], option: str) -> list[str]:
    return [argv[at + 1] for at, word in enumerate(argv) if word == option]


def fields(value: str) -> dict[str, str]:
    return dict(field.partition("=")[::2] for field in value.split(",")[1:])


def nic(argv: Sequence[str], index: int = 0) -> dict[str, str]:
    return fields([value for value in values(argv, "-device") if value.startswith("virtio-net-pci,")][index])


def test_the_iommu_is_there_before_every_device_behind_it() -> None:
    argv = build(Machine(kernel=KERNEL, nics=(Nic(),)), CHANNELS)
    assert values(argv, "-machine") == ["q35,kernel-irqchip=split"]
    devices = values(argv, "-device")
    assert devices[0] == "intel-iommu,intremap=on,caching-mode=on"
    assert any(device.startswith("virtio-net-pci") for device in devices[1:])


def test_a_nic_is_modern_behind_the_iommu_and_has_no_rom() -> None:
    function = nic(build(Machine(kernel=KERNEL, nics=(Nic(),)), CHANNELS))
    assert function["iommu_platform"] == function["disable-legacy"] == "on"
    assert function["romfile"] == ""
    assert function["netdev"] == "net-nic0"


def test_each_nic_has_a_root_port_of_its_own() -> None:
    argv = build(Machine(kernel=KERNEL, nics=(Nic(), Nic(id="nic1"))), CHANNELS)
    ports = [fields(value) for value in values(argv, "-device") if value.startswith("pcie-root-port")]
    assert [(port["id"], port["chassis"], port["addr"]) for port in ports] == [
        ("rp-nic0", "1", "0x6"),
        ("rp-nic1", "2", "0x7"),
    ]
    assert [nic(argv, n)["bus"] for n in (0, 1)] == ["rp-nic0", "rp-nic1"]
    assert nic(argv, 0)["mac"] != nic(argv, 1)["mac"]
    assert values(argv, "-netdev") == ["N0", "N1"]


def test_a_nic_on_the_root_bus() -> None:
    argv = build(Machine(kernel=KERNEL, nics=(Nic(place="root-bus", addr="0x9"),)), CHANNELS)
    assert not [value for value in values(argv, "-device") if value.startswith("pcie-root-port")]
    assert nic(argv)["addr"] == "0x9"
    assert "bus" not in nic(argv)


def test_shape_of_a_nic() -> None:
    shaped = Nic(
        mac="52:54:00:00:00:01", rx_queue_size=1024, tx_queue_size=512, properties={"packed": "on", "mq": "on"}
    )
    function = nic(build(Machine(kernel=KERNEL, nics=(shaped,)), CHANNELS))
    assert function["mac"] == "52:54:00:00:00:01"
    assert (function["rx_queue_size"], function["tx_queue_size"]) == ("1024", "512")
    assert (function["packed"], function["mq"]) == ("on", "on")


def test_properties_win_over_defaults() -> None:
    function = nic(build(Machine(kernel=KERNEL, nics=(Nic(properties={"iommu_platform": "off"}),)), CHANNELS))
    assert function["iommu_platform"] == "off"


def test_the_machine_of_the_specification() -> None:
    argv = build(Machine(kernel=KERNEL, machine="pc", nics=(Nic(),)), CHANNELS)
    assert values(argv, "-machine") == ["pc"]
    assert values(argv, "-device")[0] == "virtio-iommu-pci,addr=0x11"
    assert nic(argv)["addr"] == "0x1f"
    assert "bus" not in nic(argv)
    assert not [value for value in argv if "intel-iommu" in value]


def test_processors_and_accelerator() -> None:
    tcg = build(Machine(kernel=KERNEL), CHANNELS)
    assert values(tcg, "-accel") == ["tcg,thread=multi"]
    assert values(tcg, "-smp") == ["1"]
    several = build(Machine(kernel=KERNEL, cpus=2), CHANNELS)
    assert values(several, "-accel") == ["tcg,thread=single"]
    assert values(several, "-smp") == ["2"]
    kvm = build(Machine(kernel=KERNEL, accel="kvm"), CHANNELS)
    assert (values(kvm, "-accel"), values(kvm, "-cpu"), values(kvm, "-smp")) == (["kvm"], ["host"], ["2"])


def test_kernel_initrd_and_words() -> None:
    argv = build(Machine(kernel=KERNEL, initrd=Path("/images/initrd"), append=("quiet", "rdinit=/x")), CHANNELS)
    assert values(argv, "-initrd") == ["/images/initrd"]
    assert values(argv, "-append") == [" ".join((*KERNEL_WORDS, "quiet", "rdinit=/x"))]
    assert {"intel_iommu=on", "iommu=nopt", "panic=-1", "console=ttyS0"} <= set(KERNEL_WORDS)
    assert "-no-reboot" in argv
    assert "-initrd" not in build(Machine(kernel=KERNEL), CHANNELS)


def test_disks_are_read_only_and_known_by_serial_whatever_their_path() -> None:
    argv = build(Machine(kernel=KERNEL, disks=(Disk(Path('/a,b "c"/root'), "root"),)), CHANNELS)
    (backend,) = values(argv, "-blockdev")
    assert '"read-only": true' in backend
    assert r'"filename": "/a,b \"c\"/root"' in backend
    (function,) = [value for value in values(argv, "-device") if value.startswith("virtio-blk-pci")]
    assert fields(function)["serial"] == "root"


def test_no_more_virtqueues_than_the_agent_needs() -> None:
    """QEMU looks at each one's eventfd for every frame."""
    (serial,) = [
        value for value in values(build(Machine(kernel=KERNEL), CHANNELS), "-device") if "virtio-serial" in value
    ]
    assert fields(serial)["max_ports"] == "2"


def test_more_arguments_come_last() -> None:
    argv = build(Machine(kernel=KERNEL, extra_args=("-d", "guest_errors")), CHANNELS)
    assert argv[-2:] == ["-d", "guest_errors"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nic(rx_queue_size=100), "rx_queue_size has to be a power of two from 256 to 1024, not 100"),
        (lambda: Nic(place="nowhere"), "place is"),  # type: ignore[arg-type]
        (lambda: Machine(kernel=KERNEL, machine="microvm"), "machine is"),  # type: ignore[arg-type]
        (lambda: Machine(kernel=KERNEL, nics=(Nic(), Nic())), "two NICs have the same id"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_the_script_runs_the_same_machine_alone() -> None:
    machine = Machine(kernel=KERNEL, append=("it's",), disks=(Disk(Path("/r oot"), "root"),), nics=(Nic(),))
    text = script(machine, ["qemu", "-x y"])
    assert text.startswith("#!/bin/sh\n")
    assert "# qemu '-x y'" in text
    body = text[text.index("exec ") :].replace("\\\n", " ")
    words = shlex.split(body)
    assert words[1:-1] == build(machine, alone(machine))
    assert words[-1] == "$@"
