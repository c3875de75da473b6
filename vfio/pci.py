"""PCI functions as Linux shows them: their addresses, and what sysfs says of them.

Source: Documentation/ABI/testing/sysfs-bus-pci of the kernel.
"""

from __future__ import annotations

import os

from vfio import _sys
from vfio._record import NamedTuple
from vfio.errors import BadAddress, DeviceNotFound, Malformed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FORMS = "write 0000:00:1f.0, 00:1f.0 or 0x00:0x1F:0x0 (hexadecimal: an optional domain, then bus, device, function)"


class PciAddress(NamedTuple):
    """Where a PCI function sits. Immutable, hashable, and ordered as `lspci` orders them.

    `str()` gives the form that sysfs uses, `0000:00:1f.0`.
    """

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str | PciAddress) -> PciAddress:
        """Read an address in any usual form: `0000:00:1f.0`, `00:1f.0`, `0000:00:1f:0`, `0x00:0x1F:0x0`, or a path
        that ends in one. All numbers are hexadecimal. Raises `BadAddress` (also a `ValueError`)."""
        if isinstance(text, PciAddress):
            return text
        if not isinstance(text, str):
            raise BadAddress(f"a PCI address is a text, not {type(text).__name__}: {_FORMS}")
        body = text.strip().rpartition("/")[2]
        parts = body.replace(".", ":").split(":")
        dots = body.count(".")
        if dots > 1 or len(parts) not in (3, 4) or (dots and "." not in body[body.rfind(":") :]):
            raise BadAddress(f"{text!r} is not a PCI address: {_FORMS}")
        digits = [part[2:] if part[:2] in ("0x", "0X") else part for part in parts]
        if not all(1 <= len(d) <= 8 and all(c in "0123456789abcdefABCDEF" for c in d) for d in digits):
            raise BadAddress(f"{text!r} is not a PCI address: {_FORMS}")
        numbers = [int(d, 16) for d in digits]
        if len(numbers) == 3:
            # "0000:00:1f" is a domain, a bus and a device that somebody forgot the function of.
            if len(digits[0]) > 2:
                raise BadAddress(f"{text!r} has no function number: {_FORMS}")
            numbers.insert(0, 0)
        for name, value, most in zip(("bus", "device", "function"), numbers[1:], (0xFF, 0x1F, 0x7), strict=True):
            if value > most:
                raise BadAddress(f"{text!r}: {name} {value:#x} is more than {most:#x}; {_FORMS}")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"

    def __repr__(self) -> str:
        return f"PciAddress('{self}')"


class PciFunction:
    """One PCI function as sysfs shows it. Nothing is opened or changed; each property is read anew.

    `address` may be a `PciAddress` or its text. `sysfs_root` is where sysfs is mounted (tests give their own).
    Raises `DeviceNotFound`, which names the nearest functions there are.
    """

    def __init__(self, address: PciAddress | str, *, sysfs_root: str = "/sys") -> None:
        self.address = PciAddress.parse(address)
        self.sysfs_root = sysfs_root
        self.path = f"{sysfs_root}/bus/pci/devices/{self.address}"
        if not self.exists:
            raise DeviceNotFound(
                "there is no such PCI function",
                device=self.address,
                cause=_nearest(self.address, sysfs_root),
                fix="`lspci -D` lists them all",
            )

    def __repr__(self) -> str:
        return f"<PciFunction {self.address}>"

    @property
    def exists(self) -> bool:
        """Whether the function is there (it may be unplugged at any time)."""
        return os.path.isdir(self.path)

    def attribute(self, name: str) -> str | None:
        """The text of one sysfs attribute, or None if there is none."""
        try:
            return _sys.read_file(f"{self.path}/{name}")
        except OSError:
            return None

    def _number(self, name: str) -> int:
        text = self.attribute(name)
        if text is None:
            raise DeviceNotFound(f"sysfs has no {name} for it: was it unplugged?", device=self.address)
        try:
            return int(text, 0)
        except ValueError:
            raise Malformed(f"sysfs says {text!r} where its {name} should be", device=self.address) from None

    def _link(self, name: str) -> str | None:
        try:
            return os.readlink(f"{self.path}/{name}").rpartition("/")[2]
        except OSError:
            return None

    @property
    def vendor_id(self) -> int:
        """PCI vendor id, 16 bits."""
        return self._number("vendor")

    @property
    def device_id(self) -> int:
        """PCI device id, 16 bits."""
        return self._number("device")

    @property
    def subsystem_ids(self) -> tuple[int, int]:
        """Subsystem vendor id and subsystem id, 16 bits each."""
        return self._number("subsystem_vendor"), self._number("subsystem_device")

    @property
    def class_code(self) -> int:
        """Class, subclass and programming interface, 24 bits: 0x020000 is an Ethernet controller."""
        return self._number("class")

    @property
    def revision(self) -> int:
        """Revision id, 8 bits."""
        return self._number("revision")

    @property
    def driver(self) -> str | None:
        """Name of the kernel driver bound to the function, or None."""
        return self._link("driver")

    @property
    def driver_override(self) -> str | None:
        """The only driver that may bind to the function, or None where any that matches may."""
        text = self.attribute("driver_override")
        return None if text in (None, "", "(null)") else text

    @property
    def iommu_group(self) -> int | None:
        """Number of the IOMMU group, or None when no IOMMU guards the function."""
        name = self._link("iommu_group")
        return int(name) if name is not None and name.isdigit() else None

    @property
    def noiommu(self) -> bool:
        """Whether the group is VFIO's stand-in for a missing IOMMU (CONFIG_VFIO_NOIOMMU): no protection at all."""
        return self.attribute("iommu_group/name") == "vfio-noiommu"

    @property
    def group_members(self) -> tuple[PciAddress, ...]:
        """All PCI functions of the IOMMU group, this one among them, in order; empty when there is no group."""
        try:
            names = os.listdir(f"{self.path}/iommu_group/devices")
        except OSError:
            return ()
        return tuple(sorted(_addresses(names)))  # a group may hold devices of other buses, too

    @property
    def numa_node(self) -> int | None:
        """NUMA node nearest to the function, or None when the machine does not say."""
        if self.attribute("numa_node") is None:  # a kernel without CONFIG_NUMA
            return None
        node = self._number("numa_node")
        return node if node >= 0 else None

    @property
    def is_bridge(self) -> bool:
        """Whether the function is a PCI bridge, which VFIO never lends out."""
        return self.class_code >> 16 == 0x06 and (self.class_code >> 8) & 0xFF in (0x04, 0x09)

    @property
    def vfio_cdev(self) -> str | None:
        """Name of its VFIO character device (`vfio0`, under /dev/vfio/devices), or None: it has one while it is bound
        to a VFIO driver on a kernel with CONFIG_VFIO_DEVICE_CDEV."""
        try:
            names = [n for n in os.listdir(f"{self.path}/vfio-dev") if n.startswith("vfio")]
        except OSError:
            return None
        return names[0] if names else None


def functions(*, sysfs_root: str = "/sys") -> tuple[PciAddress, ...]:
    """The addresses of all PCI functions of the machine, in order."""
    try:
        names = os.listdir(f"{sysfs_root}/bus/pci/devices")
    except OSError:
        return ()
    return tuple(sorted(_addresses(names)))


def _addresses(names: Iterable[str]) -> Iterator[PciAddress]:
    """Those of some names that are addresses."""
    for name in names:
        try:
            yield PciAddress.parse(name)
        except BadAddress:
            continue


def _nearest(address: PciAddress, sysfs_root: str, most: int = 3) -> str:
    """Words for the functions nearest to an address that does not exist."""

    def distance(other: PciAddress) -> tuple[int, ...]:
        return tuple(abs(a - b) for a, b in zip(address, other, strict=True))

    near = sorted(functions(sysfs_root=sysfs_root), key=distance)[:most]
    if not near:
        return f"{sysfs_root}/bus/pci/devices shows no PCI functions at all"
    words = []
    for found in near:
        function = PciFunction(found, sysfs_root=sysfs_root)
        ids = f"{function.attribute('vendor') or '?'}:{function.attribute('device') or '?'}"
        words.append(f"{found} ({ids.replace('0x', '')}, class {function.attribute('class') or '?'})")
    return "the nearest are " + ", ".join(words)
