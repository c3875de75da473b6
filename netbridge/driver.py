"""The driver process: gets its files from the monitor, goes into its sandbox, and serves the port.

It opens nothing. With everything imported it confines itself (mode strict), and waits. The device, the IOMMU container,
the listening socket and the counters page come over the channel that it was started with: at once or, for a process
that stands by, when the driver before it has died. It ends when the monitor says so or is gone, when the device is
unplugged, or by an error, which the monitor is told.

It lives, with its frame memory, in the few mebibytes of its manifest: hence what is imported here, and what is not.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack

import vfio
from netbridge.bridge import Bridge, Stop
from netbridge.datapath._core import ffi, lib
from netbridge.errors import DeviceError, ExitCode, NetbridgeError
from netbridge.ipc.listener import PortListener
from netbridge.ipc.messages import Facts
from netbridge.ipc.server import PortServer
from netbridge.log import Log
from netbridge.metrics import CounterPage
from netbridge.session import Settings
from netbridge.virtio import features
from netbridge.virtio.dma import VfioDma
from netbridge.virtio.net import InterruptMode, NetDevice
from netbridge.virtio.pci import VirtioPci
from netbridge.vnode import handover, sandbox
from netbridge.vnode.capabilities import SHARE
from netbridge.vnode.manifest import Manifest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

DELIVERY_SAMPLES = 200
DELIVERY_DEADLINE_S = 1.0


def main() -> NoReturn:
    """The whole life of the process. Started by the monitor; see netbridge/vnode/handover.py."""
    try:
        channel = socket.socket(fileno=handover.CHANNEL_FD)
        told = handover.await_told(channel) if channel.type == socket.SOCK_SEQPACKET else None
    except OSError:
        told = None
    if told is None:
        os.write(2, b"this is the driver process of a V-Node; start it with: netbridge run\n")
        os._exit(ExitCode.USAGE)
    code = ExitCode.OK
    try:
        _confine(told[0], channel)
        start = handover.await_told(channel)
        # Without one the monitor has gone, or has no need of it.
        why = _serve(*start, channel) if start is not None else Stop.ORPHANED
        handover.say(channel, handover.STOPPED, why.name)
    except BaseException as error:
        code, text = _explain(error)
        handover.say(channel, handover.FAILED, f"{code}\n{text}")
    # Without the interpreter's own end, which may want files that are out of reach by now.
    os._exit(code)


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the message for the user; for what nobody foresaw also where it happened."""
    lines = [str(error), *getattr(error, "__notes__", ())]
    if isinstance(error, NetbridgeError):
        return error.exit_code, "\n".join(lines)
    if isinstance(error, vfio.VfioError):
        return ExitCode.DEVICE, "\n".join(lines)
    place, trace = [], error.__traceback__
    while trace is not None:
        place.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    lines[0] = f"this should not happen: {type(error).__name__}: {error} ({' > '.join(place[-4:])})"
    return ExitCode.FAILURE, "\n".join(lines)


def _confine(plan: tuple[Any, ...] | None, channel: socket.socket) -> None:
    """Goes into the sandbox; `plan` is a `sandbox.Confinement`, None in mode permissive. Raises SandboxError."""
    sandbox.set_name("netbridge-drv")
    if plan is None:
        handover.say(channel, handover.READY)
        return
    listener = sandbox.confine(sandbox.Confinement(*plan))
    handover.say(channel, handover.CONFINED, fds=[listener])
    os.close(listener)


def _serve(start: dict[str, Any], fds: list[int], channel: socket.socket) -> Stop:
    """Serves the port until told to stop, or the device goes. Raises NetbridgeError or vfio.VfioError; the device is
    quiet then."""
    device_fd, iommu_fd, port_fd, counters_fd = fds
    manifest = Manifest.from_dict(start["manifest"])
    granted = manifest.capabilities
    address = granted.pci_function
    assert address is not None
    log = Log(granted.log)
    mode = InterruptMode(start["irq"])
    refusal = "" if granted.has(SHARE) else f"the driver's manifest does not grant {SHARE}, so it shares no frames"
    with ExitStack() as stack:
        page = CounterPage.adopt(counters_fd)
        stack.callback(page.close)
        port = stack.enter_context(PortListener.adopt(port_fd, start["socket"]))
        server = stack.enter_context(PortServer(port, start["service_uids"], Facts(bytes(6)), refusal=refusal))
        device_fds = vfio.DeviceFds(start["interface"], device_fd, iommu_fd, ioas_id=start["ioas_id"])
        device = stack.enter_context(vfio.Device.from_fds(address, device_fds))
        wanted = features.select(start["without"])
        settings = Settings(**start["settings"])
        net = stack.enter_context(
            NetDevice(
                VirtioPci(device),
                VfioDma(device.iommu),
                interrupts=mode,
                wanted=wanted,
                tx_slots=settings.tx_slots,
                most_pairs=settings.queue_pairs,
            )
        )
        request_fd, error_fd = _watch_device(device, stack)
        if mode is InterruptMode.MSIX:
            net.configure()
            _measure_delivery(device, net, page.counters)
            net.reset()
        bridge = Bridge(
            net,
            device.iommu,
            server,
            page.counters,
            log,
            settings,
            stop_fd=channel.fileno(),
            ready=lambda: handover.say(channel, handover.UP),
            request_fd=request_fd,
            error_fd=error_fd,
        )
        why = bridge.run()
        log("stopping", why=why.value)
        return why


# ---- Unplug, and how long an interrupt takes ------------------------------------------------------------------------


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
    queue = net.rx
    histogram = ffi.addressof(counters.irq_latency_ns[lib.NB_LATENCY_DELIVERY])
    for _ in range(DELIVERY_SAMPLES):
        began = time.monotonic_ns()
        device.irqs.trigger_msix(queue.vector)
        _await_eventfd(queue.irq_fd, device)
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
