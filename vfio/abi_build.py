"""The kernel's interface written down as data, and the generator of `vfio/_abi.py` from it.

Run `python -m vfio.abi_build` after a change. The tables name structs and constants exactly as `<linux/vfio.h>`,
`<linux/iommufd.h>` and `<linux/pci_regs.h>` do, so that a test can compile a C program against those headers and
compare every size, offset and number. `since` is the first kernel whose header has the item. Only this script needs
the `cffi` package; the generated module needs `_cffi_backend` alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

VFIO_H = "linux/vfio.h"
IOMMUFD_H = "linux/iommufd.h"
PCI_REGS_H = "linux/pci_regs.h"

# _IO(';', 100 + n) and _IO(';', 0x80 + n): VFIO's and iommufd's requests carry neither direction nor size.
_TYPE = ord(";") << 8


class Struct(NamedTuple):
    """One struct of a kernel header. `grows`: later kernels appended fields to those declared here."""

    name: str
    fields: str
    header: str = VFIO_H
    since: tuple[int, int] = (5, 4)
    grows: bool = False

    def field_names(self) -> list[str]:
        """The names of the fields, in order."""
        names = [part.split()[-1] for part in self.fields.split(";") if part.strip()]
        return [name.split("[")[0] for name in names]


class Constants(NamedTuple):
    """A group of integer constants of one header."""

    values: dict[str, int]
    header: str = VFIO_H
    since: tuple[int, int] = (5, 4)


def _vfio(first: int, *names: str) -> dict[str, int]:
    return {name: _TYPE | (100 + first + i) for i, name in enumerate(names)}


def _count(*names: str) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


def _bits(*names: str, first: int = 0) -> dict[str, int]:
    return {name: 1 << (first + i) for i, name in enumerate(names)}


STRUCTS: tuple[Struct, ...] = (
    Struct("vfio_info_cap_header", "uint16_t id; uint16_t version; uint32_t next;"),
    Struct("vfio_group_status", "uint32_t argsz; uint32_t flags;"),
    Struct(
        "vfio_device_info",
        "uint32_t argsz; uint32_t flags; uint32_t num_regions; uint32_t num_irqs; uint32_t cap_offset;",
        since=(5, 9),
        grows=True,
    ),
    Struct(
        "vfio_region_info",
        "uint32_t argsz; uint32_t flags; uint32_t index; uint32_t cap_offset; uint64_t size; uint64_t offset;",
    ),
    Struct("vfio_region_sparse_mmap_area", "uint64_t offset; uint64_t size;"),
    Struct(
        "vfio_region_info_cap_sparse_mmap",
        "struct vfio_info_cap_header header; uint32_t nr_areas; uint32_t reserved;"
        " struct vfio_region_sparse_mmap_area areas[];",
    ),
    Struct("vfio_region_info_cap_type", "struct vfio_info_cap_header header; uint32_t type; uint32_t subtype;"),
    Struct("vfio_irq_info", "uint32_t argsz; uint32_t flags; uint32_t index; uint32_t count;"),
    Struct(
        "vfio_irq_set",
        "uint32_t argsz; uint32_t flags; uint32_t index; uint32_t start; uint32_t count; uint8_t data[];",
    ),
    Struct("vfio_pci_dependent_device", "uint32_t group_id; uint16_t segment; uint8_t bus; uint8_t devfn;"),
    Struct(
        "vfio_pci_hot_reset_info",
        "uint32_t argsz; uint32_t flags; uint32_t count; struct vfio_pci_dependent_device devices[];",
    ),
    Struct("vfio_pci_hot_reset", "uint32_t argsz; uint32_t flags; uint32_t count; int32_t group_fds[];"),
    Struct("vfio_device_feature", "uint32_t argsz; uint32_t flags; uint8_t data[];", since=(5, 7)),
    Struct("vfio_device_low_power_entry_with_wakeup", "int32_t wakeup_eventfd; uint32_t reserved;", since=(6, 1)),
    Struct(
        "vfio_device_bind_iommufd",
        "uint32_t argsz; uint32_t flags; int32_t iommufd; uint32_t out_devid;",
        since=(6, 6),
        grows=True,
    ),
    Struct(
        "vfio_device_attach_iommufd_pt", "uint32_t argsz; uint32_t flags; uint32_t pt_id;", since=(6, 6), grows=True
    ),
    Struct("vfio_device_detach_iommufd_pt", "uint32_t argsz; uint32_t flags;", since=(6, 6), grows=True),
    Struct(
        "vfio_iommu_type1_info",
        "uint32_t argsz; uint32_t flags; uint64_t iova_pgsizes; uint32_t cap_offset;",
    ),
    Struct("vfio_iova_range", "uint64_t start; uint64_t end;"),
    Struct(
        "vfio_iommu_type1_info_cap_iova_range",
        "struct vfio_info_cap_header header; uint32_t nr_iovas; uint32_t reserved;"
        " struct vfio_iova_range iova_ranges[];",
    ),
    Struct("vfio_iommu_type1_info_dma_avail", "struct vfio_info_cap_header header; uint32_t avail;", since=(5, 10)),
    Struct(
        "vfio_iommu_type1_dma_map",
        "uint32_t argsz; uint32_t flags; uint64_t vaddr; uint64_t iova; uint64_t size;",
    ),
    Struct(
        "vfio_iommu_type1_dma_unmap",
        "uint32_t argsz; uint32_t flags; uint64_t iova; uint64_t size; uint8_t data[];",
        since=(5, 8),
    ),
    Struct("iommu_destroy", "uint32_t size; uint32_t id;", IOMMUFD_H, (6, 2)),
    Struct("iommu_ioas_alloc", "uint32_t size; uint32_t flags; uint32_t out_ioas_id;", IOMMUFD_H, (6, 2)),
    Struct("iommu_iova_range", "uint64_t start; uint64_t last;", IOMMUFD_H, (6, 2)),
    Struct(
        "iommu_ioas_iova_ranges",
        "uint32_t size; uint32_t ioas_id; uint32_t num_iovas; uint32_t __reserved;"
        " uint64_t allowed_iovas; uint64_t out_iova_alignment;",
        IOMMUFD_H,
        (6, 2),
    ),
    Struct(
        "iommu_ioas_map",
        "uint32_t size; uint32_t flags; uint32_t ioas_id; uint32_t __reserved;"
        " uint64_t user_va; uint64_t length; uint64_t iova;",
        IOMMUFD_H,
        (6, 2),
    ),
    Struct("iommu_ioas_unmap", "uint32_t size; uint32_t ioas_id; uint64_t iova; uint64_t length;", IOMMUFD_H, (6, 2)),
)

CONSTANTS: tuple[Constants, ...] = (
    Constants({"VFIO_API_VERSION": 0, "VFIO_TYPE1_IOMMU": 1, "VFIO_TYPE1v2_IOMMU": 3, "VFIO_NOIOMMU_IOMMU": 8}),
    Constants({"VFIO_UNMAP_ALL": 9}, since=(5, 12)),
    Constants(
        _vfio(
            0,
            "VFIO_GET_API_VERSION",
            "VFIO_CHECK_EXTENSION",
            "VFIO_SET_IOMMU",
            "VFIO_GROUP_GET_STATUS",
            "VFIO_GROUP_SET_CONTAINER",
            "VFIO_GROUP_UNSET_CONTAINER",
            "VFIO_GROUP_GET_DEVICE_FD",
            "VFIO_DEVICE_GET_INFO",
            "VFIO_DEVICE_GET_REGION_INFO",
            "VFIO_DEVICE_GET_IRQ_INFO",
            "VFIO_DEVICE_SET_IRQS",
            "VFIO_DEVICE_RESET",
            "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
            "VFIO_DEVICE_PCI_HOT_RESET",
        )
    ),
    Constants(_vfio(12, "VFIO_IOMMU_GET_INFO", "VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA")),
    Constants(_vfio(17, "VFIO_DEVICE_FEATURE"), since=(5, 7)),
    Constants(
        _vfio(18, "VFIO_DEVICE_BIND_IOMMUFD", "VFIO_DEVICE_ATTACH_IOMMUFD_PT", "VFIO_DEVICE_DETACH_IOMMUFD_PT"),
        since=(6, 6),
    ),
    Constants(_bits("VFIO_GROUP_FLAGS_VIABLE", "VFIO_GROUP_FLAGS_CONTAINER_SET")),
    Constants(_bits("VFIO_DEVICE_FLAGS_RESET", "VFIO_DEVICE_FLAGS_PCI")),
    Constants(
        _bits(
            "VFIO_REGION_INFO_FLAG_READ",
            "VFIO_REGION_INFO_FLAG_WRITE",
            "VFIO_REGION_INFO_FLAG_MMAP",
            "VFIO_REGION_INFO_FLAG_CAPS",
        )
    ),
    Constants(
        {
            "VFIO_REGION_INFO_CAP_SPARSE_MMAP": 1,
            "VFIO_REGION_INFO_CAP_TYPE": 2,
            "VFIO_REGION_INFO_CAP_MSIX_MAPPABLE": 3,
        }
    ),
    Constants(
        _bits("VFIO_IRQ_INFO_EVENTFD", "VFIO_IRQ_INFO_MASKABLE", "VFIO_IRQ_INFO_AUTOMASKED", "VFIO_IRQ_INFO_NORESIZE")
    ),
    Constants(
        _bits(
            "VFIO_IRQ_SET_DATA_NONE",
            "VFIO_IRQ_SET_DATA_BOOL",
            "VFIO_IRQ_SET_DATA_EVENTFD",
            "VFIO_IRQ_SET_ACTION_MASK",
            "VFIO_IRQ_SET_ACTION_UNMASK",
            "VFIO_IRQ_SET_ACTION_TRIGGER",
        )
    ),
    Constants(
        _count(
            "VFIO_PCI_BAR0_REGION_INDEX",
            "VFIO_PCI_BAR1_REGION_INDEX",
            "VFIO_PCI_BAR2_REGION_INDEX",
            "VFIO_PCI_BAR3_REGION_INDEX",
            "VFIO_PCI_BAR4_REGION_INDEX",
            "VFIO_PCI_BAR5_REGION_INDEX",
            "VFIO_PCI_ROM_REGION_INDEX",
            "VFIO_PCI_CONFIG_REGION_INDEX",
            "VFIO_PCI_VGA_REGION_INDEX",
        )
    ),
    Constants(
        _count(
            "VFIO_PCI_INTX_IRQ_INDEX",
            "VFIO_PCI_MSI_IRQ_INDEX",
            "VFIO_PCI_MSIX_IRQ_INDEX",
            "VFIO_PCI_ERR_IRQ_INDEX",
            "VFIO_PCI_REQ_IRQ_INDEX",
        )
    ),
    Constants(_bits("VFIO_PCI_HOT_RESET_FLAG_DEV_ID", "VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED"), since=(6, 6)),
    Constants({"VFIO_PCI_DEVID_OWNED": 0, "VFIO_PCI_DEVID_NOT_OWNED": -1}, since=(6, 6)),
    Constants(
        _bits("VFIO_DEVICE_FEATURE_GET", "VFIO_DEVICE_FEATURE_SET", "VFIO_DEVICE_FEATURE_PROBE", first=16),
        since=(5, 7),
    ),
    Constants(
        {
            "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY": 3,
            "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP": 4,
            "VFIO_DEVICE_FEATURE_LOW_POWER_EXIT": 5,
        },
        since=(6, 1),
    ),
    Constants(_bits("VFIO_IOMMU_INFO_PGSIZES", "VFIO_IOMMU_INFO_CAPS")),
    Constants({"VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE": 1}),
    Constants({"VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL": 3}, since=(5, 10)),
    Constants(_bits("VFIO_DMA_MAP_FLAG_READ", "VFIO_DMA_MAP_FLAG_WRITE")),
    Constants({"VFIO_DMA_UNMAP_FLAG_ALL": 2}, since=(5, 12)),
    Constants(
        {
            "IOMMU_DESTROY": _TYPE | 0x80,
            "IOMMU_IOAS_ALLOC": _TYPE | 0x81,
            "IOMMU_IOAS_IOVA_RANGES": _TYPE | 0x84,
            "IOMMU_IOAS_MAP": _TYPE | 0x85,
            "IOMMU_IOAS_UNMAP": _TYPE | 0x86,
        },
        IOMMUFD_H,
        (6, 2),
    ),
    Constants(
        _bits("IOMMU_IOAS_MAP_FIXED_IOVA", "IOMMU_IOAS_MAP_WRITEABLE", "IOMMU_IOAS_MAP_READABLE"), IOMMUFD_H, (6, 2)
    ),
    Constants(
        {
            "PCI_VENDOR_ID": 0x00,
            "PCI_DEVICE_ID": 0x02,
            "PCI_COMMAND": 0x04,
            "PCI_COMMAND_IO": 0x1,
            "PCI_COMMAND_MEMORY": 0x2,
            "PCI_COMMAND_MASTER": 0x4,
            "PCI_COMMAND_INTX_DISABLE": 0x400,
            "PCI_STATUS": 0x06,
            "PCI_STATUS_CAP_LIST": 0x10,
            "PCI_CLASS_REVISION": 0x08,
            "PCI_HEADER_TYPE": 0x0E,
            "PCI_BASE_ADDRESS_0": 0x10,
            "PCI_CAPABILITY_LIST": 0x34,
            "PCI_INTERRUPT_LINE": 0x3C,
            "PCI_INTERRUPT_PIN": 0x3D,
            "PCI_STD_HEADER_SIZEOF": 64,
            "PCI_CFG_SPACE_SIZE": 256,
            "PCI_CFG_SPACE_EXP_SIZE": 4096,
            "PCI_CAP_ID_PM": 0x01,
            "PCI_CAP_ID_MSI": 0x05,
            "PCI_CAP_ID_VNDR": 0x09,
            "PCI_CAP_ID_EXP": 0x10,
            "PCI_CAP_ID_MSIX": 0x11,
            "PCI_PM_CTRL": 4,
            "PCI_PM_CTRL_STATE_MASK": 3,
            "PCI_MSIX_FLAGS": 2,
            "PCI_MSIX_FLAGS_QSIZE": 0x7FF,
            "PCI_MSIX_TABLE": 4,
            "PCI_MSIX_TABLE_BIR": 7,
            "PCI_MSIX_TABLE_OFFSET": 0xFFFFFFF8,
            "PCI_MSIX_ENTRY_SIZE": 16,
        },
        PCI_REGS_H,
    ),
)


def cdef() -> str:
    """The structs as C declarations, in the order of the table."""
    return "\n".join(f"struct {s.name} {{ {s.fields} }};" for s in STRUCTS)


def generate() -> str:
    """The text of `vfio/_abi.py`."""
    import contextlib
    import io
    import tempfile

    from cffi import FFI

    ffi = FFI()
    ffi.cdef(cdef())
    ffi.set_source("vfio._abi", None)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "_abi.py")
        with contextlib.redirect_stdout(io.StringIO()):
            ffi.emit_python_code(str(path))
        text = path.read_text(encoding="utf-8")
    lines = ['"""Structs and constants of the kernel headers. Generated by vfio/abi_build.py: do not edit."""', ""]
    lines += [line for line in text.splitlines() if not line.startswith("#")]
    for group in CONSTANTS:
        lines += ["", f"# <{group.header}>"]
        lines += [f"{name} = {value:#x}" if value > 9 else f"{name} = {value}" for name, value in group.values.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write `vfio/_abi.py` next to this file."""
    Path(__file__).with_name("_abi.py").write_text(generate(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
