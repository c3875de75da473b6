"""The driver process: from a manifest to a bridge that runs, and back to the driver the device had before.

Everything is claimed in the order in which it is needed and given back in the opposite order, whatever happens in
between. Each claim first asks the manifest.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import vfio
from netbridge.bridge import Bridge, Settings, Stop
from netbridge.datapath._core import ffi, lib
from netbridge.errors import DeviceError
from netbridge.ipc.messages import Facts
from netbridge.ipc.server import PortServer
from netbridge.log import Log
from netbridge.metrics import CounterPage
from netbridge.virtio import features
from netbridge.virtio.dma import VfioDma
from netbridge.virtio.net import RX_VECTOR, InterruptMode, NetDevice
from netbridge.virtio.pci import VirtioPci, require_virtio_net
from netbridge.vnode.capabilities import IRQ, MIB, NETWORK, PCI, SHARE, Capabilities, Msix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from netbridge.vnode.manifest import Manifest

MSIX_VECTORS = 3  # configuration, receive, transmit
QUEUE_MEMORY = MIB // 4  # two virtqueues of 256 entries and the TX header, with room
DELIVERY_SAMPLES = 200
DELIVERY_DEADLINE_S = 1.0


class Options:
    """What the command line adds to the manifest."""

    def __init__(
        self,
        *,
        pci: vfio.PciAddress | None,
        socket_path: str,
        counters_path: str,
        service_uids: Collection[int],
        without_features: Collection[str],
        interface: str,
        settings: Settings,
    ) -> None:
        self.pci = pci
        self.socket_path = socket_path
        self.counters_path = counters_path
        self.service_uids = service_uids
        self.without_features = without_features
        self.interface = interface
        self.settings = settings


def run(manifest: Manifest, options: Options, log: Log) -> tuple[Stop, int, dict[str, Any]]:
    """Claims the manifest's function and serves its port until a signal or an unplug.

    Returns why it stopped, the signal's number (0 for none), and the final counters. Raises NetbridgeError or
    vfio.VfioError; whatever was claimed has then been given back.
    """
    granted = manifest.capabilities
    address = _check_grants(granted, options)
    wanted = features.select(options.without_features)
    with ExitStack() as stack:
        stopping = stack.enter_context(_stop_signals())
        # Before the device is touched: a socket that is taken should cost nobody a reset.
        server = stack.enter_context(PortServer(options.socket_path, options.service_uids, Facts(bytes(6))))
        counters = CounterPage(options.counters_path)
        stack.callback(counters.close)
        began = time.monotonic()
        function = vfio.PciFunction(address)
        # Before it is taken from its driver: this could be the disk that the system runs from.
        require_virtio_net(str(address), function.vendor_id, function.device_id, function.class_code)
        stack.enter_context(vfio.bind(address))
        device = stack.enter_context(vfio.open_device(address, interface=options.interface))
        mode = _check_irq(granted, device)
        log("claimed", device=address, interface=device.interface, irq=granted.irq)
        net = stack.enter_context(NetDevice(VirtioPci(device), VfioDma(device.iommu), interrupts=mode, wanted=wanted))
        request_fd, error_fd = _watch_device(device, stack)
        if mode is InterruptMode.MSIX:
            net.configure()
            _measure_delivery(device, net, counters.counters)
            net.reset()
        log("up", seconds=f"{time.monotonic() - began:.3f}", socket=options.socket_path)
        bridge = Bridge(
            net,
            device.iommu,
            server,
            counters.counters,
            log,
            options.settings,
            stop_fd=stopping.fileno(),
            request_fd=request_fd,
            error_fd=error_fd,
        )
        why = bridge.run()
        log("stopping", why=why.value)
        return why, stopping.received, counters.snapshot()


# ---- What the manifest allows ---------------------------------------------------------------------------------------


def _check_grants(granted: Capabilities, options: Options) -> vfio.PciAddress:
    """Everything that can be refused before anything is touched. Returns the function to claim."""
    granted.require(NETWORK, "opening a network device")
    granted.require(PCI, "claiming the network device")
    assert granted.pci_function is not None
    if options.pci is not None:
        granted.require_pci_function(options.pci, "claiming the function named with --pci")
    granted.require(IRQ, "receiving the device's interrupts")
    if isinstance(granted.irq, Msix):
        granted.require_msix(MSIX_VECTORS, "one interrupt vector each for configuration, receive and transmit")
    granted.require_dma(options.settings.dma_bytes + QUEUE_MEMORY, "the frame buffers and the virtqueues")
    granted.require(SHARE, "passing the frame buffers to the service")
    return granted.pci_function


def _check_irq(granted: Capabilities, device: vfio.Device) -> InterruptMode:
    """Which kind of interrupt the manifest grants; for INTx also that this function has that very line."""
    if isinstance(granted.irq, Msix):
        return InterruptMode.MSIX
    granted.require_intx(device.config.interrupt_line, f"the interrupt of {device.address}")
    return InterruptMode.INTX


# ---- Signals, unplug, and how long an interrupt takes ---------------------------------------------------------------


class _Stopping:
    """Readable once SIGTERM or SIGINT has come; `received` is the signal's number, 0 before."""

    def __init__(self, readable: socket.socket) -> None:
        self._readable = readable
        self.received = 0

    def fileno(self) -> int:
        return self._readable.fileno()

    def note(self, number: int, _frame: object) -> None:
        self.received = self.received or number


@contextmanager
def _stop_signals() -> Iterator[_Stopping]:
    """Turns SIGTERM and SIGINT into a readable fd while the body runs. Main thread only."""
    readable, written = socket.socketpair()
    with readable, written:
        written.setblocking(False)
        stopping = _Stopping(readable)
        before = {number: signal.signal(number, stopping.note) for number in (signal.SIGTERM, signal.SIGINT)}
        wakeup = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        try:
            yield stopping
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)


def _watch_device(device: vfio.Device, stack: ExitStack) -> tuple[int | None, int | None]:
    """The device-request (unplug) and the error interrupt's eventfds, None for one that the device does not have."""
    fds: list[int | None] = []
    for index, enable in ((vfio.REQUEST, device.irqs.enable_request), (vfio.ERROR, device.irqs.enable_error)):
        if device.irqs.info(index).count == 0:
            fds.append(None)
            continue
        eventfd = stack.enter_context(vfio.EventFd())
        enable(eventfd)
        fds.append(eventfd.fileno())
    return fds[0], fds[1]


def _measure_delivery(device: vfio.Device, net: NetDevice, counters: Any) -> None:
    """How long from an interrupt's trigger to its eventfd being read, with VFIO's loop-back trigger: the kernel's part
    and this process's, without the device."""
    fd = net.interrupts.rx_fd
    histogram = ffi.addressof(counters.irq_latency_ns[lib.NB_LATENCY_DELIVERY])
    for _ in range(DELIVERY_SAMPLES):
        began = time.monotonic_ns()
        device.irqs.trigger_msix(RX_VECTOR)
        _await_eventfd(fd, device)
        lib.nb_histogram_add(histogram, time.monotonic_ns() - began)


def _await_eventfd(fd: int, device: vfio.Device) -> None:
    deadline = time.monotonic() + DELIVERY_DEADLINE_S
    while True:
        try:
            os.eventfd_read(fd)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise DeviceError(
                    f"{device.address}: VFIO's loop-back trigger of the receive vector did not arrive within "
                    f"{DELIVERY_DEADLINE_S:g} s; interrupts do not work on this machine"
                ) from None
