"""`netbridge run --vhost-user`: the V-Node on a device that is another process, for development without root and VFIO.

The manifest, the port, the bridge and the services are the same. What is not: there is no PCI function, so the
manifest's is not used; there is no monitor and no sandbox, so the driver is this very process; and the back-end, DPDK's
net_vhost or another, may go away and come back, which ends the session and begins another (`Link`).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack

from netbridge.bridge import Bridge
from netbridge.errors import DeviceError, UsageError
from netbridge.ipc.deadline import Deadline
from netbridge.ipc.listener import PortListener
from netbridge.ipc.messages import Facts
from netbridge.ipc.server import PortServer
from netbridge.log import Log
from netbridge.metrics import CounterPage
from netbridge.session import Settings
from netbridge.virtio import features
from netbridge.virtio.errors import Gone, Misbehaved
from netbridge.virtio.net import NetDevice
from netbridge.virtio.vhost_user.memory import VhostDma, VhostMemory
from netbridge.virtio.vhost_user.transport import VhostUser
from netbridge.vnode.backoff import Backoff
from netbridge.vnode.capabilities import NETWORK, SHARE
from netbridge.vnode.manifest import Manifest
from netbridge.vnode.options import Outcome
from netbridge.vnode.stopping import stop_signals
from vfio._record import NamedTuple

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 1.0
CALM_SECONDS = 1.0  # a connection that lasted so long was one
PATIENCE_SECONDS = 30.0
# A device without an IOMMU in front of it, because it sees nothing that it was not handed.
REQUIRED = (features.VERSION_1,)


class Options(NamedTuple):
    """What the command line says. `path`: of the back-end's socket, or with `listen` of the one that it connects to.
    `patience_seconds`: how long to wait for a back-end, at first and after it went away."""

    path: str
    listen: bool
    mac: bytes | None
    patience_seconds: float
    socket_path: str
    counters_path: str
    service_uids: Collection[int]
    without_features: Collection[str]
    settings: Settings


def run(manifest: Manifest, options: Options, log: Log, warn: Callable[[str], None]) -> Outcome:
    """Serves the port with frames of the back-end until a signal. Raises NetbridgeError. Main thread only."""
    granted = manifest.capabilities
    granted.require(NETWORK, "opening a network device")
    granted.require_dma(options.settings.dma_bytes, "the frame buffers and the virtqueues")
    wanted = features.select([*manifest.without, *options.without_features])
    warn(
        f"--vhost-user: the device is the back-end at {options.path}; {manifest.name}'s CAP_HARDWARE_IO_PCI and "
        "CAP_IRQ_REGISTER are not used, and the driver is not confined: for development only"
    )
    refusal = "" if granted.has(SHARE) else f"the driver's manifest does not grant {SHARE}, so it shares no frames"
    with ExitStack() as stack:
        stopping = stack.enter_context(stop_signals())
        port = stack.enter_context(PortListener(options.socket_path))
        page = CounterPage(options.counters_path)
        stack.callback(page.close)
        server = stack.enter_context(PortServer(port, options.service_uids, Facts(bytes(6)), refusal=refusal))
        memory = VhostMemory()
        transport = VhostUser(options.path, memory, mac=options.mac)
        net = stack.enter_context(
            NetDevice(
                transport,
                VhostDma(memory),
                wanted=wanted,
                required=REQUIRED,
                tx_slots=options.settings.tx_slots,
                most_pairs=options.settings.queue_pairs,
            )
        )
        link = stack.enter_context(
            Link(transport, options.path, listen=options.listen, patience_seconds=options.patience_seconds, log=log)
        )
        bridge = Bridge(
            net,
            memory,
            server,
            page.counters,
            log,
            options.settings,
            stop_fd=stopping.fileno(),
            ready=lambda: log("up", socket=options.socket_path),
            link=link,
        )
        why = bridge.run()
        log("stopping", why=why.value)
        return Outcome(why, stopping.received, 0, page.snapshot())


class Link:
    """Finds the back-end for `transport`, notices that it is gone, and finds it again.

    Connects to `path`, or with `listen` waits there for the back-end to connect. Tries at once, then after pauses that
    grow from FIRST_PAUSE_SECONDS to LONGEST_PAUSE_SECONDS. `attend` is to be called whenever `fileno` is readable.
    """

    def __init__(
        self, transport: VhostUser, path: str, *, listen: bool = False, patience_seconds: float, log: Log
    ) -> None:
        """Raises DeviceError when it cannot listen at `path`."""
        self._transport = transport
        self._path = path
        self._patience_seconds = patience_seconds
        self._log = log
        self._last_words = "nobody connected"
        with ExitStack() as stack:
            self._epoll = stack.enter_context(select.epoll())
            self._timer = Deadline()
            stack.callback(self._timer.close)
            self._epoll.register(self._timer.fileno(), select.EPOLLIN)
            self._epoll.register(transport.error_fd, select.EPOLLIN)
            self._listener = stack.enter_context(_listen(path)) if listen else None
            if self._listener is not None:
                stack.callback(os.unlink, path)
                self._epoll.register(self._listener.fileno(), select.EPOLLIN)
            self._stack = stack.pop_all()
        transport.on_hang_up = self._lost
        self._backoff = Backoff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, CALM_SECONDS)
        self._found_at = 0.0
        self._give_up_at = time.monotonic() + patience_seconds
        self._timer.arm(1e-6)  # at once

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def there(self) -> bool:
        """Whether there is a back-end, as far as is known."""
        return self._transport.connected

    def attend(self) -> bool:
        """Sees to whatever happened; whether there is a back-end now. When there was one and is none any more, it says
        so once before it looks for another. One that talks nonsense is hung up on, and as good as gone. Raises
        DeviceError when none was found within the patience, and Misbehaved when the very first is none: then whoever
        started this has named the wrong socket."""
        was_there = self._transport.connected
        ready = {fd for fd, _ in self._epoll.poll(0)}
        if self._listener is not None and self._listener.fileno() in ready:
            stream, _ = self._listener.accept()
            if was_there:
                stream.close()  # one is enough
            else:
                self._take(stream)
        if was_there:
            try:
                return self._transport.look()
            except Misbehaved as error:
                self._log("back_end_refused", path=self._path, why=error)
                return False
        if self._timer.expired() and not self._transport.connected:
            self._try()
        return self._transport.connected

    def close(self) -> None:
        """Stops looking. The connection is the transport's."""
        self._transport.on_hang_up = lambda: None
        self._stack.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lost(self) -> None:
        now = time.monotonic()
        lasted = now - self._found_at
        if lasted >= CALM_SECONDS:
            self._give_up_at = now + self._patience_seconds
        self._timer.arm(self._backoff.after(lasted))
        self._log("back_end_gone", path=self._path)

    def _try(self) -> None:
        if self._listener is None:
            self._connect()
        if self._transport.connected:
            return
        left = self._give_up_at - time.monotonic()
        if left <= 0:
            role = ",client=1" if self._listener is not None else ""
            raise DeviceError(
                f"{self._path}: no vhost-user back-end within {self._patience_seconds:g} s: {self._last_words}; "
                f"start one, with DPDK for instance by --vdev net_vhost0,iface={self._path}{role}"
            )
        self._timer.arm(min(self._backoff.after(0), left))

    def _connect(self) -> None:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # A socket whose owner does not accept takes no more connections after a while, and this must not wait.
            stream.setblocking(False)
            stream.connect(self._path)
        except OSError as error:
            stream.close()
            self._note(error)
        else:
            self._take(stream)

    def _take(self, stream: socket.socket) -> None:
        try:
            self._transport.attach(stream)
        except (Gone, Misbehaved) as error:
            if isinstance(error, Misbehaved) and not self._found_at:
                raise
            self._last_words = str(error)
            self._log("back_end_refused", path=self._path, why=error)
            return
        self._found_at = time.monotonic()
        self._timer.disarm()
        self._epoll.register(self._transport.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        self._log("back_end_found", path=self._path)

    def _note(self, error: OSError) -> None:
        words = {
            errno.ENOENT: "there is no such socket",
            errno.ECONNREFUSED: "nobody listens there",
            errno.EAGAIN: "whoever listens there takes no connections",
        }
        if error.errno not in words:
            raise DeviceError(f"{self._path}: cannot connect to the vhost-user back-end: {error.strerror}")
        self._last_words = words[error.errno]


def _listen(path: str) -> socket.socket:
    """Raises DeviceError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(path)
        listener.bind(path)
        listener.listen(1)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise DeviceError(f"{path}: cannot listen for a vhost-user back-end: {error.strerror}") from None
    return listener


def _remove_stale(path: str) -> None:
    """A socket that nobody listens at any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


def parse_mac(text: str) -> bytes:
    """A MAC address of one station, as `52:54:00:12:34:56`. Raises UsageError."""
    try:
        mac = bytes(int(part, 16) for part in text.split(":"))
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise UsageError(f"{text!r} is not the MAC address of one station, such as 52:54:00:12:34:56")
    return mac
