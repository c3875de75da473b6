"""The bridge: ties the network device to the port, one session at a time.

A session is the life of one set of buffers: made and mapped before a client comes, offered to exactly one client, and
when that client goes, taken from the device (which is reset), counted, unmapped and thrown away. So nothing of one
client's is ever seen by the next. Frames move in the C core's pump; Python is here for everything that is not a frame:

    IDLE ──► PREPARED ── client ready ──► SERVING ── client gone, stop ──► IDLE
                                           │   ▲
                        device has failed ─▼   │ as before
                                          RECOVERING ── in vain ──► IDLE
"""

from __future__ import annotations

import os
import select
from enum import Enum

from netbridge import device_state
from netbridge.datapath._core import lib
from netbridge.errors import DeviceError, NetbridgeError
from netbridge.ipc.errors import Reason
from netbridge.ipc.messages import Facts
from netbridge.ipc.requests import Filter, Mac, Verdict
from netbridge.ipc.server import ClientAsks, ClientGone, ClientReady, ClientWaits, PortServer
from netbridge.ipc.session import next_session
from netbridge.log import Log
from netbridge.metrics import DEVICE_FAULTS, REFUSALS, client_row
from netbridge.phases import Phase, check_move
from netbridge.recovery import Cause, Recovery
from netbridge.session import AddressSpace, Session, Settings
from netbridge.station import FATAL, Station
from netbridge.virtio import commands
from netbridge.virtio.errors import ControlRefused, ControlTimeout, Gone, Misbehaved
from netbridge.virtio.facts import LinkState
from netbridge.virtio.net import NetDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol
else:
    Protocol = object


class Stop(Enum):
    """Why a bridge stopped of its own accord."""

    SIGNAL = "it was told to"
    ORPHANED = "the monitor is gone"
    UNPLUG = "the device is to be unplugged"


class Link(Protocol):
    """The way to a device that comes and goes without its driver's end."""

    @property
    def there(self) -> bool:
        """Whether the device is there, as far as is known."""

    def fileno(self) -> int:
        """Readable when `attend` has something to see to."""

    def attend(self) -> bool:
        """Whether the device is there now. Raises DeviceError when it is not to be had any more."""


class Bridge:
    """Serves clients of `server` with frames of `net` until something stops it.

    Owns its sessions only; everything it is given stays the caller's, and must be closed in the opposite order."""

    def __init__(
        self,
        net: NetDevice,
        iommu: AddressSpace,
        server: PortServer,
        counters: Any,
        log: Log,
        settings: Settings,
        *,
        stop_fd: int,
        ready: Callable[[], None] = lambda: None,
        request_fd: int | None = None,
        error_fd: int | None = None,
        link: Link | None = None,
    ) -> None:
        """`stop_fd` becomes readable when the bridge is to stop: with a word to say so, or at its end because nobody is
        left to say it. `ready` is called once clients can be served. `request_fd` and `error_fd` are the device's
        request (unplug) and error interrupts where it has them; `link` is for a device that may be gone and come back:
        each time the session ends, and the next one begins when it is there again."""
        self._net = net
        self._iommu = iommu
        self._server = server
        self._link = link
        self._ready = ready
        self._counters = counters
        self._log = log
        self._settings = settings
        self._session: Session | None = None
        self._station: Station | None = None
        # What the next session is prepared for: what the client that waits can take, or what the last one could.
        self._offloads = 0
        server.agree = net.offloads_for
        self._number = int.from_bytes(os.urandom(2), "little")
        self._link_state = LinkState()
        self._recovery = Recovery(net, counters, log, queue_reset=settings.queue_reset)
        self._phase = Phase.IDLE
        self._failure: Cause | None = None  # the device is to be reset under the session
        self._restart = False  # the session is to end
        self._forfeited = False  # by its client
        self._stop: Stop | None = None
        self._control_fd = -1
        self._sources: dict[int, Callable[[int], None]] = {server.fileno(): self._on_port, stop_fd: self._on_stop}
        if request_fd is not None:
            self._sources[request_fd] = self._on_request
        if error_fd is not None:
            self._sources[error_fd] = self._on_device_error
        if link is not None:
            self._sources[link.fileno()] = self._on_link
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
                    if self._phase is Phase.SERVING:
                        self._serve(control)
                    else:
                        self._handle(control, timeout=None)
                    if self._failure is not None and not self._restart and self._stop is None:
                        self._recover(self._failure)
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
        """Makes the device ready to go, and a session for whoever comes, unless there is no device at the moment."""
        self._restart, self._forfeited, self._failure = False, False, None
        try:
            if self._link is None or self._link.there:
                self._make_session()
        except DeviceError as error:
            self._wait_for_link(error)
            # It may have been configured already when it was lost.
            device_state.withdraw(self._counters)
            self._net.reset()
        if self._session is None:
            self._server.withdraw()

    def _make_session(self) -> None:
        asked = self._server.asked
        if asked is not None:
            self._offloads = asked
        self._net.configure(self._offloads)
        facts = self._net.facts
        self._tell(facts.link)
        self._number = next_session(self._number)
        self._session = Session(self._number, self._net, self._iommu, self._settings)
        self._enter(Phase.PREPARED)
        self._server.offer(self._session.port)
        self._log("prepared", session=self._number, mac=facts.mac_text, mtu=facts.mtu, link_up=facts.link.up)

    def _begin_serving(self, event: ClientReady) -> None:
        assert self._session is not None
        client = client_row(self._counters, event.peer.name)
        self._session.start_pump(self._counters, client, self._control_fd)
        station = Station(self._net)
        try:
            self._net.start()
            station.begin()
        except DeviceError as error:
            self._wait_for_link(error)
            self._give_up("gone")
            return
        self._station = station
        self._counters.sessions += 1
        client.sessions += 1
        self._enter(Phase.SERVING)
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
            self._restart = self._forfeited = True
        elif event == lib.NB_EVENT_DEVICE_FAULT:
            cause = Cause.STALLED if detail == lib.NB_FAULT_STALLED else Cause.FAULT
            self._device_failed(cause, DEVICE_FAULTS[detail])
        else:
            raise NetbridgeError(f"the pump stopped: {os.strerror(detail)}")

    def _end_session(self) -> None:
        """Takes the device out of service, accounts for every buffer, and throws the session away."""
        session, self._session = self._session, None
        if session is None:
            return
        self._station = None
        was_serving = self._phase is not Phase.PREPARED
        self._enter(Phase.IDLE)
        buffers = session.stop_pump()
        device_state.withdraw(self._counters)
        try:
            self._net.reset()
        except DeviceError as error:
            self._wait_for_link(error)
        finally:
            session.close(forfeited=self._forfeited)
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
            if isinstance(event, ClientWaits):
                self._restart = True
            elif isinstance(event, ClientReady):
                self._begin_serving(event)
            elif isinstance(event, ClientGone):
                self._log("client_gone", client=event.peer.name, reason=event.reason.words, text=event.text)
                # Its memory may still be mapped there: whatever it was welcomed to is not used again.
                self._restart = self._restart or event.session is not None
                self._forfeited = self._forfeited or event.session is not None
            elif isinstance(event, ClientAsks):
                self._on_client_asks(event.request)
            else:
                self._log("client_turned_away", uid=event.peer.uid, reason=event.reason.words)

    def _on_client_asks(self, request: Filter | Mac) -> None:
        station = self._station
        if station is None or self._restart or self._failure is not None:
            self._server.answer(request, Verdict.FAILED, "the device is out of service")
            return
        try:
            verdict, text = station.ask(request)
        except FATAL as error:
            self._server.answer(request, Verdict.FAILED, "the device did not answer as it should; it is reset")
            self._device_failed(Cause.CONTROL, error)
            return
        self._log("client_asked", what=type(request).__name__.lower(), verdict=verdict.name.lower(), why=text)
        # A new MAC address is in the client's facts before the answer.
        self._tell(self._link_state)
        self._server.answer(request, verdict, text)

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

    def _on_link(self, _fd: int) -> None:
        """The device came, went, or complains."""
        assert self._link is not None
        there = self._link.attend()
        if self._session is None:
            self._restart = there and self._settings.share
            return
        try:
            if there and not self._net.needs_reset():
                return
        except (Gone, Misbehaved):
            there = False
        if there:
            self._device_failed(Cause.NEEDS_RESET)
        else:
            self._give_up("gone")

    def _wait_for_link(self, error: DeviceError) -> None:
        """A device that was lost and may come back is waited for; everything else stays the error that it is."""
        if self._link is None or self._link.there:
            raise error
        self._log("device_gone", why=error)

    def _on_config_change(self, fd: int) -> None:
        os.eventfd_read(fd)
        self._look_at_config()

    def _look_at_config(self) -> None:
        """A configuration interrupt: the link may have changed, or the device asks for a reset (virtio 1.3 §2.1.2)."""
        try:
            if self._net.needs_reset():
                self._device_failed(Cause.NEEDS_RESET)
                return
        except Gone:
            self._device_is_gone()
            return
        try:
            link = self._net.link()
            if link.announce and self._phase is Phase.SERVING and self._failure is None:
                self._net.command(commands.announced())
        except ControlRefused as error:
            self._log("announcement_refused", why=error)
        except ControlTimeout as error:
            self._device_failed(Cause.CONTROL, error)
            return
        except Misbehaved as error:
            self._device_failed(Cause.CONFIG, error)
            return
        if link != self._link_state:
            self._counters.link_changes += link.up != self._link_state.up
            self._log("link", up=link.up, speed_mbps=link.speed_mbps, announce=link.announce)
            self._tell(link)

    def _tell(self, link: LinkState) -> None:
        """Has the client, and whoever comes next, know of the link."""
        self._link_state = link._replace(announce=False)
        facts = self._net.facts
        mac = self._station.mac if self._station is not None else facts.mac
        device_state.publish(self._counters, self._net, link, mac)
        self._server.update(Facts(mac, facts.mtu, link.up, link.speed_mbps, link.announce))

    # ---- A device that fails --------------------------------------------------------------------------------------

    def _device_failed(self, cause: Cause, why: object = "") -> None:
        """The device must be reset: under the session as soon as this turn of the loop is over, or with it."""
        self._log("device_fault", reason=cause.name.lower(), why=why)
        if self._phase is Phase.SERVING:
            self._failure = cause
        else:
            self._give_up(cause.name.lower())

    def _device_is_gone(self) -> None:
        """It does not answer any more: for good, unless there is a way by which it may come back."""
        if self._link is None:
            self._stop = Stop.UNPLUG
        else:
            self._give_up("gone")

    def _recover(self, cause: Cause) -> None:
        """Has the session go on with a device that was reset, or ends it."""
        assert self._session is not None
        assert self._station is not None
        self._failure = None
        self._enter(Phase.RECOVERING)
        try:
            recovered = self._recovery.attempt(self._session, self._station, cause, self._offloads)
        except Gone:
            self._device_is_gone()
            return
        if recovered:
            self._enter(Phase.SERVING)
            self._tell(self._net.facts.link)
        else:
            self._give_up(cause.name.lower())

    def _give_up(self, why: str) -> None:
        """The session ends, and the next begins with a device that was reset."""
        self._server.dismiss(Reason.DEVICE_RESET, f"the device is reset: {why}")
        self._restart = True

    def _enter(self, phase: Phase) -> None:
        check_move(self._phase, phase)
        self._phase = phase
