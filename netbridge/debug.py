"""The debug verbs: raw reads and writes of a function's configuration space and BARs, for those whose manifest grants
CAP_SYSCALL_RAW. The driver itself never needs that grant.

    netbridge debug config vnode.yml             the whole configuration space
    netbridge debug config vnode.yml 0x3c        one register
    netbridge debug bar vnode.yml 4 0x14 --width 1 [--write 0]

The function is claimed as `netbridge run` does, and given back; so not while a driver has it.
"""

from __future__ import annotations

import argparse

from netbridge.errors import ExitCode, UsageError

WIDTHS = (1, 2, 4, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two verbs below `netbridge debug`."""
    parser.description = (
        "Reads or writes registers of the function that the manifest names, one access of exactly the width given. "
        "Needs root, and CAP_SYSCALL_RAW in the manifest. Reading a register can have effects, writing any effect."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    config = verbs.add_parser("config", help="configuration space")
    config.add_argument("manifest", help="a vnode.yml, or the name of one that comes with the package")
    config.add_argument("offset", nargs="?", type=_number, help="the register; without it, all of them are shown")
    bar = verbs.add_parser("bar", help="a BAR's registers")
    bar.add_argument("manifest", help="a vnode.yml, or the name of one that comes with the package")
    bar.add_argument("index", type=int, choices=range(6), metavar="BAR", help="which BAR, 0 to 5")
    bar.add_argument("offset", type=_number, help="the register")
    config.set_defaults(index=None)
    for each in (config, bar):
        each.add_argument("--width", type=int, choices=WIDTHS, default=4, help="bytes (default: %(default)s)")
        each.add_argument("--write", type=_number, metavar="VALUE", help="write this instead of reading")


def main(options: argparse.Namespace) -> int:
    """Does it, and returns the exit code. Raises NetbridgeError or vfio.VfioError."""
    import vfio
    from netbridge.vnode.capabilities import PCI, RAW
    from netbridge.vnode.manifest import Manifest

    granted = Manifest.open(options.manifest).capabilities
    granted.require(RAW, "reading and writing registers raw")
    granted.require(PCI, "claiming the function")
    assert granted.pci_function is not None
    if options.index is None and options.width == 8:
        raise UsageError("configuration space is read and written by 1, 2 or 4 bytes; choose such a --width")
    if options.offset is None and options.write is not None:
        raise UsageError("--write needs to know which register; give its offset")
    with vfio.bind(granted.pci_function), vfio.open_device(granted.pci_function) as device:
        if options.offset is None:
            print(_dump(device.config.read(0, device.config.size)))
            return ExitCode.OK
        registers = device.config if options.index is None else device.bar(options.index)
        bits = 8 * options.width
        if options.write is not None:
            getattr(registers, f"write{bits}")(options.offset, options.write)
        else:
            print(f"{getattr(registers, f'read{bits}')(options.offset):#0{2 + bits // 4}x}")
    return ExitCode.OK


def _dump(data: bytes) -> str:
    """Sixteen bytes a line; lines of zeroes beyond the standard header are left out."""
    rows = ((at, data[at : at + 16]) for at in range(0, len(data), 16))
    return "\n".join(f"{at:03x}: {row.hex(' ')}" for at, row in rows if at < 0x40 or any(row))


def _number(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 60 or 0x3c")
    return value
