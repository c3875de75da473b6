"""The virtio network device: from whatever state it was found in to one that moves frames, and back.

`configure` and `start` are the initialisation sequence of virtio 1.3 §3.1.1, step by step; `reset` ends it. What the
device says of itself is checked here and becomes plain data (`NetFacts`). Which move is allowed when is in states.py.
The queues themselves are the C core's (`netbridge.datapath`); here they get their memory and are made known to the
device.

    with NetDevice(VirtioPci(dev), VfioDma(dev.iommu)) as net:
        net.configure()
        ...             # build the pump on net.rx and net.tx, and prime it
        net.start()     # frames flow
        net.reset()     # they have stopped; the pump must not run any more
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from enum import Enum

import vfio
from netbridge.datapath._core import ffi, lib
from netbridge.virtio import features
from netbridge.virtio.dma import DmaAllocator, DmaBlock, Piece, Pieces, whole_pages
from netbridge.virtio.errors import (
    FeaturesRefused,
    Gone,
    Misbehaved,
    NeedsReset,
    QueueUnusable,
    VectorRefused,
    WrongState,
)
from netbridge.virtio.features import Feature, Negotiation
from netbridge.virtio.states import State, check_move
from netbridge.virtio.transport import (
    NO_VECTOR,
    RESET_DEADLINE_S,
    STATUS_OF_NOTHING,
    ConfigField,
    QueueSetup,
    Status,
    Transport,
    describe_status,
    read_consistently,
)
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Any, TypeVar

    T = TypeVar("T")

RX_QUEUE, TX_QUEUE = 0, 1  # receiveq1 and transmitq1 (§5.1.2)
CONFIG_VECTOR, RX_VECTOR, TX_VECTOR = 0, 1, 2
LARGEST_QUEUE = 32768  # entries of a split virtqueue (§2.7)
DEFAULT_QUEUE = 256

HEADER_BYTES = 12  # struct virtio_net_hdr with num_buffers, as VERSION_1 always has it (§5.1.6)
ETHERNET_HEADER_BYTES = 14
DEFAULT_MTU = 1500
SMALLEST_MTU = 68  # §5.1.4.1
LARGEST_PAIRS = 0x8000  # §5.1.4.1
LINK_UP = 1  # VIRTIO_NET_S_LINK_UP

# struct virtio_net_config (§5.1.4), as far as it is read.
MAC_FIELD = ConfigField("mac", 0, 1, 6)
STATUS_FIELD = ConfigField("status", 6, 2)
PAIRS_FIELD = ConfigField("max_virtqueue_pairs", 8, 2)
MTU_FIELD = ConfigField("mtu", 10, 2)


class InterruptMode(Enum):
    """How the device calls."""

    MSIX = "msix"  # three vectors: configuration, receive, transmit
    INTX = "intx"  # one line for all; the ISR status byte says what for


class Interrupts(NamedTuple):
    """The eventfds on which interrupts arrive. -1 where the mode has none. The network device owns them all and keeps
    them, the same ones, until it is closed."""

    mode: InterruptMode
    config_fd: int = -1
    rx_fd: int = -1
    tx_fd: int = -1
    intx_fd: int = -1
    intx_unmask_fd: int = -1  # written to by the driver, to have the line again


class NetFacts(NamedTuple):
    """What the device says of itself, checked, as of `configure`."""

    mac: bytes  # six bytes
    mac_is_local: bool  # the device gave none, so this one was made up (locally administered)
    mtu: int  # the device's, or 1500 where it names none
    link_up: bool  # True where the device does not tell (§5.1.4.2)
    max_queue_pairs: int
    header_bytes: int  # of the virtio header in front of every frame, both ways
    smallest_rx_buffer: int  # bytes, header included, that every receive buffer must have (§5.1.6.3.1)

    @property
    def mac_text(self) -> str:
        return self.mac.hex(":")

    @property
    def largest_frame(self) -> int:
        """Bytes of the longest untagged frame, Ethernet header included, that may be sent."""
        return self.mtu + ETHERNET_HEADER_BYTES


class VirtQueue:
    """A virtqueue that the device knows of. `handle` is the C core's `struct nb_virtqueue *`, owned by the network
    device and gone after its next `reset`, `configure` or `close`: free whatever uses it before."""

    def __init__(self, index: int, size: int, vector: int, handle: Any) -> None:
        self.index = index
        self.size = size  # entries
        self.vector = vector  # NO_VECTOR with INTx
        self.handle = handle


class NetDevice:
    """One virtio network device. Not thread-safe.

    Takes over `transport`, also when it fails, and closes it in `close`; `memory` stays the caller's. `rx_size` and
    `tx_size` are the most entries to use of each queue, a power of two; the device may allow fewer. `wanted` comes from
    `features.select`. `reset_deadline_s` is how long, in seconds, the device may take to reset.

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
        wanted: Sequence[Feature] = features.SUPPORTED,
        reset_deadline_s: float = RESET_DEADLINE_S,
    ) -> None:
        self.name = transport.name
        self.state = State.FOUND
        self._transport = transport
        self._memory = memory
        self._wanted = tuple(wanted)
        self._sizes = (rx_size, tx_size)
        self._reset_deadline_s = reset_deadline_s
        self._negotiation: Negotiation | None = None
        self._facts: NetFacts | None = None
        self._queues: list[VirtQueue] = []
        self._tx_header: Piece | None = None
        self._block: DmaBlock | None = None
        self._local_mac: bytes | None = None
        self._eventfds: list[vfio.EventFd] = []
        try:
            for size in self._sizes:
                if not (1 <= size <= LARGEST_QUEUE and size & (size - 1) == 0):
                    raise ValueError(f"a queue of {size} entries: a power of two from 1 to {LARGEST_QUEUE} is expected")
            self.interrupts = self._open_eventfds(interrupts)
        except BaseException:
            self._let_go()
            raise

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
    def rx(self) -> VirtQueue:
        """The receive queue, from `configure` on."""
        return self._from_configure(self._queues[RX_QUEUE] if self._queues else None)

    @property
    def tx(self) -> VirtQueue:
        """The transmit queue, from `configure` on."""
        return self._from_configure(self._queues[TX_QUEUE] if self._queues else None)

    @property
    def tx_header_iova(self) -> int:
        """Where the device sees `facts.header_bytes` of zeroes, the header of a frame that asks for no offload."""
        return self._from_configure(self._tx_header).iova

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

    def link_up(self) -> bool:
        """Whether the link is up now; True where the device does not tell (§5.1.4.2). Ask after a configuration
        interrupt. Raises ConfigUnstable."""
        if not self.negotiation.has(features.STATUS):
            return True
        (status,) = read_consistently(self._transport, [STATUS_FIELD])["status"]
        return bool(status & LINK_UP)

    # ---- Into service ---------------------------------------------------------------------------------------------

    def configure(self) -> None:
        """Steps 1 to 7 of the initialisation sequence (§3.1.1), all but filling the queues with buffers.

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
            self._agree_on_features()  # 4
            self._set_status(Status.FEATURES_OK)  # 5
            self._require_features_ok()  # 6
            self._move(State.NEGOTIATED)
            self._read_facts()  # 7: configuration, interrupts, queues
            self._connect_interrupts()
            self._set_up_queues()
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
            self._transport.notify(RX_QUEUE)

    def reset(self) -> None:
        """Take the device out of service: no queues, no features, no interrupts; it does not touch memory any more.

        Whatever uses the queues must have been freed. From every state but CLOSED. Raises ResetTimeout or Gone; the
        device is then cut off from memory and the state is FAILED.
        """
        check_move(self.name, self.state, State.RESET)
        try:
            self._transport.reset(self._reset_deadline_s)
            self._transport.disable_interrupts()
        except BaseException as error:
            self._move(State.FAILED)
            self._attempt(error, "cutting it off from memory", lambda: self._transport.allow_dma(False))
            raise
        for eventfd in self._eventfds:
            eventfd.drain()
        self._forget()
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

    def _agree_on_features(self) -> None:
        offered = self._transport.read_device_features()
        self._negotiation = features.negotiate(offered, self._wanted, device=self.name)
        self._transport.write_driver_features(self._negotiation.agreed)

    def _require_features_ok(self) -> None:
        status = self._read_status()
        if not status & Status.FEATURES_OK:
            raise FeaturesRefused(
                f"{self.name}: the device offers these features but refuses to work with them "
                f"({', '.join(self.negotiation.names)}), status {describe_status(status)}; "
                "turn off those that can be until it agrees"
            )

    def _read_facts(self) -> None:
        agreed = self.negotiation
        fields = []
        if agreed.has(features.MAC):
            fields.append(MAC_FIELD)
        if agreed.has(features.STATUS):
            fields.append(STATUS_FIELD)
        # For this one it is enough that it is offered: it is told, not used.
        if agreed.was_offered(features.MQ) or agreed.was_offered(features.RSS):
            fields.append(PAIRS_FIELD)
        if agreed.has(features.MTU):
            fields.append(MTU_FIELD)
        values = read_consistently(self._transport, fields) if fields else {}

        (link,) = values.get("status", (LINK_UP,))
        (pairs,) = values.get("max_virtqueue_pairs", (1,))
        (mtu,) = values.get("mtu", (DEFAULT_MTU,))
        if not 1 <= pairs <= LARGEST_PAIRS:
            raise Misbehaved(f"{self.name}: max_virtqueue_pairs is {pairs}, not from 1 to {LARGEST_PAIRS}")
        if mtu < SMALLEST_MTU:
            raise Misbehaved(
                f"{self.name}: its MTU is {mtu}, less than {SMALLEST_MTU}; turn off MTU to work without it"
            )
        mac = bytes(values["mac"]) if "mac" in values else self._made_up_mac()
        if mac[0] & 1 or not any(mac):
            raise Misbehaved(
                f"{self.name}: its MAC address {mac.hex(':')} belongs to no single station; turn off MAC to have one "
                "made up"
            )
        frame = max(mtu, DEFAULT_MTU) + ETHERNET_HEADER_BYTES
        self._facts = NetFacts(
            mac=mac,
            mac_is_local="mac" not in values,
            mtu=mtu,
            link_up=bool(link & LINK_UP),
            max_queue_pairs=pairs,
            header_bytes=HEADER_BYTES,
            smallest_rx_buffer=HEADER_BYTES if agreed.has(features.MRG_RXBUF) else HEADER_BYTES + frame,
        )

    def _made_up_mac(self) -> bytes:
        """A locally administered address (§5.1.4.2), the same for as long as this object lives."""
        if self._local_mac is None:
            random = os.urandom(6)
            self._local_mac = bytes([random[0] & 0xFC | 0x02]) + random[1:]
        return self._local_mac

    def _connect_interrupts(self) -> None:
        # An MSI-X interrupt is a write to memory, so it needs this too.
        self._transport.allow_dma(True)
        fds = self.interrupts
        if fds.mode is InterruptMode.INTX:
            self._transport.enable_intx(fds.intx_fd, fds.intx_unmask_fd)
            vector = NO_VECTOR
        else:
            eventfds = (fds.config_fd, fds.rx_fd, fds.tx_fd)
            if self._transport.vectors < len(eventfds):
                raise VectorRefused(
                    f"{self.name}: MSI-X needs {len(eventfds)} vectors (configuration, receive, transmit) and the "
                    f"device has {self._transport.vectors}; use INTx, or with QEMU add vectors={len(eventfds)} to its "
                    "-device option"
                )
            self._transport.enable_vectors(eventfds)
            vector = CONFIG_VECTOR
        self._require_vector("configuration changes", vector, self._transport.set_config_vector(vector))

    def _set_up_queues(self) -> None:
        """Virtqueue configuration (§4.1.5.1.3): sizes, then memory for both, then both queues."""
        sizes = tuple(self._choose_size(index, most) for index, most in enumerate(self._sizes))
        configs = [_queue_config(index, size) for index, size in enumerate(sizes)]
        layouts = [_layout(config) for config in configs]
        self._provide_memory(sum(whole_pages(layout.bytes) for layout in layouts) + whole_pages(HEADER_BYTES))
        assert self._block is not None
        pieces = Pieces(self._block)
        is_msix = self.interrupts.mode is InterruptMode.MSIX
        vectors = (RX_VECTOR, TX_VECTOR) if is_msix else (NO_VECTOR, NO_VECTOR)
        for index, (config, layout, vector) in enumerate(zip(configs, layouts, vectors, strict=True)):
            memory = pieces.take(layout.bytes)
            setup = QueueSetup(
                size=config.size,
                descriptors=memory.iova + layout.desc,
                driver_area=memory.iova + layout.driver,
                device_area=memory.iova + layout.device,
                vector=vector,
            )
            granted = self._transport.set_up_queue(index, setup)
            self._require_vector(f"queue {index}", vector, granted)
            config.memory = ffi.cast("void *", memory.address)
            config.iova = memory.iova
            config.notify = ffi.cast("volatile void *", self._transport.notify_address(index))
            handle = lib.nb_virtqueue_new(config)
            if handle == ffi.NULL:
                raise MemoryError(f"{self.name}: no memory for queue {index} of {config.size} entries")
            self._queues.append(VirtQueue(index, config.size, vector, handle))
        self._tx_header = pieces.take(HEADER_BYTES)
        for queue in self._queues:
            self._transport.enable_queue(queue.index)

    def _choose_size(self, index: int, most: int) -> int:
        queues = self._transport.num_queues
        if index >= queues:
            raise QueueUnusable(f"{self.name}: the device has {queues} virtqueues; a network device has 2 or more")
        largest = self._transport.queue_max_size(index)
        if largest == 0:
            raise QueueUnusable(f"{self.name}: the device says that queue {index} is not there (its size is 0)")
        if largest > LARGEST_QUEUE or largest & (largest - 1):
            raise QueueUnusable(
                f"{self.name}: queue {index} has {largest} entries; a split virtqueue has a power of two, "
                f"{LARGEST_QUEUE} at most (virtio 1.3 §2.7)"
            )
        if self._transport.queue_enabled(index):
            raise Misbehaved(f"{self.name}: queue {index} is enabled although the device was just reset")
        return min(largest, most)

    def _require_vector(self, what: str, vector: int, granted: int) -> None:
        if granted != vector:
            asked, taken = ("no vector" if number == NO_VECTOR else f"vector {number}" for number in (vector, granted))
            raise VectorRefused(
                f"{self.name}: for {what} the device was given {asked} and took {taken} (§4.1.5.1.2); try INTx"
            )

    def _provide_memory(self, size: int) -> None:
        """One zeroed block of at least `size` bytes; that of an earlier time again if it is large enough."""
        if self._block is not None and self._block.size < size:
            block, self._block = self._block, None
            block.close()
        if self._block is None:
            self._block = self._memory.allocate(size)
        self._block.view[:] = bytes(self._block.size)

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

    def _open_eventfds(self, mode: InterruptMode) -> Interrupts:
        names = ("config_fd", "rx_fd", "tx_fd") if mode is InterruptMode.MSIX else ("intx_fd", "intx_unmask_fd")
        for _ in names:
            self._eventfds.append(vfio.EventFd())
        return Interrupts(mode, **{name: fd.fileno() for name, fd in zip(names, self._eventfds, strict=True)})

    def _forget(self) -> None:
        """Free what was made for a configuration that is gone."""
        while self._queues:
            lib.nb_virtqueue_free(self._queues.pop().handle)
        self._tx_header = None
        self._facts = None
        self._negotiation = None

    def _let_go(self) -> None:
        with ExitStack() as last_to_first:
            last_to_first.callback(self._transport.close)
            for eventfd in self._eventfds:
                last_to_first.callback(eventfd.close)
            if self._block is not None:
                last_to_first.callback(self._block.close)
            last_to_first.callback(self._forget)


def _queue_config(index: int, size: int) -> Any:
    """A `struct nb_virtqueue_config`, but for what follows from where the queue's memory is."""
    return ffi.new("struct nb_virtqueue_config *", {"index": index, "size": size, "kick_fd": -1})


def _layout(config: Any) -> Any:
    layout = ffi.new("struct nb_virtqueue_layout *")
    if lib.nb_virtqueue_layout(config, layout):
        raise ValueError(f"a virtqueue of {config.size} entries")
    return layout
