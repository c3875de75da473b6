"""A network interface of this machine as the wire to a box: what a Wire is to a guest, by AF_PACKET (packet(7)).

The interface is to be there for the tests alone: up, without an address, member of nothing. As long as it is the wire
the kernel says nothing of its own on it (no IPv6), merges no frames (GRO, LRO), and takes every frame, whomever it is
for; all of that is put back at the end. A VLAN tag that the kernel or the NIC has taken off a frame is put on again.

A real segment carries more than the tests' own frames: a switch's LLDP and STP, neighbours' broadcasts. A frame is
handed on when it comes from the box's NIC, or from an address that a frame was sent to: an answer. What comes from
anybody else is noise: captured and counted, not handed on. The box hears that noise, too: for a test that keeps account
of every frame the two NICs are best joined by a cable.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyroute2 import Ethtool, IPRoute

from qemu.errors import HarnessError
from qemu.packets import AUXDATA, ETH_P_ALL, PACKET_AUXDATA, SO_RCVBUFFORCE, SOL_PACKET, tag_of
from qemu.wire import Wire, WireClosed

IFF_UP = 1  # linux/if.h
PACKET_ADD_MEMBERSHIP, PACKET_IGNORE_OUTGOING = 1, 23  # linux/if_packet.h
PACKET_MR_PROMISC = 1
RECEIVE_BYTES = 64 << 20
LONGEST = 65_535
MERGERS = ("rx-gro", "rx-lro", "rx-gro-hw", "rx-gro-list", "rx-udp-gro-forwarding")
"""Features by which a NIC or the kernel makes one frame of several."""
IPV6_OFF = "/proc/sys/net/ipv6/conf/{}/disable_ipv6"


class Interface(NamedTuple):
    """What there is to know of an interface before it is taken for a wire."""

    name: str
    up: bool
    addresses: tuple[str, ...]
    master: str | None
    mtu: int


def interfaces() -> dict[str, Interface]:
    """The interfaces of this network namespace, by name."""
    with IPRoute() as routes:
        links = list(routes.get_links())
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in links}
        addresses: dict[int, list[str]] = {}
        for entry in routes.get_addr():
            addresses.setdefault(entry["index"], []).append(str(entry.get_attr("IFA_ADDRESS")))
        return {
            names[link["index"]]: Interface(
                names[link["index"]],
                bool(link["flags"] & IFF_UP),
                tuple(addresses.get(link["index"], ())),
                names.get(link.get_attr("IFLA_MASTER")),
                int(link.get_attr("IFLA_MTU") or 0),
            )
            for link in links
        }


def obstacle(name: str, there: dict[str, Interface]) -> str | None:
    """Why an interface cannot be the wire, and what to do; None when it can."""
    found = there.get(name)
    if found is None:
        return f"there is no interface {name} on this machine, only {', '.join(sorted(there))}"
    if name == "lo":
        return "lo is no wire: name the interface whose cable goes to the box's NIC"
    # A link-local one every interface has that is up.
    used = [address for address in found.addresses if not address.startswith("fe80:")]
    if used:
        return (
            f"{name} has the address {used[0]}, so this machine uses it: the wire is an interface of its own. "
            f"If it is: ip address flush dev {name}"
        )
    if found.master is not None:
        return f"{name} belongs to {found.master}: the wire is an interface of its own (ip link set {name} nomaster)"
    if not found.up:
        return f"the interface {name} is down: ip link set {name} up"
    return None


class InterfaceWire(Wire):
    """The wire to the NIC that has the address `mac`. Raises HarnessError with what to do when it cannot be had."""

    def __init__(self, interface: str, mac: str, pcap: Path | None = None):
        self.closed = True
        self.noise = 0
        """Frames that were neither from the box's NIC nor an answer."""
        self._ours = {bytes.fromhex(mac.replace(":", ""))}
        self._interface = interface
        if reason := obstacle(interface, interfaces()):
            raise HarnessError(reason)
        self._quiet = contextlib.ExitStack()
        try:
            super().__init__(pcap, interface)
        except BaseException:
            self._quiet.close()
            raise

    def _open(self) -> tuple[socket.socket, socket.socket | None]:
        name = self._interface
        try:
            opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        except PermissionError as error:
            raise HarnessError(
                f"{name} cannot be the wire: that takes root, or CAP_NET_RAW and CAP_NET_ADMIN"
            ) from error
        try:
            self._quiet.enter_context(_quiet(name))
            membership = struct.pack("iHH8s", socket.if_nametoindex(name), PACKET_MR_PROMISC, 0, b"")
            opened.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, membership)
            opened.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            opened.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BYTES)
            # Last, so that nothing comes that was not to come.
            opened.bind((name, ETH_P_ALL))
        except OSError as error:
            opened.close()
            raise HarnessError(f"{name} cannot be the wire: {error.strerror} (it takes root)") from error
        return opened, None

    def netdev(self, ident: str) -> str:
        raise ValueError(f"the interface {self.name} is the wire of a box, not of a guest of QEMU's (netdev {ident})")

    def fds(self) -> Sequence[int]:
        return ()

    def attached(self) -> None:
        """There is no other end to let go of."""

    def _receive(self) -> bytes | None:
        try:
            data, ancillary, _, _ = self._socket.recvmsg(LONGEST, socket.CMSG_SPACE(AUXDATA.size), socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno == errno.ENETDOWN:
                return None  # told once; it may come up again, and until then sending says so
            raise
        data = data[:12] + tag_of(ancillary) + data[12:]  # as it was on the cable
        if data[6:12] in self._ours:
            return data
        self.noise += 1
        self._note_noise(data)
        return None

    def _give(self, data: bytes) -> None:
        if not data[0] & 1:  # to one station: what it sends is an answer
            self._ours.add(data[:6])
        try:
            self._socket.send(data, socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise BlockingIOError from error
            if error.errno == errno.EMSGSIZE:
                mtu = interfaces()[self.name].mtu
                raise ValueError(
                    f"a frame of {len(data)} bytes does not pass {self.name}, whose MTU is {mtu}"
                ) from error
            raise

    def _gone(self, error: OSError) -> WireClosed:
        return WireClosed(f"{self.name}: no frame can be sent: {error.strerror}")

    def close(self) -> None:
        """As any wire, and the interface is as it was."""
        super().close()
        self._quiet.close()


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """The kernel says nothing of its own on the interface, and hands on frames as they came."""
    with contextlib.ExitStack() as stack:
        path = Path(IPV6_OFF.format(name))
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            before = path.read_text()
            path.write_text("1")
            stack.callback(_put_back, path, before)
        with contextlib.closing(Ethtool()) as ethtool:
            merging = _merging(ethtool, name)
            if merging:
                _set_features(ethtool, name, merging, False)
                stack.callback(_merge_again, name, merging)
        yield


def _put_back(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # the interface may have gone
        path.write_text(text)


def _merging(ethtool: Any, name: str) -> list[str]:
    features = ethtool.get_features(name).features
    return [word for word in MERGERS if word in features and features[word].enable and features[word].available]


def _set_features(ethtool: Any, name: str, words: Sequence[str], on: bool) -> None:
    wanted = ethtool.get_features(name)
    for word in words:
        wanted.features[word].enable = on
    ethtool.set_features(name, wanted)


def _merge_again(name: str, words: Sequence[str]) -> None:
    with contextlib.suppress(OSError), contextlib.closing(Ethtool()) as ethtool:
        _set_features(ethtool, name, words, True)
