"""What the two ways into VFIO have in common: opening devices into one I/O address space, and mapping memory in it.

`Iommu` stands on one of these and adds the accounting; `_type1` and `_iommufd` talk to the kernel. Calls to the
kernel that fail raise OSError where `Iommu` explains them (map, unmap), and a finished `VfioError` everywhere else.
"""

from __future__ import annotations

from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfio.iova import IovaRange
    from vfio.pci import PciFunction


class IommuInfo(NamedTuple):
    """What the kernel says of an address space: valid ranges, page sizes in bytes, and how many more mappings it
    allows (None: no limit is told)."""

    ranges: tuple[IovaRange, ...]
    page_sizes: tuple[int, ...]
    dma_avail: int | None


class DeviceFds(NamedTuple):
    """The open files that make up a device, for handing them to another process over SCM_RIGHTS.

    - `interface`: "type1v2", "iommufd" and so on, as `Device.interface` says it
    - `device`: the VFIO device
    - `iommu`: the container (/dev/vfio/vfio) or /dev/iommu
    - `group`: the IOMMU group, or -1 with iommufd. The receiver may do without it: only a hot reset needs it
    - `ioas_id`: with iommufd the number of the I/O address space, else 0 (a number, not a file)
    """

    interface: str
    device: int
    iommu: int
    group: int = -1
    ioas_id: int = 0


class Backend:
    """One I/O address space of the kernel's. All sizes and addresses in bytes."""

    interface: str
    fd: int
    ioas_id: int = 0

    def attach(self, function: PciFunction, dev_root: str) -> tuple[int, int]:
        """Open a device into this address space: (device fd, group fd or -1). The caller owns the device fd."""
        raise NotImplementedError

    def empties(self, group_fd: int) -> bool:
        """Whether the address space ends, with all its mappings, when one more device of that group is closed."""
        raise NotImplementedError

    def detach(self, group_fd: int) -> None:
        """Say that a device of that group was closed."""
        raise NotImplementedError

    def group_fds(self) -> dict[int, int]:
        """The groups' files by number, which prove to the kernel who owns the devices of a hot reset."""
        raise NotImplementedError

    def info(self) -> IommuInfo:
        """Ask the kernel."""
        raise NotImplementedError

    def map(self, address: int, iova: int, size: int, read: bool, write: bool) -> None:
        """Map `size` bytes of this process at `address` to `iova`. OSError as the kernel says it."""
        raise NotImplementedError

    def unmap(self, iova: int, size: int) -> int:
        """Unmap all mappings within a range; the number of bytes that were mapped. OSError as the kernel says it."""
        raise NotImplementedError

    def unmap_all(self) -> int | None:
        """Unmap everything with one call; None where this kernel cannot."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the files. The kernel unmaps what is left."""
        raise NotImplementedError
