"""A virtio network device over vhost-user, as a `Transport`: registers put together from requests.

Much of what a PCI device has, a vhost-user back-end has not: it moves frames, and the front-end plays the device
around it. So the status is kept here (and told to a back-end that wants to know), the MAC address and the MTU are what
the user says unless the back-end has a configuration of its own, and the link is up for as long as there is a back-end.
A control queue, too, would be the front-end's to serve; so there is none, and the one command that means something to a
back-end, how many queue pairs are in use (MQ), is answered here.

Rings are handed over when DRIVER_OK is set, memory whenever it changes; both only while the rings stand still.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence

import vfio
from netbridge.virtio import control, features
from netbridge.virtio.errors import Gone, Misbehaved, ResetTimeout, VectorRefused, WrongState
from netbridge.virtio.transport import RESET_DEADLINE_S, STATUS_OF_NOTHING, QueueSetup, Status, await_reset
from netbridge.virtio.vhost_user import messages
from netbridge.virtio.vhost_user.connection import ANSWER_SECONDS, Connection, Refused
from netbridge.virtio.vhost_user.memory import VhostMemory
from netbridge.virtio.vhost_user.messages import Protocol, Request

QUEUE_ENTRIES = 1024  # vhost-user does not tell; what QEMU uses at most
_KNOWN = sum(Protocol)
MOST_PAIRS = messages.MOST_VRINGS // 2


def _mask(*names: str) -> int:
    return sum(features.feature(name).mask for name in names)


# Never taken from a back-end: it would have addresses translated (ACCESS_PLATFORM), or wants a command, a queue, a
# notification or a register that there is not.
_NEVER = (
    messages.PROTOCOL_FEATURES
    | messages.LOG_ALL
    | _mask("ACCESS_PLATFORM", "CTRL_VQ", "NOTIFICATION_DATA", "NOTIF_CONFIG_DATA", "RING_RESET", "ADMIN_VQ", "SR_IOV")
    | features.mask_of(item for item in features.FEATURES if ("CTRL_VQ",) in item.requires)
)
_SET_PAIRS = struct.Struct("<BBH")  # class, command, and how many (virtio 1.3 §5.1.6.5.5)
# They say what the device's configuration holds, so they are worth what the configuration is worth.
_CONFIGURATION = _mask("MAC", "STATUS", "MTU", "SPEED_DUPLEX", "RSS", "HASH_REPORT", "STANDBY")
# struct virtio_net_config (virtio 1.3 §5.1.4), as far as mtu.
_MAC_OFFSET, _STATUS_OFFSET, _PAIRS_OFFSET, _MTU_OFFSET, _CONFIG_BYTES = 0, 6, 8, 10, 12


class VhostUser:
    """The transport. `name` is for messages; `memory` is what the back-end may reach, and stays the caller's. `mac`
    (six bytes) and `mtu` are the device's where the back-end has none of its own. `answer_seconds` bounds each request.

    It begins without a back-end, and may be without one again at any time: then everything a driver does raises Gone,
    but `reset`, which has nothing to do. `attach` gives it one. `on_hang_up` is called each time that one is lost.
    """

    def __init__(
        self,
        name: str,
        memory: VhostMemory,
        *,
        mac: bytes | None = None,
        mtu: int | None = None,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self.name = name
        self.on_hang_up: Callable[[], None] = lambda: None
        self._memory = memory
        self._mac = mac
        self._mtu = mtu
        self._answer_seconds = answer_seconds
        self._connection: Connection | None = None
        self._offered = 0
        self._protocol = Protocol(0)
        self._pairs = 1
        self._error = vfio.EventFd()
        self._kicks: dict[int, vfio.EventFd] = {}
        self._eventfds: tuple[int, ...] = ()
        self._stale_table = True
        self._forget()
        memory.changed = self._hand_over_memory

    def _forget(self) -> None:
        """What a reset takes with it."""
        self._status = 0
        self._agreed = 0
        self._broken = False  # the back-end reported an error on a ring
        self._queues: dict[int, QueueSetup] = {}
        self._started: list[int] = []
        self._enabled: set[int] = set()

    # ---- The back-end comes and goes

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def fileno(self) -> int:
        """The connection, to be watched: readable means `look`. Raises Gone."""
        return self._back_end().fileno()

    @property
    def error_fd(self) -> int:
        """An eventfd that the back-end writes to when a ring is broken; then call `look`."""
        return self._error.fileno()

    def attach(self, stream: socket.socket) -> None:
        """Takes over a connected socket, also when it fails, and agrees on the protocol. Raises Gone or Misbehaved."""
        self.hang_up()
        connection = Connection(stream, self.name, self._answer_seconds)
        try:
            self._greet(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._stale_table = True

    def _greet(self, connection: Connection) -> None:
        self._offered = connection.ask_u64(Request.GET_FEATURES)
        self._protocol = Protocol(0)
        self._pairs = 1
        if self._offered & messages.PROTOCOL_FEATURES:
            offered = connection.ask_u64(Request.GET_PROTOCOL_FEATURES)
            self._protocol = Protocol(offered & _KNOWN)
            connection.tell(Request.SET_PROTOCOL_FEATURES, messages.u64(self._protocol))
            connection.acknowledged = Protocol.REPLY_ACK in self._protocol
        if Protocol.MQ in self._protocol:
            # For a network device, these are pairs.
            self._pairs = connection.ask_u64(Request.GET_QUEUE_NUM)
            if not 1 <= self._pairs <= MOST_PAIRS:
                raise Misbehaved(f"{self.name}: the back-end has {self._pairs} queue pairs, not from 1 to {MOST_PAIRS}")
        connection.tell(Request.SET_OWNER)

    def look(self) -> bool:
        """After the connection or `error_fd` became readable: whether there still is a back-end. Raises Misbehaved when
        it said something it should not."""
        self._note_ring_errors()
        if self._connection is None:
            return False
        try:
            with _HangingUp(self):
                self._connection.look()
        except Gone:
            return False
        return True

    def hang_up(self) -> None:
        """Ends the connection, if there is one. Doing it twice is harmless."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._started = []
            self._enabled = set()
            self.on_hang_up()

    def _back_end(self) -> Connection:
        if self._connection is None:
            raise Gone(f"{self.name}: there is no back-end at the moment")
        return self._connection

    def _tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        with _HangingUp(self):
            self._back_end().tell(request, payload, fds)

    def _ask(self, request: Request, payload: bytes = b"", size: int | None = None) -> bytes:
        with _HangingUp(self):
            return self._back_end().ask(request, payload, size)

    # ---- Memory

    def _hand_over_memory(self) -> None:
        """Every change is told at once, so that what is unmapped is out of reach when `close` returns."""
        if self._started:
            raise WrongState(f"{self.name}: memory changes only while the device is out of service; reset it first")
        self._stale_table = True
        regions = self._memory.regions
        # Some back-ends refuse an empty table. It comes to that only when the last memory goes, in the end.
        if self._connection is None or not regions:
            return
        self._tell(Request.SET_MEM_TABLE, messages.memory_table(regions), [region.fd for region in regions])
        self._stale_table = False

    # ---- Transport: status

    def read_status(self) -> int:
        if self._connection is None:
            return STATUS_OF_NOTHING
        self._note_ring_errors()
        status = self._status
        if Protocol.STATUS in self._protocol and status:
            status = self._told_status()
        return status | (Status.NEEDS_RESET if self._broken else 0)

    def write_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        value &= ~Status.NEEDS_RESET
        added = value & ~self._status
        if added & Status.FEATURES_OK:
            self._tell(Request.SET_FEATURES, messages.u64(self._agreed_with_back_end()))
            if self._agreed & features.MTU.mask and Protocol.NET_MTU in self._protocol and self._mtu is not None:
                self._tell(Request.NET_SET_MTU, messages.u64(self._mtu))
        if added & Status.DRIVER_OK:
            self._start()
        self._status = value
        self._tell_status()

    def _tell_status(self) -> None:
        if Protocol.STATUS in self._protocol:
            self._tell(Request.SET_STATUS, messages.u64(self._status))

    def _note_ring_errors(self) -> None:
        if self._error.drain():
            self._broken = True

    def reset(self, deadline_s: float = RESET_DEADLINE_S) -> None:
        """Stops the rings, one after the other; each answer says that the back-end does not touch that ring any more. A
        back-end that is gone, or goes meanwhile, touches nothing; one that does not answer is hung up on."""
        packed = bool(self._agreed & features.feature("RING_PACKED").mask)
        try:
            if self._connection is not None:
                for index in tuple(self._started):
                    self._stop(index, packed=packed)
                self._started = []
                self._status = 0
                if Protocol.RESET_DEVICE in self._protocol:
                    self._tell(Request.RESET_DEVICE)
                if Protocol.STATUS in self._protocol:
                    self._tell_status()
                    await_reset(self._told_status, self.name, deadline_s)
        except Gone:
            pass
        except (Misbehaved, Refused, ResetTimeout):
            self.hang_up()
            raise
        finally:
            for eventfd in (self._error, *self._kicks.values()):
                eventfd.drain()
            self._forget()

    def _told_status(self) -> int:
        (told,) = messages.U64.unpack(self._ask(Request.GET_STATUS))
        if told >= STATUS_OF_NOTHING:
            raise Misbehaved(f"{self.name}: GET_STATUS: {told:#x} is no device status")
        return int(told)

    def _stop(self, index: int, *, packed: bool) -> None:
        answer = self._ask(Request.GET_VRING_BASE, messages.vring_state(index, 0))
        try:
            base = messages.parse_vring_base(answer, index)
        except Misbehaved as error:
            raise Misbehaved(f"{self.name}: GET_VRING_BASE: {error}") from None
        if not packed and base > 0xFFFF:
            raise Misbehaved(f"{self.name}: GET_VRING_BASE: ring {index} stopped at {base:#x}, beyond 16 bits")

    # ---- Transport: features and configuration

    def read_device_features(self) -> int:
        self._back_end()
        offered = self._offered & ~_NEVER
        if self._offered & features.MQ.mask and self._pairs > 1:
            offered |= features.MQ.mask | features.CTRL_VQ.mask
        if Protocol.CONFIG not in self._protocol:
            offered &= ~_CONFIGURATION
            if self._mac is not None:
                offered |= features.MAC.mask
            if self._mtu is not None:
                offered |= features.MTU.mask
        return offered

    def write_driver_features(self, accepted: int) -> None:
        self._agreed = accepted

    def _agreed_with_back_end(self) -> int:
        """Without what is only this front-end's. Bit 30 makes rings begin disabled, and is no virtio feature."""
        agreed = self._agreed & self._offered & ~features.CTRL_VQ.mask
        return agreed | self._offered & messages.PROTOCOL_FEATURES

    def read_config(self, offset: int, width: int) -> int:
        if Protocol.CONFIG in self._protocol:
            answer = self._ask(
                Request.GET_CONFIG,
                request := messages.config_request(offset, width),
                len(request),
            )
            try:
                return int.from_bytes(messages.parse_config(answer, offset, width), "little")
            except Misbehaved as error:
                raise Misbehaved(f"{self.name}: GET_CONFIG: {error}") from None
        config = bytearray(_CONFIG_BYTES)
        config[_MAC_OFFSET:_STATUS_OFFSET] = self._mac or bytes(6)
        config[_STATUS_OFFSET:_PAIRS_OFFSET] = (1).to_bytes(2, "little")
        config[_PAIRS_OFFSET:_MTU_OFFSET] = self._pairs.to_bytes(2, "little")
        config[_MTU_OFFSET:_CONFIG_BYTES] = (self._mtu or 0).to_bytes(2, "little")
        if offset + width > len(config):
            raise Misbehaved(f"{self.name}: vhost-user has no configuration at {offset} to {offset + width - 1}")
        return int.from_bytes(config[offset : offset + width], "little")

    def config_generation(self) -> int:
        return 0  # each field is read whole, and vhost-user tells of no changes

    # ---- Transport: queues

    @property
    def num_queues(self) -> int:
        return 2 * self._pairs

    def queue_max_size(self, index: int) -> int:
        return QUEUE_ENTRIES if index < self.num_queues else 0

    def queue_enabled(self, index: int) -> bool:
        return index in self._started

    def set_up_queue(self, index: int, setup: QueueSetup) -> int:
        """Nothing is told before DRIVER_OK."""
        self._queues[index] = setup
        return setup.vector

    def enable_queue(self, index: int) -> None:
        if index not in self._queues:
            raise WrongState(f"{self.name}: queue {index} is enabled before it is set up")

    def _start(self) -> None:
        """Hands every ring over. It starts with the first kick, and works once it is enabled."""
        if self._stale_table:
            self._hand_over_memory()
        packed = bool(self._agreed & features.feature("RING_PACKED").mask)
        for index, setup in sorted(self._queues.items()):
            self._started.append(index)
            self._tell(Request.SET_VRING_NUM, messages.vring_state(index, setup.size))
            self._tell(Request.SET_VRING_BASE, messages.vring_state(index, messages.first_base(packed=packed)))
            self._tell(
                Request.SET_VRING_ADDR,
                messages.vring_address(index, setup.descriptors, setup.device_area, setup.driver_area),
            )
            self._tell(Request.SET_VRING_ERR, messages.vring_file(index), [self._error.fileno()])
            has_call = setup.vector < len(self._eventfds)
            call = [self._eventfds[setup.vector]] if has_call else []
            self._tell(Request.SET_VRING_CALL, messages.vring_file(index, has_fd=has_call), call)
            self._tell(Request.SET_VRING_KICK, messages.vring_file(index), [self.notify_fd(index)])
        if self._offered & messages.PROTOCOL_FEATURES:
            for index in self._started:
                self._enable_ring(index, True)

    def _enable_ring(self, index: int, on: bool) -> None:
        if on != (index in self._enabled):
            self._tell(Request.SET_VRING_ENABLE, messages.vring_state(index, on))
            (self._enabled.add if on else self._enabled.discard)(index)

    @property
    def answers_commands(self) -> bool:
        return True

    def answer(self, command: bytes) -> int:
        """Knows one: how many queue pairs are to be used. Raises Gone, Misbehaved, Refused."""
        if len(command) != _SET_PAIRS.size:
            return control.ERR
        *kind, pairs = _SET_PAIRS.unpack(command)
        if kind != [4, 0] or not 1 <= pairs <= len(self._started) // 2:
            return control.ERR
        for index in self._started:
            self._enable_ring(index, index < 2 * pairs)
        return control.OK

    def reset_queue(self, index: int, deadline_s: float = RESET_DEADLINE_S) -> None:  # noqa: ARG002 - the protocol's
        raise Misbehaved(f"{self.name}: queue {index} cannot be reset alone: RING_RESET is never agreed")

    def notify(self, index: int, data: int | None = None) -> None:  # noqa: ARG002 - the protocol's
        os.eventfd_write(self.notify_fd(index), 1)

    def notify_address(self, index: int, width: int = 2) -> int:  # noqa: ARG002 - the protocol's
        return 0

    def notify_fd(self, index: int) -> int:
        if index not in self._kicks:
            self._kicks[index] = vfio.EventFd()
        return self._kicks[index].fileno()

    # ---- Transport: interrupts and the end

    @property
    def vectors(self) -> int:
        return 1 + self.num_queues  # as many as there is a use for: they are eventfds

    @property
    def isr_address(self) -> int:
        return 0

    def set_config_vector(self, vector: int) -> int:
        return vector

    def enable_vectors(self, eventfds: Sequence[int]) -> None:
        self._eventfds = tuple(eventfds)

    def enable_intx(self, eventfd: int, unmask_eventfd: int) -> None:  # noqa: ARG002 - the protocol's
        raise VectorRefused(f"{self.name}: vhost-user has no line interrupt, only an eventfd for each queue: use MSI-X")

    def disable_interrupts(self) -> None:
        self._eventfds = ()

    def allow_dma(self, allowed: bool) -> None:
        """A back-end has what it was handed for as long as it likes. To cut it off is to hang up."""
        if not allowed:
            self.hang_up()

    def close(self) -> None:
        self.hang_up()
        self._memory.changed = lambda: None
        self._error.close()
        while self._kicks:
            self._kicks.popitem()[1].close()


class _HangingUp:
    """When a request fails in a way that ended the connection, there is no back-end any more."""

    def __init__(self, transport: VhostUser) -> None:
        self._transport = transport

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None and not isinstance(error, Refused):
            self._transport.hang_up()
