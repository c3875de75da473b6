"""The network device on a real kernel, under VFIO, against QEMU's device: claimed, brought up, reset, given back.

Runs inside a guest, as root.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vfio
from netbridge.datapath._core import ffi, lib
from netbridge.virtio import commands, features
from netbridge.virtio.commands import Command
from netbridge.virtio.dma import VfioDma
from netbridge.virtio.errors import ControlRefused, NotVirtioNet, WrongState
from netbridge.virtio.identity import NETWORK_MODERN, VIRTIO_VENDOR, require_virtio_net
from netbridge.virtio.net import InterruptMode, NetDevice
from netbridge.virtio.pci import VirtioPci
from netbridge.virtio.states import State
from netbridge.virtio.transport import Status

CONFIGURED = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
LIVE = CONFIGURED | Status.DRIVER_OK
PROBE_SECONDS = 10.0


def virtio_functions() -> list[vfio.PciFunction]:
    """All virtio functions of this machine."""
    found = [vfio.PciFunction(address) for address in vfio.functions()]
    return [function for function in found if function.vendor_id == VIRTIO_VENDOR]


def interface_address(function: vfio.PciFunction) -> bytes | None:
    """MAC address of the network interface that the kernel's driver has made of a function; None without one."""
    for path in Path(function.path).glob("virtio*/net/*/address"):
        return bytes.fromhex(path.read_text().strip().replace(":", ""))
    return None


@pytest.fixture(scope="module")
def function() -> vfio.PciFunction:
    """The first virtio network function, or the one that tests may take, where that is said."""
    wanted = os.environ.get("HARNESS_NIC")
    for found in virtio_functions():
        if wanted is not None and str(found.address) != wanted:
            continue
        if found.device_id == NETWORK_MODERN and found.iommu_group is not None:
            return found
    pytest.skip("no modern virtio network function behind an IOMMU: this test runs in a guest of the harness")


@pytest.fixture(scope="module")
def kernel_mac(function: vfio.PciFunction) -> bytes:
    """The MAC address as the kernel's own driver read it, before the function is taken from it."""
    mac = interface_address(function)
    assert mac is not None, f"{function.address} has no network interface: is it bound to {function.driver}?"
    return mac


@pytest.fixture
def device(function: vfio.PciFunction, kernel_mac: bytes) -> Iterator[vfio.Device]:
    """The function, open under VFIO; afterwards it must be back with the driver it had."""
    before = function.driver
    with vfio.bind(function.address), vfio.open_device(function.address) as opened:
        yield opened
        assert not opened.iommu.mappings, "DMA mappings were left"
    assert function.driver == before
    # The kernel registers the interface on its own time, and sysfs has no event for it.
    deadline = time.monotonic() + PROBE_SECONDS
    while interface_address(function) is None:
        assert time.monotonic() < deadline, f"no network interface on {function.address} after {PROBE_SECONDS} s"
        os.sched_yield()
    assert interface_address(function) == kernel_mac


@pytest.fixture(params=list(InterruptMode), ids=lambda mode: mode.value)
def net(request: pytest.FixtureRequest, device: vfio.Device) -> Iterator[NetDevice]:
    """The network device, untouched, with either kind of interrupt."""
    with NetDevice(VirtioPci(device), VfioDma(device.iommu), interrupts=request.param) as made:
        yield made


def status(device: vfio.Device) -> int:
    """The status register, read past everything that is tested here."""
    return VirtioPci(device).read_status()


def test_it_is_brought_up_and_reset_as_often_as_one_likes(
    net: NetDevice, device: vfio.Device, kernel_mac: bytes
) -> None:
    for _ in range(3):
        net.configure()
        assert status(device) == CONFIGURED
        assert net.facts.mac == kernel_mac
        assert net.facts.link.up
        assert net.facts.header_bytes == 12
        net.start()
        assert status(device) == LIVE
        assert not net.needs_reset()
        assert net.link().up
        net.reset()
        assert status(device) == 0
        assert net.state is State.RESET


def test_the_queues_are_known_to_the_device(net: NetDevice, device: vfio.Device) -> None:
    net.configure()
    transport = VirtioPci(device)
    for queue in (net.rx, net.tx):
        assert transport.queue_enabled(queue.index)
        assert transport.queue_max_size(queue.index) == queue.size
        assert lib.nb_virtqueue_in_flight(queue.handle) == 0
    assert transport.notify_address(net.rx.index) != transport.notify_address(net.tx.index)
    assert len(device.iommu.mappings) == 1


def test_the_interrupts_arrive(net: NetDevice, device: vfio.Device) -> None:
    """VFIO's loop-back stands in for the device: the eventfds are connected, each to its own vector."""
    net.configure()
    fds = net.interrupts
    if fds.mode is InterruptMode.MSIX:
        for vector, fd in enumerate((fds.config_fd, net.rx.irq_fd, net.tx.irq_fd)):
            device.irqs.trigger_msix(vector)
            assert os.eventfd_read(fd) == 1
    else:
        device.irqs.trigger_intx()
        assert os.eventfd_read(fds.intx_fd) == 1
        os.eventfd_write(fds.intx_unmask_fd, 1)


def test_closing_in_service_leaves_a_reset_device(device: vfio.Device) -> None:
    with NetDevice(VirtioPci(device), VfioDma(device.iommu)) as net:
        net.configure()
        net.start()
    assert status(device) == 0
    assert not device.bus_master


@pytest.mark.parametrize("name", [item.name for item in features.SUPPORTED if item not in features.REQUIRED])
def test_each_feature_can_be_turned_off(device: vfio.Device, name: str) -> None:
    with NetDevice(VirtioPci(device), VfioDma(device.iommu), wanted=features.select(off=[name])) as net:
        net.configure()
        net.start()
        assert not net.negotiation.has(features.feature(name))
        assert status(device) == LIVE


@pytest.mark.parametrize(
    "command",
    [
        *(commands.receive_mode(mode, on) for mode in commands.RECEIVE_MODES for on in (True, False)),
        commands.mac_table([], []),
        commands.mac_table([bytes.fromhex("525400000001")], [bytes.fromhex("01005e000001")]),
        commands.mac_address(bytes.fromhex("525400000002")),
        commands.vlan(5, True),
        commands.vlan(5, False),
    ],
    ids=lambda command: command.name,
)
def test_the_device_does_what_it_is_asked_over_the_control_queue(net: NetDevice, command: Command) -> None:
    net.configure()
    net.start()
    for _ in range(100):  # often enough for its ring to wrap
        net.command(command)


def test_what_qemus_device_refuses(net: NetDevice) -> None:
    net.configure()
    net.start()
    # Without virtio headers on the wire there are no receive offloads to choose from.
    for command in (commands.vlan(4096, True), commands.announced(), commands.guest_offloads(0)):
        with pytest.raises(ControlRefused, match=f"refuses {command.name}"):
            net.command(command)
    net.command(commands.vlan(4094, True))


def test_what_qemu_offers_is_in_the_table(device: vfio.Device) -> None:
    with NetDevice(VirtioPci(device), VfioDma(device.iommu)) as net:
        net.configure()
        print(net.negotiation.table())
        assert {"VERSION_1", "ACCESS_PLATFORM", "MAC", "STATUS", "MRG_RXBUF"} <= set(net.negotiation.names)
        assert not [row.name for row in net.negotiation.rows if row.agreed and not row.offered]


def test_small_queues_are_used_as_asked(device: vfio.Device) -> None:
    with NetDevice(VirtioPci(device), VfioDma(device.iommu), rx_size=64, tx_size=8) as net:
        net.configure()
        net.start()
        assert (net.rx.size, net.tx.size) == (64, 8)


def test_each_queue_is_stopped_and_started_alone(net: NetDevice, device: vfio.Device) -> None:
    """RING_RESET (virtio 1.3 §2.6.1), again and again, while the other queue stays as it is."""

    def emptied(handle: Any) -> int:
        return int(lib.nb_virtqueue_reset(handle, ffi.new("uint32_t[]", 256)))

    net.configure()
    net.start()
    assert net.negotiation.has(features.RING_RESET)
    transport = VirtioPci(device)
    for _ in range(20):
        for queue in (net.rx, net.tx):
            assert net.reset_queue(queue, emptied) == 0
            assert transport.queue_enabled(net.rx.index)
            assert transport.queue_enabled(net.tx.index)
            assert transport.queue_max_size(queue.index) == queue.size
    assert status(device) == LIVE
    assert not net.needs_reset()
    net.command(commands.vlan(5, True))


def test_the_states_hold_on_a_real_device_too(device: vfio.Device) -> None:
    found = status(device)
    with NetDevice(VirtioPci(device), VfioDma(device.iommu)) as net:
        with pytest.raises(WrongState):
            net.start()
        assert status(device) == found
        net.configure()
        net.start()
        with pytest.raises(WrongState):
            net.configure()
        assert status(device) == LIVE


def test_other_virtio_functions_are_refused_untouched() -> None:
    others = [found for found in virtio_functions() if found.device_id != NETWORK_MODERN]
    assert others, "a guest of the harness has a virtio disk"
    for other in others:
        with pytest.raises(NotVirtioNet, match=str(other.address)):
            require_virtio_net(str(other.address), other.vendor_id, other.device_id, other.class_code)
