"""One session's buffers, ledgers and pump, on one network device.

A session is the life of one set of buffers: made and mapped before a client comes, offered to exactly one client, and
when that client goes, counted, unmapped and thrown away. What begins it and ends it is the bridge's business.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import vfio
from netbridge.datapath._core import ffi, lib
from netbridge.errors import NetbridgeError
from netbridge.ipc.session import PortSession
from netbridge.virtio import features
from netbridge.virtio.net import NetDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, Self
else:
    Protocol = object

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
