"""A TAP device as the Linux stack's end of a session: made, configured through netlink, kept in step with the device.

It exists for as long as it is open here. Whether the link is up shows as its carrier, so that its being up or down, its
addresses and its routes stay the administrator's. Source: linux/if_tun.h, Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import struct

from netbridge.errors import NetbridgeError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

TUN = "/dev/net/tun"
_TUNSETIFF, _TUNSETCARRIER = 0x400454CA, 0x400454E2
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_NAME_BYTES = 16


class TapFailed(NetbridgeError):
    """The TAP device cannot be made or configured."""


class TapDevice:
    """A TAP device of this name ("%d" in it: the next free number). Needs CAP_NET_ADMIN. Raises TapFailed, UsageError.

    `fd` is for the frames, non-blocking. Close it, or use it in a `with`."""

    def __init__(self, name: str) -> None:
        if not 1 <= len(name.encode()) < _NAME_BYTES or "/" in name or not name.isprintable() or " " in name:
            raise UsageError(
                f"interface name {name!r}: expected 1 to {_NAME_BYTES - 1} characters, no blank and no slash"
            )
        try:
            from pyroute2 import IPRoute
        except ImportError:
            raise TapFailed(
                "pyroute2 is missing, which configures the interface: pip install 'netbridge[tap]'"
            ) from None
        try:
            self.fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise TapFailed(f"cannot open {TUN}: {error.strerror}; is the module tun loaded?") from None
        try:
            request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI)
            answer = fcntl.ioctl(self.fd, _TUNSETIFF, request)
            self.name = answer[:_NAME_BYTES].rstrip(b"\0").decode()
            self.set_carrier(False)
            self._netlink: Any = IPRoute()
            self._index = socket.if_nametoindex(self.name)
        except OSError as error:
            os.close(self.fd)
            hint = {
                errno.EPERM: "; it takes CAP_NET_ADMIN: start the service as root",
                errno.EBUSY: "; somebody has it: choose another one with --name",
            }.get(error.errno or 0, "")
            raise TapFailed(f"cannot make the TAP device {name}: {error.strerror}{hint}") from None

    def configure(self, addresses: Sequence[ipaddress.IPv4Interface | ipaddress.IPv6Interface]) -> None:
        """Brings it up with these addresses. Raises TapFailed."""
        self._change("bring it up", state="up")
        for address in addresses:
            try:
                self._netlink.addr("add", index=self._index, address=str(address.ip), mask=address.network.prefixlen)
            except Exception as error:
                raise TapFailed(f"cannot give {self.name} the address {address}: {_reason(error)}") from None

    def follow(self, mac: bytes, mtu: int, link_up: bool) -> None:
        """Makes it as the device is: MAC address, MTU, and the link as its carrier. Raises TapFailed."""
        present = self._netlink.get_links(self._index)[0]
        if present.get_attr("IFLA_ADDRESS") != mac.hex(":"):
            self._change("set its MAC address", address=mac.hex(":"))
        if present.get_attr("IFLA_MTU") != mtu:
            self._change(f"set its MTU to {mtu}", mtu=mtu)
        self.set_carrier(link_up)

    def set_carrier(self, on: bool) -> None:
        fcntl.ioctl(self.fd, _TUNSETCARRIER, struct.pack("i", on))

    def close(self) -> None:
        self._netlink.close()
        os.close(self.fd)

    def __enter__(self) -> TapDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _change(self, what: str, **changes: Any) -> None:
        try:
            self._netlink.link("set", index=self._index, **changes)
        except Exception as error:
            raise TapFailed(f"cannot configure {self.name}: to {what}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """pyroute2's errors have a number of errno in `code`, and know its words only as a pair."""
    code = getattr(error, "code", None)
    return os.strerror(code) if isinstance(code, int) else str(error)
