"""What the services take on the command line; apart from them, because it is shown where the C core was never built."""

from __future__ import annotations

import argparse

from netbridge.ipc.messages import DEFAULT_SOCKET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv4Interface, IPv6Interface

MOST_SNAP_LENGTH = 131072


def common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", default=DEFAULT_SOCKET, metavar="PATH", help="the driver's socket (%(default)s)")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="keep trying to connect that long (%(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="end with the session, whatever ended it")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead of words")


def capture(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Takes the port as its service and writes every frame that comes to a pcapng file, with timestamps in "
        "nanoseconds. Frames are taken, not answered."
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="the file, overwritten if it is there; - is standard output, for: netbridge capture --out - | tshark -r -",
    )
    parser.add_argument("--count", type=_positive(int), metavar="N", help="end after so many frames")
    parser.add_argument("--seconds", type=_positive(float), metavar="S", help="end after so long")
    parser.add_argument(
        "--snap-length",
        type=_positive(int),
        metavar="BYTES",
        default=MOST_SNAP_LENGTH,
        help="keep so much of each frame (default, and most: %(default)s)",
    )
    parser.add_argument(
        "--counters",
        metavar="PATH",
        help="the driver's counters page, for what it dropped (default: beside the socket)",
    )
    common(parser)


def tap(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Puts the Linux stack behind the port: makes a TAP device that has the NIC's MAC address, MTU and link, and "
        "moves frames between the two. Needs CAP_NET_ADMIN, and keeps nothing else of being root."
    )
    parser.add_argument("--name", default="nb%d", help="the interface's name; %%d is a number (nb%%d)")
    parser.add_argument(
        "--address",
        metavar="ADDRESS/LENGTH",
        action="append",
        default=[],
        type=_interface,
        help="an IPv4 or IPv6 address for it, such as 192.0.2.2/24; may be repeated",
    )
    parser.add_argument(
        "--user", default="aethernet", help="the user to be, when it is started as root (default: %(default)s)"
    )
    parser.add_argument(
        "--no-offloads",
        action="store_true",
        help="have the kernel cut TCP and make checksums itself, whatever the device can do",
    )
    parser.add_argument("--capture", metavar="FILE", help="write the frames of both directions to a pcapng file")
    common(parser)


def _interface(text: str) -> IPv4Interface | IPv6Interface:
    import ipaddress

    try:
        return ipaddress.ip_interface(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; expected one such as 192.0.2.2/24") from None


def _positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < 1 << 63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive {'whole ' if kind is int else ''}number")
        return value

    return parse
