"""One session's buffers, ledgers and pump, on one network device.

A session is the life of one set of buffers: made and mapped before a client comes, offered to exactly one client, and
when that client goes, counted, unmapped and thrown away. What begins it and ends it is the bridge's business.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack

import vfio
from netbridge.datapath._core import ffi, lib
from netbridge.errors import DeviceError, NetbridgeError
from netbridge.ipc.geometry import DEFAULT_HEADROOM, STRIDE_ALIGNMENT
from netbridge.ipc.offloads import RX_SEGMENTATION, TX_SEGMENTATION
from netbridge.ipc.regions import discard, new_memfd
from netbridge.ipc.session import PortSession
from netbridge.virtio import features
from netbridge.virtio.net import NetDevice
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, Self
else:
    Protocol = object

BUFFER_STRIDE = 2048
# Where frames of 64 KiB come and go: what a buffer costs, it costs half as often.
UNCUT_STRIDE = 4096
MAX_MERGED_BUFFERS = 34  # a 64 KiB frame and its header in buffers of 2 KiB, rounded up
# Two virtqueues of 256 entries, their indirect tables, and copies of what is forwarded, with room.
QUEUE_PAIR_BYTES = 1 << 18
BURST = 64
STALL_MS = 5000  # what Linux gives a network device
LEAST_RX_BUFFERS = 4
ETHERNET_BYTES = 22  # its header and two VLAN tags
LARGEST_PACKET = 65535  # that IP can say of itself
# Asked while there is no sandbox yet.
ONE_PROCESSOR = len(os.sched_getaffinity(0)) == 1


def stride_for(smallest: int, header_bytes: int, uncut: bool = False) -> int:
    """Bytes from one receive buffer to the next, when each must have room for `smallest` bytes, header included.
    `uncut`: frames can be as long as an IP packet."""
    needed = DEFAULT_HEADROOM - header_bytes + smallest
    return max(UNCUT_STRIDE if uncut else BUFFER_STRIDE, -(-needed // STRIDE_ALIGNMENT) * STRIDE_ALIGNMENT)


def largest_to_send(mtu: int, offloads: int) -> int:
    """Bytes of the longest frame that a client may send."""
    return ETHERNET_BYTES + (LARGEST_PACKET if offloads & TX_SEGMENTATION else mtu)


def _memory(buffers: int, name: str) -> vfio.Memory:
    size = -(-buffers * BUFFER_STRIDE // mmap.PAGESIZE) * mmap.PAGESIZE
    return vfio.Memory.from_fd(new_memfd(name, size), name=name)


class Settings:
    """What can be chosen about a bridge.

    `rx_buffers`, `tx_buffers`: of 2 KiB each (where frames want larger ones, so many fewer of them).
    `spin_us`: how long the pump polls at most after the last frame before it sleeps, microseconds. `queue_pairs`: how
    many to use if the device has as many. `stall_ms`: a device that has frames to send and sends none for so long, in
    milliseconds, is taken for stuck and reset (0: never). `queue_reset`: of such a device only the queue, if it can and
    that helps. `rx_read_only`: the client may only read received frames. `tx_header_with_frame`: it is trusted with the
    header of a sent frame that asks for nothing, which then takes no descriptor of its own.
    `share`: frame memory may be given to a client at all, without which every client is turned away.
    """

    def __init__(
        self,
        *,
        rx_buffers: int = 1024,
        tx_buffers: int = 512,
        spin_us: int = 0,
        queue_pairs: int = 1,
        stall_ms: int = STALL_MS,
        queue_reset: bool = False,
        rx_read_only: bool = False,
        tx_header_with_frame: bool = False,
        share: bool = True,
    ) -> None:
        self.rx_buffers = rx_buffers
        self.tx_buffers = tx_buffers
        self.spin_us = spin_us
        self.queue_pairs = queue_pairs
        self.stall_ms = stall_ms
        self.queue_reset = queue_reset
        self.rx_read_only = rx_read_only
        self.tx_header_with_frame = tx_header_with_frame
        self.share = share

    def as_dict(self) -> dict[str, int]:
        """Plain data; `Settings(**data)` is the way back."""
        return dict(vars(self))

    @property
    def tx_slots(self) -> int:
        """Slots for headers of sent frames and copies of short ones: one for each buffer, and one for all others that
        ask for nothing."""
        return 1 + self.tx_buffers

    @property
    def dma_bytes(self) -> int:
        """All that is mapped for the device: memory for frames, copies of short ones among them, and the virtqueues."""
        frames = (self.rx_buffers + self.tx_buffers) * BUFFER_STRIDE + self.tx_slots * int(lib.NB_TX_SLOT_BYTES)
        return frames + self.queue_pairs * QUEUE_PAIR_BYTES


class _Promises(NamedTuple):
    """What a client was told of the device when its session began, and relies on."""

    pairs: int
    offloads: int
    header_bytes: int
    merges: bool
    mtu: int

    @classmethod
    def of(cls, net: NetDevice) -> _Promises:
        facts = net.facts
        merges = net.negotiation.has(features.MRG_RXBUF)
        return cls(len(net.pairs), net.offloads, facts.header_bytes, merges, facts.mtu)

    def broken_by(self, now: _Promises) -> str:
        """What is not as it was, in words; empty when all is."""
        for name, was, has in zip(self._fields, self, now, strict=True):
            # A larger MTU is no loss.
            if has != was and not (name == "mtu" and has > was):
                return f"{name.replace('_', ' ')} {has} instead of {was}"
        return ""


class AddressSpace(Protocol):
    """What maps memory for the device: a `vfio.Iommu`, or what stands in for it where the device is a process."""

    def map(self, memory: vfio.Memory, *, read: bool = True, write: bool = True) -> Mapping: ...


class Mapping(Protocol):
    """Memory that the device reaches at `iova`; leaving the context unmaps it."""

    @property
    def iova(self) -> int: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class Session:
    """One session's buffers, ledgers and pump. `close` needs the device to be out of service: the caller resets it
    between `stop_pump` and `close`."""

    def __init__(self, number: int, net: NetDevice, iommu: AddressSpace, settings: Settings) -> None:
        self.number = number
        self._settings = settings
        self._net = net
        self._pump = ffi.NULL
        self._ledgers: dict[str, Any] = {}
        self._promised = _Promises.of(net)
        self.is_salvaged = False
        uncut = bool(net.offloads & RX_SEGMENTATION) and settings.rx_buffers >= 2 * LEAST_RX_BUFFERS
        rx_stride = stride_for(net.facts.smallest_rx_buffer, net.facts.header_bytes, uncut)
        rx_buffers = settings.rx_buffers * BUFFER_STRIDE // rx_stride
        if rx_buffers < LEAST_RX_BUFFERS:
            needed = -(-LEAST_RX_BUFFERS * rx_stride // BUFFER_STRIDE)
            raise DeviceError(
                f"{net.name}: without MRG_RXBUF a frame of up to {net.facts.smallest_rx_buffer} bytes takes a receive "
                f"buffer of its own, and there is memory for {rx_buffers} of them; use MRG_RXBUF, or give it "
                f"{needed} receive buffers of {BUFFER_STRIDE} bytes or more"
            )
        tx_stride = UNCUT_STRIDE if net.offloads & TX_SEGMENTATION else BUFFER_STRIDE
        tx_buffers = max(settings.tx_buffers * BUFFER_STRIDE // tx_stride, 1)
        tx_pieces = min(lib.NB_MOST_PIECES, tx_buffers, *(pair.tx.size - 1 for pair in net.pairs))
        with ExitStack() as stack:
            # Sealed by the port session, which knows how, once everybody who may write has mapped it.
            self._rx = stack.enter_context(_memory(settings.rx_buffers, "netbridge-rx"))
            self._tx = stack.enter_context(_memory(settings.tx_buffers, "netbridge-tx"))
            # The device only reads what is sent.
            self._tx_map = stack.enter_context(iommu.map(self._tx, write=False))
            # The last to be mapped and the first to be unmapped: a vhost-user back-end maps what is left anew each
            # time, and cannot once the memory is sealed against being mapped for writing.
            self._rx_map = stack.enter_context(iommu.map(self._rx))
            self.port = stack.enter_context(
                PortSession(
                    number,
                    self._rx,
                    self._tx,
                    rx_count=rx_buffers,
                    tx_count=tx_buffers,
                    stride=tx_stride,
                    rx_stride=rx_stride,
                    rx_limit=rx_buffers - min(sum(pair.rx.size for pair in net.pairs), rx_buffers // 2),
                    rx_read_only=settings.rx_read_only,
                    tx_largest=largest_to_send(net.facts.mtu, net.offloads),
                    tx_pieces=tx_pieces,
                    offloads=net.offloads,
                    queue_pairs=len(net.pairs),
                )
            )
            self._stack = stack.pop_all()

    def start_pump(self, counters: Any, client_counters: Any, control_fd: int) -> None:
        """Makes ledgers and pump, and fills the queues: everything before DRIVER_OK. `client_counters` is the client's
        own row of `counters`."""
        net, geometry = self._net, self.port.geometry
        self._ledgers = {
            "rx": self._new_ledger(self._rx, self._rx_map, geometry.rx, lib.NB_REGION_RX),
            "tx": self._new_ledger(self._tx, self._tx_map, geometry.tx, lib.NB_REGION_TX),
        }
        interrupts = net.interrupts
        config = ffi.new("struct nb_pump_config *")
        _place_pairs(config.pairs, net)
        config.pair_count = len(net.pairs)
        config.rx_ledger, config.tx_ledger = self._ledgers["rx"], self._ledgers["tx"]
        self.port.place_rings(ffi, config)
        config.tx_slots = ffi.cast("uint8_t *", net.tx_slots.address)
        config.tx_slots_iova = net.tx_slots.iova
        config.tx_copied = lib.NB_TX_MOST_COPIED
        config.tx_header_with_frame = self._settings.tx_header_with_frame
        config.offloads = net.offloads
        config.net_header_bytes = net.facts.header_bytes
        config.rx_max_pieces = MAX_MERGED_BUFFERS if net.negotiation.has(features.MRG_RXBUF) else 1
        config.rx_client_limit = geometry.rx_limit
        config.tx_max_pieces = geometry.tx_pieces
        config.tx_largest_frame = geometry.tx_largest
        config.burst = BURST
        config.spin_ns = self._settings.spin_us * 1000
        config.yields = ONE_PROCESSOR
        config.stall_ns = self._settings.stall_ms * 1_000_000
        config.intx_fd, config.intx_unmask_fd = interrupts.intx_fd, interrupts.intx_unmask_fd
        config.isr_status = ffi.cast("volatile uint8_t *", net.isr_address)
        config.client_doorbell_fd = self.port.client_doorbell_fd
        config.driver_doorbell_fd = self.port.driver_doorbell_fd
        config.control_fd = control_fd
        config.counters = counters
        config.client_counters = client_counters
        self._pump = lib.nb_pump_new(config)
        if self._pump == ffi.NULL:
            raise NetbridgeError(f"cannot make the pump: {os.strerror(ffi.errno)}")
        lib.nb_pump_prime(self._pump)

    def pump(self) -> tuple[int, int]:
        """Moves frames until something happens: (enum nb_event, detail)."""
        result = ffi.new("struct nb_pump_result *")
        lib.nb_pump_run(self._pump, result)
        return result.event, result.detail

    def salvage(self) -> int:
        """After the device was halted: takes back all that it held. Returns how many frames were lost by it. Nothing is
        pumped before `resume`."""
        self.is_salvaged = True
        return int(lib.nb_pump_salvage(self._pump))

    def resume(self) -> None:
        """After the device was configured anew: gives it its receive buffers. Raises DeviceError when it is not as it
        was when the client was told of it."""
        net = self._net
        what = self._promised.broken_by(_Promises.of(net))
        if what:
            raise DeviceError(f"{net.name}: after its reset the device has {what}; the session was promised another")
        pairs = ffi.new("struct nb_pump_pair[]", len(net.pairs))
        _place_pairs(pairs, net)
        slots = ffi.cast("uint8_t *", net.tx_slots.address)
        if lib.nb_pump_resume(self._pump, pairs, len(net.pairs), slots, net.tx_slots.iova):
            raise DeviceError(f"{net.name}: after its reset the device has queues or vectors other than before")
        self.is_salvaged = False

    def reset_stalled_queue(self) -> int | None:
        """After NB_FAULT_STALLED: resets the one queue that did not move, while the session goes on. Returns how many
        frames were lost; None, and resets nothing, if it has sent nothing since that was last done. Between two calls
        of `pump`.

        Raises as NetDevice.reset_queue, and DeviceError without memory for it.
        """
        number = lib.nb_pump_stalled_pair(self._pump)
        return None if number < 0 else self._net.reset_queue(self._net.pairs[number].tx, self._empty)

    def _empty(self, queue: Any) -> int:
        lost: int = lib.nb_pump_reset_queue(self._pump, queue)
        if lost < 0:
            raise DeviceError(f"{self._net.name}: there is no memory to take back what was in a queue that is reset")
        return lost

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

    def close(self, *, forfeited: bool = False) -> None:
        """Unmaps the buffers from the device and this process. The client's own mapping, if it kept one, shows what was
        last in them and nothing that comes later. `forfeited`: the client ended the session, so what it may have kept
        is emptied, lest it hold on to the driver's memory."""
        if forfeited:
            for memory in (self._rx.view.obj, self._tx.view.obj, self.port.rings.memory):
                discard(memory)
        self._stack.close()

    def _new_ledger(self, memory: vfio.Memory, mapping: Mapping, region: Any, region_id: int) -> Any:
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


def _place_pairs(places: Any, net: NetDevice) -> None:
    """Fills as many `struct nb_pump_pair` as the device has pairs in use."""
    for number, pair in enumerate(net.pairs):
        place = places[number]
        place.rx_queue, place.tx_queue = pair.rx.handle, pair.tx.handle
        place.rx_irq_fd, place.tx_irq_fd = pair.rx.irq_fd, pair.tx.irq_fd
