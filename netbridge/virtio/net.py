"""The virtio network device: from whatever state it was found in to one that moves frames, and back.

`configure` and `start` are the initialisation sequence of virtio 1.3 §3.1.1, step by step; `reset` ends it. Which move
is allowed when is in states.py. What the steps are made of has rooms of its own: features.py what is agreed, facts.py
what the device says of itself, interrupts.py how it calls, queues.py where the queues are.

    with NetDevice(VirtioPci(dev), VfioDma(dev.iommu)) as net:
        net.configure()
        ...             # build the pump on net.rx and net.tx, and prime it
        net.start()     # frames flow
        net.reset()     # they have stopped; the pump must not run any more
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager

from netbridge.datapath._core import lib
from netbridge.virtio import commands, control, features
from netbridge.virtio.control import ControlQueue, QueuelessControl
from netbridge.virtio.dma import DmaAllocator, Piece
from netbridge.virtio.errors import FeaturesRefused, Gone, Misbehaved, NeedsReset, NotOffered, WrongState
from netbridge.virtio.facts import (
    LARGEST_PAIRS,
    LEAST_KEY,
    LEAST_TABLE,
    LinkState,
    NetFacts,
    made_up_mac,
    read_facts,
    read_link,
)
from netbridge.virtio.features import Feature
from netbridge.virtio.interrupts import CONFIG_VECTOR, InterruptMode, Interrupts, Wiring
from netbridge.virtio.negotiation import Negotiation, negotiate
from netbridge.virtio.queues import LARGEST_QUEUE, QueuePair, QueuePlan, QueueSet, VirtQueue
from netbridge.virtio.states import State, check_move
from netbridge.virtio.transport import (
    NO_VECTOR,
    RESET_DEADLINE_S,
    STATUS_OF_NOTHING,
    Status,
    Transport,
    describe_status,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Any, TypeVar

    from netbridge.virtio.commands import Command

    T = TypeVar("T")

__all__ = ["InterruptMode", "Interrupts", "NetDevice", "NetFacts", "QueuePair", "VirtQueue"]

DEFAULT_QUEUE = 256
# Segments of the usual chain in a receive and in a transmit queue: one buffer; header and frame, in a few buffers.
CHAINS = (1, 8)


class NetDevice:
    """One virtio network device. Not thread-safe.

    Takes over `transport`, also when it fails, and closes it in `close`; `memory` stays the caller's. `rx_size` and
    `tx_size` are the most entries to use of each queue, a power of two; the device may allow fewer. `most_pairs` is how
    many queue pairs to use if the device has as many. `wanted` comes from `features.select`; a device without those of
    `required` is refused. `tx_slots` is for how many sent frames there is private memory: a header, a short copy; as
    much follows for each entry of the transmit queues, for frames that are forwarded.
    `reset_deadline_s` and `control_deadline_s` are how long, in seconds, the device may take to reset and to answer a
    command.

    Whatever fails between `configure` and `start` sets FAILED, resets the device (or, when that fails too, cuts it off
    from memory), and leaves the state FAILED, from which `reset` and `configure` lead out.
    """

    def __init__(
        self,
        transport: Transport,
        memory: DmaAllocator,
        *,
        interrupts: InterruptMode = InterruptMode.MSIX,
        rx_size: int = DEFAULT_QUEUE,
        tx_size: int = DEFAULT_QUEUE,
        most_pairs: int = 1,
        wanted: Sequence[Feature] = features.SUPPORTED,
        required: Sequence[Feature] = features.REQUIRED,
        tx_slots: int = 1,
        reset_deadline_s: float = RESET_DEADLINE_S,
        control_deadline_s: float = control.DEADLINE_S,
    ) -> None:
        self.name = transport.name
        self.state = State.FOUND
        self._transport = transport
        self._turned_off = tuple(item for item in features.SUPPORTED if item not in wanted)
        single = () if most_pairs > 1 else features.STEERING
        self._wanted = tuple(item for item in wanted if item not in single)
        self._most_pairs = most_pairs
        self._required = tuple(required)
        self._sizes = (rx_size, tx_size)
        self._reset_deadline_s = reset_deadline_s
        self._control_deadline_s = control_deadline_s
        self._negotiation: Negotiation | None = None
        self._facts: NetFacts | None = None
        self._pairs: tuple[QueuePair, ...] = ()
        self._tx_slots_count = tx_slots
        self._tx_slots: Piece | None = None
        self._control: ControlQueue | QueuelessControl | None = None
        self._local_mac = made_up_mac()
        self._queues = QueueSet(transport, memory)
        try:
            for size in self._sizes:
                if not (1 <= size <= LARGEST_QUEUE and size & (size - 1) == 0):
                    raise ValueError(f"a queue of {size} entries: a power of two from 1 to {LARGEST_QUEUE} is expected")
            if not 1 <= most_pairs <= LARGEST_PAIRS:
                raise ValueError(f"{most_pairs} queue pairs: a number from 1 to {LARGEST_PAIRS} is expected")
            self._wiring = Wiring(interrupts, 2 * most_pairs)
        except BaseException:
            transport.close()
            raise
        self.interrupts = self._wiring.interrupts

    # ---- What it is -----------------------------------------------------------------------------------------------

    @property
    def negotiation(self) -> Negotiation:
        """The features, from `configure` on."""
        return self._from_configure(self._negotiation)

    @property
    def facts(self) -> NetFacts:
        """What the device is like, from `configure` on."""
        return self._from_configure(self._facts)

    @property
    def pairs(self) -> tuple[QueuePair, ...]:
        """The receive and transmit queues, in order of their numbers, from `configure` on."""
        return self._from_configure(self._pairs or None)

    @property
    def rx(self) -> VirtQueue:
        """The first receive queue, from `configure` on."""
        return self.pairs[0].rx

    @property
    def tx(self) -> VirtQueue:
        """The first transmit queue, from `configure` on."""
        return self.pairs[0].tx

    @property
    def tx_slots(self) -> Piece:
        """Private memory for the headers of sent frames and for short copies, zeroed by `configure`, from then on."""
        return self._from_configure(self._tx_slots)

    @property
    def offloads(self) -> int:
        """The agreed offloads as a bit mask, from `configure` on."""
        return self.negotiation.agreed & features.OFFLOAD_MASK

    def offloads_for(self, asked: int) -> int:
        """What `configure` with these offloads would agree on, going by what the device offered last time."""
        return self._negotiate(self.negotiation.offered, asked).agreed & features.OFFLOAD_MASK

    @property
    def isr_address(self) -> int:
        """Address in this process of the ISR status byte; reading it acknowledges INTx (§4.1.4.5)."""
        return self._transport.isr_address

    def needs_reset(self) -> bool:
        """Whether the device says that it has lost its way; the state is then NEEDS_RESET. Raises Gone.

        Ask after a configuration interrupt, which is how the device calls for it (§2.1.2).
        """
        if self._read_status() & Status.NEEDS_RESET and self.state in (State.CONFIGURED, State.LIVE):
            self._move(State.NEEDS_RESET)
        return self.state is State.NEEDS_RESET

    def link(self) -> LinkState:
        """The link as it is now. Ask after a configuration interrupt. Raises Misbehaved, ConfigUnstable."""
        return read_link(self._transport, self.negotiation)

    # ---- Into service ---------------------------------------------------------------------------------------------

    def configure(self, offloads: int = 0) -> None:
        """Steps 1 to 7 of the initialisation sequence (§3.1.1), all but filling the queues with buffers.

        `offloads` is a bit mask: of the offloads in `wanted` those that are asked for this time; others are left alone.
        Frees the queues of an earlier time. Raises a DeviceError, or vfio.VfioError where memory or interrupts are not
        to be had; WrongState while the device is in service.
        """
        if self.state not in (State.FOUND, State.RESET, State.FAILED):
            check_move(self.name, self.state, State.ACKNOWLEDGED)
        self.reset()  # 1
        with self._giving_up_on_error():
            self._set_status(Status.ACKNOWLEDGE)  # 2
            self._set_status(Status.DRIVER)  # 3
            self._move(State.ACKNOWLEDGED)
            self._agree_on_features(offloads)  # 4
            self._set_status(Status.FEATURES_OK)  # 5
            self._require_features_ok()  # 6
            self._move(State.NEGOTIATED)
            self._facts = read_facts(self._transport, self.negotiation, self._local_mac)  # 7: configuration,
            self._set_up_queues(self._connect_interrupts())  # interrupts, queues
            self._move(State.CONFIGURED)

    def start(self) -> None:
        """Step 8: the device goes into service, and is told of the receive buffers it was given before.

        Raises NeedsReset or Misbehaved when the device does not go along, WrongState unless it is configured.
        """
        check_move(self.name, self.state, State.LIVE)
        with self._giving_up_on_error():
            self._set_status(Status.DRIVER_OK)
            status = self._read_status()
            if not status & Status.DRIVER_OK:
                raise Misbehaved(f"{self.name}: DRIVER_OK was set, but the status reads {describe_status(status)}")
            self._move(State.LIVE)
            # No notification may be sent before DRIVER_OK (§3.1.1), so this one is owed.
            for pair in self.pairs:
                self._queues.notify(pair.rx)
            if len(self.pairs) > 1:
                self.command(self._steering())

    def reset_queue(self, queue: VirtQueue, empty: Callable[[Any], int]) -> int:
        """Takes one data queue away from the device and gives it back, empty and enabled (§2.6.1), while the others go
        on. Once the device has let go of it, `empty` takes back what was in flight, given the queue's handle: the C
        core's nb_pump_reset_queue. Returns what that does, how many chains it were. The pump must not run meanwhile.

        Raises NotOffered without RING_RESET, and WrongState unless the device is in service. After ResetTimeout and
        Misbehaved the whole device must be reset.
        """
        if self.state is not State.LIVE:
            raise WrongState(f"{self.name}: resetting a queue: the device is {self.state.name} ({self.state.value})")
        if not self.negotiation.has(features.RING_RESET):
            raise NotOffered(f"{self.name}: resetting a queue needs RING_RESET, which is not agreed with the device")
        return self._queues.reset(queue, empty, self._reset_deadline_s)

    def command(self, command: Command) -> None:
        """Has the device do something over its control queue, and waits for its answer; see commands.py.

        Raises NotOffered where the device lacks what it needs, ControlRefused when it says no, and WrongState unless it
        is in service. After ControlTimeout and Misbehaved the device must be reset.
        """
        if self.state is not State.LIVE:
            raise WrongState(f"{self.name}: {command.name}: the device is {self.state.name} ({self.state.value})")
        if self._control is None or not self.negotiation.has(command.needs):
            raise NotOffered(f"{self.name}: {command.name} needs {command.needs}, which is not agreed with the device")
        self._control.carry(command)

    def reset(self) -> None:
        """Take the device out of service: no queues, no features, no interrupts; it does not touch memory any more.

        Whatever uses the queues must have been freed. From every state but CLOSED. Raises ResetTimeout or Gone; the
        device is then cut off from memory and the state is FAILED.
        """
        self.halt()
        self._forget()

    def halt(self) -> None:
        """As `reset`, but the queues stay until the next `reset`, `configure` or `close`, for what the device has left
        in them to be taken out. They must not be added to."""
        check_move(self.name, self.state, State.RESET)
        try:
            self._transport.reset(self._reset_deadline_s)
            self._transport.disable_interrupts()
        except BaseException as error:
            self._move(State.FAILED)
            self._attempt(error, "cutting it off from memory", lambda: self._transport.allow_dma(False))
            raise
        self._wiring.drain()
        self._move(State.RESET)

    def close(self) -> None:
        """Reset the device unless it was never touched, cut it off from memory, and let go of everything.

        Whatever uses the queues must have been freed. Everything is let go of even when something fails; an error is
        raised in the end. Doing it twice is harmless.
        """
        if self.state is State.CLOSED:
            return
        with ExitStack() as last_to_first:
            last_to_first.callback(self._move, State.CLOSED)
            last_to_first.callback(self._let_go)
            last_to_first.callback(self._transport.disable_interrupts)
            last_to_first.callback(self._transport.allow_dma, False)
            if self.state is not State.FOUND:
                last_to_first.callback(self.reset)

    def __enter__(self) -> NetDevice:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<NetDevice {self.name} {self.state.name}>"

    # ---- The steps ------------------------------------------------------------------------------------------------

    def _negotiate(self, offered: int, offloads: int) -> Negotiation:
        wanted = [item for item in self._wanted if not item.mask & features.OFFLOAD_MASK & ~offloads]
        return negotiate(offered, wanted, self._required, turned_off=self._turned_off, device=self.name)

    def _agree_on_features(self, offloads: int) -> None:
        self._negotiation = self._negotiate(self._transport.read_device_features(), offloads)
        self._transport.write_driver_features(self._negotiation.agreed)

    def _require_features_ok(self) -> None:
        status = self._read_status()
        if not status & Status.FEATURES_OK:
            raise FeaturesRefused(
                f"{self.name}: the device offers these features but refuses to work with them "
                f"({', '.join(self.negotiation.names)}), status {describe_status(status)}; "
                "turn off those that can be until it agrees"
            )

    def _connect_interrupts(self) -> list[int]:
        """The data queues' vectors."""
        # An MSI-X interrupt is a write to memory, so it needs this too.
        self._transport.allow_dma(True)
        steers = self.negotiation.has(features.MQ) or self.negotiation.has(features.RSS)
        pairs = min(self._most_pairs, self.facts.max_queue_pairs) if steers else 1
        return self._wiring.connect(self._transport, 2 * pairs)

    def _set_up_queues(self, vectors: Sequence[int]) -> None:
        """Receive and transmit queues take turns, the control queue comes after the last the device has (§5.1.2)."""
        agreed = self.negotiation
        plans = [
            QueuePlan(number, self._sizes[number % 2], vector, self._wiring.fd_of(vector), CHAINS[number % 2])
            for number, vector in enumerate(vectors)
        ]
        forwarded = len(vectors) // 2 * self._sizes[1]
        extra = [(self._tx_slots_count + forwarded) * lib.NB_TX_SLOT_BYTES]
        has_control = agreed.has(features.CTRL_VQ) and not self._transport.answers_commands
        if has_control:
            steers = agreed.has(features.MQ) or agreed.has(features.RSS)
            number = 2 * (self.facts.max_queue_pairs if steers else 1)
            fds = self.interrupts
            vector = CONFIG_VECTOR if fds.mode is InterruptMode.MSIX else NO_VECTOR
            plans.append(QueuePlan(number, control.CONTROL_QUEUE_SIZE, vector, fds.config_fd, control.CHAIN))
            extra.append(ControlQueue.memory_bytes())
        self._tx_slots, *rest = self._queues.set_up(plans, agreed, extra)
        data = self._queues.queues[: len(vectors)]
        self._pairs = tuple(QueuePair(rx, tx) for rx, tx in zip(data[0::2], data[1::2], strict=True))
        if has_control:
            self._control = ControlQueue(
                self.name, self._queues.queues[-1], rest[0], self._await_answer, self._control_deadline_s
            )
        elif agreed.has(features.CTRL_VQ):
            self._control = QueuelessControl(self._transport)

    def _await_answer(self, seconds: float) -> None:
        self._wiring.await_answer(self._transport, seconds)

    def _steering(self) -> Command:
        """How received frames are to be shared out: by their hash through a table, or as the device sees fit."""
        pairs, limits = len(self.pairs), self.facts.rss
        if limits is None:
            return commands.queue_pairs(pairs)
        table = [entry % pairs for entry in range(LEAST_TABLE)]
        return commands.rss(pairs, limits.hash_types & commands.HASH_TYPES, os.urandom(LEAST_KEY), table)

    # ---- Odds and ends --------------------------------------------------------------------------------------------

    def _read_status(self) -> int:
        status = self._transport.read_status()
        if status == STATUS_OF_NOTHING:
            raise Gone(f"{self.name}: the device does not answer any more; it was unplugged or has lost power")
        return status

    def _set_status(self, bit: Status) -> None:
        """Add a bit; the driver never clears one (§2.1.1)."""
        status = self._read_status()
        if status & Status.NEEDS_RESET:
            raise NeedsReset(
                f"{self.name}: the device asks for a reset (status {describe_status(status)}) instead of taking "
                f"{bit.name}; the log of whatever provides it, such as QEMU's stderr, may say why"
            )
        self._transport.write_status(status | bit)

    def _move(self, state: State) -> None:
        check_move(self.name, self.state, state)
        self.state = state

    @contextmanager
    def _giving_up_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException) -> None:
        """Tell the device, then see to it that it leaves memory alone. Its queues stay until the next `reset`, because
        a pump may have been built on them."""
        self._move(State.FAILED)
        if not isinstance(error, Gone):
            self._attempt(
                error,
                "setting FAILED",
                lambda: self._transport.write_status(self._transport.read_status() | Status.FAILED),
            )
            if self._attempt(error, "resetting it", lambda: self._transport.reset(self._reset_deadline_s)):
                self._attempt(error, "disabling its interrupts", self._transport.disable_interrupts)
                return
        self._attempt(error, "cutting it off from memory", lambda: self._transport.allow_dma(False))

    def _attempt(self, error: BaseException, what: str, act: Any) -> bool:
        """Do something more after an error, which stays the one that is told; a second one is noted on it."""
        try:
            act()
        except Exception as second:
            error.add_note(f"{what} failed as well: {second}")
            return False
        return True

    def _from_configure(self, value: T | None) -> T:
        if value is None:
            raise WrongState(f"{self.name}: the device is {self.state.name} ({self.state.value}); configure it first")
        return value

    def _forget(self) -> None:
        """Free what was made for a configuration that is gone."""
        self._pairs = ()
        self._control = None
        self._queues.forget()
        self._tx_slots = None
        self._facts = None
        self._negotiation = None

    def _let_go(self) -> None:
        with ExitStack() as last_to_first:
            last_to_first.callback(self._transport.close)
            last_to_first.callback(self._wiring.close)
            last_to_first.callback(self._queues.close)
            last_to_first.callback(self._forget)
