"""Which PCI functions are modern virtio network devices (virtio 1.3 §4.1.2), and what the others are, in words."""

from __future__ import annotations

from netbridge.virtio.errors import NotVirtioNet

VIRTIO_VENDOR = 0x1AF4
FIRST_TRANSITIONAL, LAST_TRANSITIONAL = 0x1000, 0x103F
FIRST_MODERN, LAST_MODERN = 0x1040, 0x107F  # 0x1040 + the virtio device type (§4.1.2.1)
NETWORK_MODERN = 0x1041
NETWORK_TRANSITIONAL = 0x1000

_TYPES = {
    1: "network",
    2: "block",
    3: "console",
    4: "entropy",
    5: "balloon",
    8: "SCSI",
    9: "9P",
    16: "GPU",
    18: "input",
    19: "socket",
    20: "crypto",
    23: "IOMMU",
    26: "file system",
}
_TRANSITIONAL_TYPES = {0: 1, 1: 2, 2: 5, 3: 3, 4: 8, 5: 4, 9: 9}
_CLASSES = {
    0x01: "mass storage",
    0x02: "network",
    0x03: "display",
    0x04: "multimedia",
    0x05: "memory",
    0x06: "bridge",
    0x07: "communication",
    0x08: "system peripheral",
    0x09: "input",
    0x0C: "serial bus",
    0x0D: "wireless",
    0x12: "accelerator",
}


def require_virtio_net(name: str, vendor_id: int, device_id: int, class_code: int) -> None:
    """Raises NotVirtioNet, saying what it is instead, unless these are the ids of a modern virtio network device.

    Touches nothing, so ask before a function is taken away from its driver. `class_code` has 24 bits.
    """
    if vendor_id == VIRTIO_VENDOR and device_id == NETWORK_MODERN:
        return
    ids = f"{vendor_id:04x}:{device_id:04x}"
    if vendor_id == VIRTIO_VENDOR and device_id == NETWORK_TRANSITIONAL:
        raise NotVirtioNet(
            f"{name} is a transitional virtio network device ({ids}); this driver speaks the modern layout only "
            f"({VIRTIO_VENDOR:04x}:{NETWORK_MODERN:04x}): with QEMU add disable-legacy=on to its -device option"
        )
    if vendor_id == VIRTIO_VENDOR and FIRST_TRANSITIONAL <= device_id <= LAST_MODERN:
        is_modern = device_id >= FIRST_MODERN
        number = device_id - FIRST_MODERN if is_modern else _TRANSITIONAL_TYPES.get(device_id - FIRST_TRANSITIONAL, -1)
        kind = _TYPES.get(number, "unknown" if number < 0 else f"type {number}")
        what = f"a {'' if is_modern else 'transitional '}virtio device of another kind ({kind}, {ids})"
    else:
        what = f"not a virtio device but {ids}, class {class_code:06x}"
        if class_code >> 16 in _CLASSES:
            what += f" ({_CLASSES[class_code >> 16]})"
    raise NotVirtioNet(
        f"{name} is {what}; this driver needs a virtio network device, {VIRTIO_VENDOR:04x}:{NETWORK_MODERN:04x}: "
        "`lspci -nn -d 1af4:` lists virtio devices"
    )
