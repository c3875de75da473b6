"""What a manifest grants, as plain data, and the refusals for what it does not.

A grant is asked for where the thing is done, as in `capabilities.require("CAP_DMA_ALLOC", "allocating the DMA pool")`,
so that a capability which is not there is refused by name, together with the line that would grant it.

The driver process imports this module and has little memory: hence no YAML here, no `dataclasses`, no `typing`.
"""

from __future__ import annotations

from netbridge.errors import CapabilityExceeded, CapabilityMissing
from vfio._record import NamedTuple
from vfio.pci import PciAddress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

MIB = 1 << 20

NETWORK = "NetworkAccess"
PCI = "CAP_HARDWARE_IO_PCI"
IRQ = "CAP_IRQ_REGISTER"
DMA = "CAP_DMA_ALLOC"
SHARE = "CAP_MEM_SHARE"
RAW = "CAP_SYSCALL_RAW"
LOG = "CAP_LOG_WRITE"


class Kind(NamedTuple):
    """A capability there is: what it allows on Linux, what becomes of a V-Node without it, how it is written."""

    name: str
    allows: str
    without: str
    line: str  # an example of its line under `capabilities:`


KINDS: tuple[Kind, ...] = (
    Kind(
        NETWORK,
        allows="opening a network device at all",
        without="no NIC is opened, so the driver does not start",
        line=f"- {NETWORK}",
    ),
    Kind(
        PCI,
        allows="the VFIO device of exactly this PCI function",
        without="no PCI function is bound or opened",
        line=f'- {PCI}: "0000:00:1f.0"',
    ),
    Kind(
        IRQ,
        allows="interrupts of that function, through VFIO eventfds",
        without="no interrupt is enabled",
        line=f"- {IRQ}: msix",
    ),
    Kind(
        DMA,
        allows="pinned memory mapped in the IOMMU, within runtime.required_mem_mb",
        without="no memory is mapped for the device, so no queue can be set up",
        line=f"- {DMA}",
    ),
    Kind(
        SHARE,
        allows="passing the frame memory to the service, as file descriptors over the port",
        without="the driver runs, but makes no frame memory and turns every service away",
        line=f"- {SHARE}",
    ),
    Kind(
        RAW,
        allows="raw reads and writes of config space and BARs: the debug verbs",
        without="the debug verbs are refused; the driver itself does not need them",
        line=f"- {RAW}",
    ),
    Kind(
        LOG,
        allows="structured logs on stderr",
        without="nothing is logged but the error that ends the process",
        line=f"- {LOG}",
    ),
)

KIND_BY_NAME: dict[str, Kind] = {kind.name: kind for kind in KINDS}


class Intx(NamedTuple):
    """The function's INTx interrupt, if its Interrupt Line register reads `line` (PCI 3.0 section 6.2.4)."""

    line: int

    def __str__(self) -> str:
        return f"INTx line {self.line}"


class Msix(NamedTuple):
    """MSI-X vectors of the function: at most `vectors`, or as many as it has when that is None."""

    vectors: int | None = None

    def __str__(self) -> str:
        return "MSI-X" if self.vectors is None else f"MSI-X with {_vectors(self.vectors)}"


class Capabilities(NamedTuple):
    """What is granted. The default is nothing.

    `manifest` and `line` (that of its `capabilities:` key) are for messages: where a grant would have to be written.
    """

    network: bool = False
    pci_function: PciAddress | None = None
    irq: Intx | Msix | None = None
    dma: bool = False
    dma_budget: int = 0  # bytes that may be mapped for the device in all; 0 without CAP_DMA_ALLOC
    mem_share: Literal["rw", "ro"] | None = None  # how the service may map received frames
    raw: bool = False
    log: bool = False
    manifest: str = "the manifest"
    line: int | None = None

    def has(self, name: str) -> bool:
        """Whether the capability of this name is granted. An unknown name is a mistake in the program: KeyError."""
        return {
            NETWORK: self.network,
            PCI: self.pci_function is not None,
            IRQ: self.irq is not None,
            DMA: self.dma,
            SHARE: self.mem_share is not None,
            RAW: self.raw,
            LOG: self.log,
        }[name]

    def names(self) -> tuple[str, ...]:
        """The names of all that is granted, in the order of `KINDS`."""
        return tuple(kind.name for kind in KINDS if self.has(kind.name))

    def describe(self, name: str) -> str:
        """The grant of this name in a few words: its value, or "yes" when it has none, or "no" when it is not held."""
        if not self.has(name):
            return "no"
        return {
            PCI: str(self.pci_function),
            IRQ: str(self.irq),
            DMA: f"{self.dma_budget // MIB} MiB",
            SHARE: "received frames read-only" if self.mem_share == "ro" else "read-write",
        }.get(name, "yes")

    def require(self, name: str, purpose: str) -> None:
        """Return when `name` is granted; otherwise raise CapabilityMissing, saying that `purpose` needs it."""
        if not self.has(name):
            raise self._missing(name, purpose, KIND_BY_NAME[name].line)

    def require_pci_function(self, address: PciAddress, purpose: str) -> None:
        """The same for one PCI function: CapabilityExceeded when another one is granted."""
        if self.pci_function is None:
            raise self._missing(PCI, purpose, f'- {PCI}: "{address}"')
        if self.pci_function != address:
            raise self._exceeded(PCI, purpose, f"the PCI function {address}", f"{self.pci_function} and no other")

    def require_intx(self, line: int, purpose: str) -> None:
        """The same for INTx of a function whose Interrupt Line register reads `line`."""
        if self.irq is None:
            raise self._missing(IRQ, purpose, f"- {IRQ}: {line}")
        # Not by comparing records: they are tuples, and Msix(11) equals Intx(11).
        if not isinstance(self.irq, Intx) or self.irq.line != line:
            raise self._exceeded(IRQ, purpose, f"INTx line {line}", str(self.irq))

    def require_msix(self, vectors: int, purpose: str) -> None:
        """The same for a number of MSI-X vectors."""
        if self.irq is None:
            raise self._missing(IRQ, purpose, f"- {IRQ}: msix")
        if not isinstance(self.irq, Msix) or (self.irq.vectors is not None and vectors > self.irq.vectors):
            raise self._exceeded(IRQ, purpose, f"MSI-X with {_vectors(vectors)}", str(self.irq))

    def require_dma(self, size: int, purpose: str) -> None:
        """The same for memory mapped for the device: `size` is all of it together, in bytes."""
        self.require(DMA, purpose)
        if size > self.dma_budget:
            granted = f"{self.dma_budget} bytes (runtime.required_mem_mb: {self.dma_budget // MIB})"
            raise self._exceeded(DMA, purpose, f"{size} bytes of DMA memory in all", granted)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can carry; `from_dict` is the way back. What is not granted has no entry."""
        granted: dict[str, Any] = dict.fromkeys(self.names(), True)
        if self.pci_function is not None:
            granted[PCI] = str(self.pci_function)
        if self.irq is not None:
            granted[IRQ] = {"intx": self.irq.line} if isinstance(self.irq, Intx) else {"msix": self.irq.vectors}
        if self.dma:
            granted[DMA] = {"budget_bytes": self.dma_budget}
        if self.mem_share is not None:
            granted[SHARE] = self.mem_share
        return {"granted": granted, "manifest": self.manifest, "line": self.line}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Capabilities:
        """What `as_dict` gave. For data of this program's own making: it is not checked as a manifest is."""
        granted = data["granted"]
        irq: Intx | Msix | None = None
        if IRQ in granted:
            irq = Intx(granted[IRQ]["intx"]) if "intx" in granted[IRQ] else Msix(granted[IRQ]["msix"])
        return cls(
            network=NETWORK in granted,
            pci_function=PciAddress.parse(granted[PCI]) if PCI in granted else None,
            irq=irq,
            dma=DMA in granted,
            dma_budget=granted[DMA]["budget_bytes"] if DMA in granted else 0,
            mem_share=granted.get(SHARE),
            raw=RAW in granted,
            log=LOG in granted,
            manifest=data["manifest"],
            line=data["line"],
        )

    def _missing(self, name: str, purpose: str, line: str) -> CapabilityMissing:
        return CapabilityMissing(
            name,
            purpose,
            f"{self._place()}: {name} is not granted, and {purpose} needs it; "
            f"to grant it, add the line `{line}` under `capabilities:`",
        )

    def _exceeded(self, name: str, purpose: str, asked: str, granted: str) -> CapabilityExceeded:
        return CapabilityExceeded(
            name,
            purpose,
            f"{self._place()}: {purpose} asks for {asked}, but {name} grants {granted}; "
            f"change the manifest if this is what it should allow",
        )

    def _place(self) -> str:
        return self.manifest if self.line is None else f"{self.manifest}:{self.line}"


def _vectors(count: int) -> str:
    return "1 vector" if count == 1 else f"{count} vectors"
