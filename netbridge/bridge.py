"""The bridge: ties the network device to the port, one session at a time.

A session is the life of one set of buffers: made and mapped before a client comes, offered to exactly one client, and
when that client goes, taken from the device (which is reset), counted, unmapped and thrown away. So nothing of one
client's is ever seen by the next. Frames move in the C core's pump; Python is here for everything that is not a frame:

    PREPARED ── client ready ──► SERVING ── client gone, device fault, stop ──► (session ended) ──► PREPARED or STOPPED
"""

from __future__ import annotations

import os
import select
from contextlib import ExitStack
from enum import Enum

import vfio
from netbridge.datapath._core import ffi, lib
from netbridge.errors import DeviceError, NetbridgeError
from netbridge.ipc.errors import Reason
from netbridge.ipc.geometry import DEFAULT_HEADROOM
from netbridge.ipc.messages import Facts
from netbridge.ipc.server import ClientGone, ClientReady, PortServer
from netbridge.ipc.session import PortSession, next_session
from netbridge.log import Log
from netbridge.metrics import DEVICE_FAULTS, REFUSALS
from netbridge.virtio import features
from netbridge.virtio.errors import Gone
from netbridge.virtio.net import NetDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

BUFFER_STRIDE = 2048
MAX_MERGED_BUFFERS = 34  # a 64 KiB frame and its header in buffers of 2 KiB, rounded up
BURST = 64


class Settings:
    """What can be chosen about a bridge. `rx_buffers`, `tx_buffers`: of 2 KiB each; `spin_us`: how long the pump polls
    after the last frame before it sleeps, microseconds; `rx_read_only`: the client may only read received frames;
    `share`: frame memory may be given to a client at all, without which every client is turned away."""

    def __init__(
        self,
        *,
        rx_buffers: int = 1024,
        tx_buffers: int = 512,
        spin_us: int = 0,
        rx_read_only: bool = False,
        share: bool = True,
    ) -> None:
        self.rx_buffers = rx_buffers
        self.tx_buffers = tx_buffers
        self.spin_us = spin_us
        self.rx_read_only = rx_read_only
        self.share = share

    def as_dict(self) -> dict[str, int]:
        """Plain data; `Settings(**data)` is the way back."""
        return dict(vars(self))

    @property
    def dma_bytes(self) -> int:
        """Memory for frames that one session maps for the device."""
        return (self.rx_buffers + self.tx_buffers) * BUFFER_STRIDE


class Stop(Enum):
    """Why a bridge stopped of its own accord."""

    SIGNAL = "it was told to"
    ORPHANED = "the monitor is gone"
    UNPLUG = "the device is to be unplugged"


class _Session:
    """One session's buffers, ledgers and pump. `close` needs the device to be out of service: the caller resets it
    between `stop_pump` and `close`."""

    def __init__(self, number: int, net: NetDevice, iommu: vfio.Iommu, settings: Settings) -> None:
        self.number = number
        self._net = net
        self._pump = ffi.NULL
        self._ledgers: dict[str, Any] = {}
        with ExitStack() as stack:
            self._rx = stack.enter_context(vfio.Memory.memfd(settings.rx_buffers * BUFFER_STRIDE, name="netbridge-rx"))
            self._tx = stack.enter_context(vfio.Memory.memfd(settings.tx_buffers * BUFFER_STRIDE, name="netbridge-tx"))
            self._rx_map = stack.enter_context(iommu.map(self._rx))
            # The device only reads what is sent.
            self._tx_map = stack.enter_context(iommu.map(self._tx, write=False))
            self.port = stack.enter_context(
                PortSession(
                    number,
                    self._rx,
                    self._tx,
                    rx_count=settings.rx_buffers,
                    tx_count=settings.tx_buffers,
                    stride=BUFFER_STRIDE,
                    rx_limit=settings.rx_buffers - min(net.rx.size, settings.rx_buffers // 2),
                    rx_read_only=settings.rx_read_only,
                )
            )
            self._stack = stack.pop_all()

    def start_pump(self, counters: Any, control_fd: int, spin_us: int) -> None:
        """Makes ledgers and pump, and fills the queues: everything before DRIVER_OK."""
        net, geometry = self._net, self.port.geometry
        self._ledgers = {
            "rx": self._new_ledger(self._rx, self._rx_map, geometry.rx, lib.NB_REGION_RX),
            "tx": self._new_ledger(self._tx, self._tx_map, geometry.tx, lib.NB_REGION_TX),
        }
        interrupts = net.interrupts
        config = ffi.new("struct nb_pump_config *")
        config.rx_queue, config.tx_queue = net.rx.handle, net.tx.handle
        config.rx_ledger, config.tx_ledger = self._ledgers["rx"], self._ledgers["tx"]
        self.port.place_rings(ffi, config)
        config.tx_header_iova = net.tx_header_iova
        config.net_header_bytes = net.facts.header_bytes
        config.rx_max_pieces = MAX_MERGED_BUFFERS if net.negotiation.has(features.MRG_RXBUF) else 1
        config.rx_client_limit = geometry.rx_limit
        config.burst = BURST
        config.spin_ns = spin_us * 1000
        config.rx_irq_fd, config.tx_irq_fd = net.rx.irq_fd, net.tx.irq_fd
        config.intx_fd, config.intx_unmask_fd = interrupts.intx_fd, interrupts.intx_unmask_fd
        config.isr_status = ffi.cast("volatile uint8_t *", net.isr_address)
        config.client_doorbell_fd = self.port.client_doorbell_fd
        config.driver_doorbell_fd = self.port.driver_doorbell_fd
        config.control_fd = control_fd
        config.counters = counters
        self._pump = lib.nb_pump_new(config)
        if self._pump == ffi.NULL:
            raise NetbridgeError(f"cannot make the pump: {os.strerror(ffi.errno)}")
        lib.nb_pump_prime(self._pump)

    def pump(self) -> tuple[int, int]:
        """Moves frames until something happens: (enum nb_event, detail)."""
        result = ffi.new("struct nb_pump_result *")
        lib.nb_pump_run(self._pump, result)
        return result.event, result.detail

    def stop_pump(self) -> dict[str, dict[str, int]]:
        """Frees pump and ledgers; returns who owned how many buffers of each region at that moment."""
        owned = {
            region: {
                owner: lib.nb_ledger_owned(ledger, number)
                for owner, number in (
                    ("driver", lib.NB_OWNER_DRIVER),
                    ("device", lib.NB_OWNER_DEVICE),
                    ("client", lib.NB_OWNER_CLIENT),
                )
            }
            for region, ledger in self._ledgers.items()
        }
        lib.nb_pump_free(self._pump)
        self._pump = ffi.NULL
        for ledger in self._ledgers.values():
            lib.nb_ledger_free(ledger)
        self._ledgers = {}
        return owned

    def close(self) -> None:
        """Unmaps the buffers from the device and this process. The client's own mapping, if it kept one, shows what was
        last in them and nothing that comes later."""
        self._stack.close()

    def _new_ledger(self, memory: vfio.Memory, mapping: vfio.DmaMapping, region: Any, region_id: int) -> Any:
        place = ffi.new(
            "struct nb_region *",
            {
                "base": ffi.cast("uint8_t *", memory.address),
                "iova": mapping.iova,
                "count": region.buffers,
                "stride": region.stride,
                "headroom": self.port.geometry.headroom,
                "session": self.number,
                "id": region_id,
            },
        )
        ledger = lib.nb_ledger_new(place)
        if ledger == ffi.NULL:
            raise MemoryError("no memory for a ledger")
        return ledger


class Bridge:
    """Serves clients of `server` with frames of `net` until something stops it.

    Owns its sessions only; everything it is given stays the caller's, and must be closed in the opposite order."""

    def __init__(
        self,
        net: NetDevice,
        iommu: vfio.Iommu,
        server: PortServer,
        counters: Any,
        log: Log,
        settings: Settings,
        *,
        stop_fd: int,
        ready: Callable[[], None] = lambda: None,
        request_fd: int | None = None,
        error_fd: int | None = None,
    ) -> None:
        """`stop_fd` becomes readable when the bridge is to stop: with a word to say so, or at its end because nobody is
        left to say it. `ready` is called once clients can be served. `request_fd` and `error_fd` are the device's
        request (unplug) and error interrupts where it has them."""
        self._net = net
        self._iommu = iommu
        self._server = server
        self._ready = ready
        self._counters = counters
        self._log = log
        self._settings = settings
        self._session: _Session | None = None
        self._number = int.from_bytes(os.urandom(2), "little")
        self._serving = False
        self._restart = False
        self._stop: Stop | None = None
        self._control_fd = -1
        self._sources: dict[int, Callable[[int], None]] = {server.fileno(): self._on_port, stop_fd: self._on_stop}
        if request_fd is not None:
            self._sources[request_fd] = self._on_request
        if error_fd is not None:
            self._sources[error_fd] = self._on_device_error
        if net.interrupts.config_fd >= 0:
            self._sources[net.interrupts.config_fd] = self._on_config_change

    def run(self) -> Stop:
        """Serves until stopped, and says why it stopped. The device is reset when this returns or raises."""
        with select.epoll() as control:
            self._control_fd = control.fileno()
            for fd in self._sources:
                control.register(fd, select.EPOLLIN)
            try:
                if self._settings.share:
                    self._prepare()
                self._ready()
                while self._stop is None:
                    if self._serving:
                        self._serve(control)
                    else:
                        self._handle(control, timeout=None)
                    if self._restart and self._stop is None:
                        self._end_session()
                        self._prepare()
                return self._stop
            finally:
                # A driver that goes against everybody's will comes back: its client should wait for it.
                meant = self._stop in (Stop.SIGNAL, Stop.UNPLUG)
                self._server.dismiss(Reason.SHUTDOWN if meant else Reason.FAILED)
                self._server.withdraw()
                self._end_session()

    # ---- Sessions -------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Makes the device ready to go, and a session for whoever comes."""
        self._restart = False
        self._net.configure()
        facts = self._net.facts
        room = BUFFER_STRIDE - DEFAULT_HEADROOM + facts.header_bytes
        if room < facts.smallest_rx_buffer:
            raise DeviceError(
                f"{self._net.name}: a frame of its MTU of {facts.mtu} does not fit one receive buffer ({room} bytes), "
                "and without MRG_RXBUF it cannot span several; use MRG_RXBUF, or give the device a smaller MTU"
            )
        self._server.update(Facts(facts.mac, mtu=facts.mtu, link_up=facts.link_up))
        self._number = next_session(self._number)
        self._session = _Session(self._number, self._net, self._iommu, self._settings)
        self._server.offer(self._session.port)
        self._log("prepared", session=self._number, mac=facts.mac_text, mtu=facts.mtu, link_up=facts.link_up)

    def _begin_serving(self, event: ClientReady) -> None:
        assert self._session is not None
        self._session.start_pump(self._counters, self._control_fd, self._settings.spin_us)
        self._net.start()
        self._counters.sessions += 1
        self._serving = True
        self._log("serving", session=event.session, client=event.peer.name, pid=event.peer.pid, uid=event.peer.uid)

    def _serve(self, control: select.epoll) -> None:
        """Frames flow in here."""
        assert self._session is not None
        event, detail = self._session.pump()
        if event == lib.NB_EVENT_CONTROL:
            self._handle(control, timeout=0)
        elif event == lib.NB_EVENT_CONFIG:
            self._look_at_config()
        elif event == lib.NB_EVENT_CLIENT_FAULT:
            self._log("client_refused", reason=REFUSALS[detail])
            self._server.dismiss(Reason.RING_FAULT, f"refused: {REFUSALS[detail]}")
            self._restart = True
        elif event == lib.NB_EVENT_DEVICE_FAULT:
            self._device_failed(DEVICE_FAULTS[detail])
        else:
            raise NetbridgeError(f"the pump stopped: {os.strerror(detail)}")

    def _end_session(self) -> None:
        """Takes the device out of service, accounts for every buffer, and throws the session away."""
        session, self._session = self._session, None
        if session is None:
            return
        was_serving, self._serving = self._serving, False
        buffers = session.stop_pump()
        try:
            self._net.reset()
        finally:
            session.close()
        if was_serving:
            self._counters.resets += 1
            self._log(
                "session_ended",
                session=session.number,
                **{f"{region}_{owner}": count for region, owners in buffers.items() for owner, count in owners.items()},
            )

    # ---- Events ---------------------------------------------------------------------------------------------------

    def _handle(self, control: select.epoll, timeout: float | None) -> None:
        for fd, _ in control.poll(timeout):
            self._sources[fd](fd)

    def _on_port(self, _fd: int) -> None:
        for event in self._server.handle():
            if isinstance(event, ClientReady):
                self._begin_serving(event)
            elif isinstance(event, ClientGone):
                self._log("client_gone", client=event.peer.name, reason=event.reason.words, text=event.text)
                # Its memory may still be mapped there: whatever it was welcomed to is not used again.
                self._restart = self._restart or event.session is not None
            else:
                self._log("client_turned_away", uid=event.peer.uid, reason=event.reason.words)

    def _on_stop(self, fd: int) -> None:
        self._stop = Stop.SIGNAL if os.read(fd, 64) else Stop.ORPHANED

    def _on_request(self, fd: int) -> None:
        os.eventfd_read(fd)
        self._log("device_request")
        self._stop = Stop.UNPLUG

    def _on_device_error(self, fd: int) -> None:
        os.eventfd_read(fd)
        raise DeviceError(
            f"{self._net.name}: the device reported an unrecoverable error; the kernel's log has more (AER)"
        )

    def _on_config_change(self, fd: int) -> None:
        os.eventfd_read(fd)
        self._look_at_config()

    def _look_at_config(self) -> None:
        """A configuration interrupt: the link may have changed, or the device asks for a reset (virtio 1.3 §2.1.2)."""
        try:
            if self._net.needs_reset():
                self._device_failed("needs_reset")
                return
        except Gone:
            self._stop = Stop.UNPLUG
            return
        facts = self._net.facts
        link_up = self._net.link_up()
        self._counters.link_changes += 1
        self._log("link", up=link_up)
        self._server.update(Facts(facts.mac, mtu=facts.mtu, link_up=link_up))

    def _device_failed(self, why: str) -> None:
        self._log("device_fault", reason=why)
        self._server.dismiss(Reason.DEVICE_RESET, f"the device is reset: {why}")
        self._restart = True
