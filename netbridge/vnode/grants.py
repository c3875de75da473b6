"""What of a manifest's grants can be checked before a driver starts, and while its device is opened."""

from __future__ import annotations

import resource
from collections.abc import Collection

import vfio
from netbridge.session import Settings
from netbridge.vnode.capabilities import IRQ, NETWORK, PCI, Capabilities, Msix
from netbridge.vnode.manifest import Manifest

MSIX_VECTORS = 3  # configuration, receive, transmit


def check_grants(granted: Capabilities, claimed: vfio.PciAddress | None, settings: Settings) -> vfio.PciAddress:
    """Everything that can be refused before anything is touched. Returns the function to claim; `claimed` is the one
    that the command line names. CAP_MEM_SHARE is not asked for here: without it the driver runs, and refuses its
    clients."""
    granted.require(NETWORK, "opening a network device")
    granted.require(PCI, "claiming the network device")
    assert granted.pci_function is not None
    if claimed is not None:
        granted.require_pci_function(claimed, "claiming the function named with --pci")
    granted.require(IRQ, "receiving the device's interrupts")
    if isinstance(granted.irq, Msix):
        granted.require_msix(MSIX_VECTORS, "one interrupt vector each for configuration, receive and transmit")
    granted.require_dma(settings.dma_bytes, "the frame buffers and the virtqueues")
    return granted.pci_function


def turned_off(manifest: Manifest, also: Collection[str]) -> list[str]:
    """Features not to be used, by name: the manifest's, and the command line's."""
    return [*manifest.without, *also]


def check_irq(granted: Capabilities, device: vfio.Device) -> str:
    """Which kind of interrupt the manifest grants, a value of `InterruptMode`; for INTx also that this function has
    that very line."""
    if isinstance(granted.irq, Msix):
        return "msix"
    granted.require_intx(device.config.interrupt_line, f"the interrupt of {device.address}")
    return "intx"


def locked_memory_limit(granted: Capabilities, settings: Settings) -> int:
    """RLIMIT_MEMLOCK for the driver, bytes: the manifest's DMA budget, which the kernel holds it to once it is without
    CAP_IPC_LOCK. Raises vfio.LockedMemoryLimit when this process may not give so much and the rest is too little."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY or hard >= granted.dma_budget:
        return granted.dma_budget
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (granted.dma_budget, granted.dma_budget))
    except (ValueError, OSError):  # without CAP_SYS_RESOURCE
        needed = settings.dma_bytes
        if hard < needed:
            raise vfio.LockedMemoryLimit(
                f"cannot map {needed // 1024} KiB for DMA",
                cause=f"the limit on locked memory is {hard // 1024} KiB",
                fix=f"raise it: ulimit -l {-(-needed // 1024)} (in KiB), or LimitMEMLOCK= in a systemd unit",
            ) from None
        return hard
    return granted.dma_budget
