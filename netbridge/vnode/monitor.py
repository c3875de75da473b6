"""The monitor: the small privileged process that keeps a driver process running, and never touches a frame.

It checks the manifest's grants, takes the PCI function from its driver, opens the VFIO device, the port and the
counters page, and starts the driver process with just these files (`supervisor`). It keeps no copy of the device's:
when the driver dies, for whatever reason, the kernel closes the device, which ends its DMA and resets it where there is
a way to. Then the monitor opens the device anew for the next driver, after a pause that grows while drivers keep dying.

When the monitor itself dies, the driver sees its channel end, quiesces the device and ends; the function stays with
vfio-pci, which the next start (or `netbridge restore`) puts right.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import vfio
from netbridge import metrics
from netbridge.ipc.listener import PortListener
from netbridge.log import Log
from netbridge.virtio import features
from netbridge.virtio.identity import require_virtio_net
from netbridge.vnode.cgroup import Cgroup, NoCgroup
from netbridge.vnode.grants import check_grants, locked_memory_limit, turned_off
from netbridge.vnode.identity import driver_identity
from netbridge.vnode.manifest import Manifest
from netbridge.vnode.options import Options, Outcome
from netbridge.vnode.process import driver_command
from netbridge.vnode.stopping import stop_signals
from netbridge.vnode.supervisor import Supervisor

ORPHAN_SECONDS = 5.0  # for a driver whose monitor was killed, to quiesce its device and end


def run(manifest: Manifest, options: Options, log: Log, warn: Callable[[str], None]) -> Outcome:
    """Claims the manifest's function and keeps a driver for it running until a signal or an unplug.

    `warn` is given what the user must know even where nothing may be logged. Raises NetbridgeError or vfio.VfioError;
    whatever was claimed has then been given back. Main thread only.
    """
    granted = manifest.capabilities
    address = check_grants(granted, options.pci, options.settings)
    features.select(turned_off(manifest, options.without_features))
    driver_command(manifest)
    identity = driver_identity(options.driver_user, options.service_uids, f"{manifest.name} {address}")
    strict = manifest.mode == "strict"
    if not strict:
        warn("mode: permissive: the driver runs as root and is not confined; for debugging only")
    with ExitStack() as stack:
        stopping = stack.enter_context(stop_signals())
        group = _make_cgroup(address, stack, log)
        # Before the device is touched: a socket that is taken should cost nobody a reset.
        port = stack.enter_context(open_port(options))
        page = metrics.CounterPage(options.counters_path, manifest.metrics)
        stack.callback(page.close)
        function = vfio.PciFunction(address)
        # Before it is taken from its driver: this could be the disk that the system runs from.
        require_virtio_net(str(address), function.vendor_id, function.device_id, function.class_code)
        locked = locked_memory_limit(granted, options.settings)
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
        stack.enter_context(vfio.bind(address))
        supervisor = Supervisor(
            manifest, options, log, stopping, port, page, cgroup, identity if strict else None, locked
        )
        try:
            why = supervisor.run()
        finally:
            supervisor.end()
        return Outcome(why, stopping.received, supervisor.restarts, page.snapshot())


def open_port(options: Options) -> PortListener:
    """The socket that clients find, closed to all others where one user alone may connect. Raises PortError."""
    uids = set(options.service_uids)
    if len(uids) == 1:
        return PortListener(options.socket_path, mode=0o600, owner=uids.pop())
    return PortListener(options.socket_path)


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
