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
import time
from contextlib import suppress

from netbridge.errors import NetbridgeError, UsageError
from netbridge.ipc.offloads import ALL_OFFLOADS, HEADER_BYTES, Offload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

TUN = "/dev/net/tun"
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_TUNSETVNETLE, _TUNSETCARRIER = 0x400454DC, 0x400454E2
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_NAME_BYTES = 16
_IFF_UP, _RTMGRP_LINK = 1, 1  # linux/if.h, linux/rtnetlink.h
_RUNNING_SECONDS = 2.0
_ETHERNET_BYTES = 14 + 4  # with a VLAN tag
# What the kernel may leave to whoever reads from the device (TUN_F_*), and the offload of a session that it takes.
_TUN_CSUM, _TUN_TSO4, _TUN_TSO6, _TUN_TSO_ECN, _TUN_USO = 0x01, 0x02, 0x04, 0x08, 0x20 | 0x40
# A TCP frame that is never cut is as long as this at most, headers included (GSO_LEGACY_MAX_SIZE).
_LONGEST_UNCUT = 65536


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
            hint = "; load the module: modprobe tun" if error.errno in (errno.ENOENT, errno.ENODEV) else ""
            raise TapFailed(f"cannot open {TUN}: {error.strerror}{hint}") from None
        try:
            request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
            answer = fcntl.ioctl(self.fd, _TUNSETIFF, request)
            self.name = answer[:_NAME_BYTES].rstrip(b"\0").decode()
            self._set(_TUNSETVNETHDRSZ, HEADER_BYTES)
            self._set(_TUNSETVNETLE, 1)
            self._set(_TUNSETCARRIER, 0)
            self._carrier = False
            self._netlink: Any = IPRoute()
            self._index = socket.if_nametoindex(self.name)
        except OSError as error:
            os.close(self.fd)
            hint = {
                errno.EPERM: "; it takes CAP_NET_ADMIN: start the service as root",
                errno.EBUSY: "; somebody has it: choose another one with --name",
                errno.EINVAL: "; is there an interface of this name that is no TAP device? Choose another with --name",
            }.get(error.errno or 0, "")
            raise TapFailed(f"cannot make the TAP device {name}: {error.strerror}{hint}") from None

    def configure(self, addresses: Sequence[ipaddress.IPv4Interface | ipaddress.IPv6Interface]) -> None:
        """Brings it up with these addresses. Raises TapFailed."""
        self._change("bring it up", state="up")
        for address in addresses:
            try:
                self._netlink.addr("add", index=self._index, address=str(address.ip), mask=address.network.prefixlen)
            except Exception as error:
                hint = "; IPv6 is turned off here (sysctl net.ipv6.conf)" if _code(error) == errno.EACCES else ""
                raise TapFailed(f"cannot give {self.name} the address {address}: {_reason(error)}{hint}") from None

    @property
    def offloads(self) -> Offload:
        """What this kernel's devices can do for a session, and take from it. Linux has USO since 6.2."""
        try:
            self._set(_TUNSETOFFLOAD, _TUN_CSUM | _TUN_USO)
        except OSError:
            return ALL_OFFLOADS & ~(Offload.HOST_USO | Offload.GUEST_USO4 | Offload.GUEST_USO6)
        return ALL_OFFLOADS

    def begin(self, offloads: Offload, longest: int) -> None:
        """For a session with these offloads, in which a frame can have `longest` bytes: what its transmit side can do
        is left to it from now on. Raises TapFailed."""
        left = _left_to_session(offloads)
        try:
            self._set(_TUNSETOFFLOAD, left)
        except OSError as error:
            raise TapFailed(f"{self.name} cannot leave offloads {left:#x} to the device: {error.strerror}") from None
        uncut = min(_LONGEST_UNCUT, longest - _ETHERNET_BYTES)
        if left & ~_TUN_CSUM and self._present("IFLA_GSO_MAX_SIZE") != uncut:
            self._change(f"leave frames of up to {uncut} bytes uncut", gso_max_size=uncut)

    def follow(self, mac: bytes, mtu: int, link_up: bool) -> None:
        """Makes it as the device is: MAC address, MTU (as far as Linux can), and the link as its carrier. Raises
        TapFailed."""
        mtu = min(mtu, self._present("IFLA_MAX_MTU") or mtu)
        if self._present("IFLA_ADDRESS") != mac.hex(":"):
            self._change("set its MAC address", address=mac.hex(":"))
        if self._present("IFLA_MTU") != mtu:
            self._change(f"set its MTU to {mtu}", mtu=mtu)
        was_up = self._carrier
        self.set_carrier(link_up)
        if link_up and not was_up:
            self._await_running()

    def set_carrier(self, on: bool) -> None:
        """Raises TapFailed."""
        try:
            self._set(_TUNSETCARRIER, on)
        except OSError as error:
            raise TapFailed(f"{self.name}: {error.strerror}; was the interface removed?") from None
        self._carrier = on

    def _await_running(self) -> None:
        """Linux sees a carrier in its own time, and until then drops what is sent."""
        deadline = time.monotonic() + _RUNNING_SECONDS
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as changes:
            changes.bind((0, _RTMGRP_LINK))
            while self._is_starting() and (left := deadline - time.monotonic()) > 0:
                changes.settimeout(left)
                with suppress(OSError):  # TimeoutError, or ENOBUFS when there were many
                    changes.recv(1 << 16)

    def _is_starting(self) -> bool:
        if not self._present_flags() & _IFF_UP:
            return False  # and stays so, if that is the administrator's will
        return bool(self._present("IFLA_OPERSTATE") != "UP" or self._present("IFLA_QDISC") == "noop")

    def close(self) -> None:
        self._netlink.close()
        os.close(self.fd)

    def __enter__(self) -> TapDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set(self, request: int, value: int) -> None:
        # TUNSETOFFLOAD takes its argument as it is, the others a pointer to it.
        fcntl.ioctl(self.fd, request, value if request == _TUNSETOFFLOAD else struct.pack("i", value))

    def _present(self, attribute: str) -> Any:
        return self._link().get_attr(attribute)

    def _present_flags(self) -> int:
        return int(self._link()["flags"])

    def _link(self) -> Any:
        try:
            return self._netlink.get_links(self._index)[0]
        except Exception as error:
            raise TapFailed(f"{self.name} is not there any more: {_reason(error)}; was it removed?") from None

    def _change(self, what: str, **changes: Any) -> None:
        try:
            self._netlink.link("set", index=self._index, **changes)
        except Exception as error:
            raise TapFailed(f"cannot configure {self.name}: to {what}: {_reason(error)}") from None


def _left_to_session(offloads: Offload) -> int:
    """TUN_F_* of what the session can do with a frame that is sent. Linux knows no segments without a checksum."""
    if not offloads & Offload.CSUM:
        return 0
    left = _TUN_CSUM
    left |= _TUN_TSO4 if offloads & Offload.HOST_TSO4 else 0
    left |= _TUN_TSO6 if offloads & Offload.HOST_TSO6 else 0
    left |= _TUN_TSO_ECN if offloads & Offload.HOST_ECN and left & (_TUN_TSO4 | _TUN_TSO6) else 0
    left |= _TUN_USO if offloads & Offload.HOST_USO else 0
    return left


def _reason(error: Exception) -> str:
    """pyroute2's errors have a number of errno in `code`, and know its words only as a pair."""
    code = _code(error)
    return str(error) if code is None else os.strerror(code)


def _code(error: Exception) -> int | None:
    code = getattr(error, "code", None)
    return code if isinstance(code, int) else None
