"""Checksum and segmentation offload with the host's kernel as the peer, at the other end of a TAP device that carries
virtio headers.

What the kernel leaves undone must reach the service as it is, with a header that says so; what the service leaves
undone the kernel must do, which shows behind a bridge on a second interface that can do nothing: there, real frames
come out, and each is compared byte for byte with what RFC 9293, 768 and 1624 would have it be. QEMU 7.2 knows no USO.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from pyroute2 import IPRoute
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from scapy.utils import checksum

from netbridge.client import Offload, VirtioNetHeader
from qemu.command import Nic
from qemu.guest import Guest
from qemu.guest_process import GuestProcess
from qemu.packets import ETH_P_ALL, PACKET_OUTGOING, SOL_PACKET
from qemu.session import Session
from qemu.tap import Tap
from tests.e2e import testbed
from tests.e2e.account import check_spotless

pytestmark = pytest.mark.needs_root

SECONDS = 60.0
PACKET_VNET_HDR = 15  # linux/if_packet.h
NET_HEADER = struct.Struct("<BBHHHH")  # linux/virtio_net.h, without num_buffers
NEEDS_CSUM = 1
GSO_TCPV4, GSO_TCPV6, GSO_ECN = 1, 4, 0x80
PEER = "52:54:00:00:00:fe"
STRANGER = "52:54:00:00:00:fd"  # behind the bridge
MSS = 1448
BUFFER = 2048 - 64  # bytes of a frame in one receive buffer, less its headroom
ETHERNET = 14
MOST = 65535  # bytes of an IP packet; and of a frame that the kernel hands on without cutting it
TSO = Offload.CSUM | Offload.HOST_TSO4 | Offload.HOST_TSO6 | Offload.HOST_ECN
LRO = Offload.GUEST_CSUM | Offload.GUEST_TSO4 | Offload.GUEST_TSO6 | Offload.GUEST_ECN
USO = Offload.HOST_USO | Offload.GUEST_USO4 | Offload.GUEST_USO6


# Fields that scapy fills in.
MADE = {IP: ("len", "chksum"), IPv6: ("plen",), TCP: ("chksum",), UDP: ("len", "chksum")}


class Unfinished(NamedTuple):
    """A frame as it is handed on, with the virtio header that says what is missing, and what it is in the end."""

    frame: bytes
    header: VirtioNetHeader
    finished: tuple[bytes, ...]


# ---- What a frame has to become, from scapy and arithmetic


def finish(packet: Packet) -> bytes:
    """The packet with lengths and checksums as they have to be."""
    fresh = packet.copy()
    for layer, names in MADE.items():
        if layer in fresh:
            for name in names:
                fresh[layer].delfieldval(name)
    return bytes(fresh)


def partial(packet: Packet, transport: type[Packet]) -> bytes:
    """The packet with the checksum of its pseudo header only, where the whole sum belongs (virtio 1.3 §5.1.6.2)."""
    whole = Ether(finish(packet))
    data = bytes(whole[transport])
    number = {TCP: 6, UDP: 17}[transport]
    if IP in whole:
        addresses = socket.inet_aton(whole[IP].src) + socket.inet_aton(whole[IP].dst)
        pseudo = addresses + struct.pack(">HH", number, len(data))
    else:
        addresses = b"".join(socket.inet_pton(socket.AF_INET6, text) for text in (whole[IPv6].src, whole[IPv6].dst))
        pseudo = addresses + struct.pack(">II", len(data), number)
    whole[transport].chksum = checksum(pseudo) ^ 0xFFFF
    return bytes(whole)


def csum_start(packet: Packet, transport: type[Packet]) -> int:
    return len(packet) - len(packet[transport])


def network(version: int) -> Packet:
    if version == 4:
        return IP(src="192.0.2.1", dst="192.0.2.2", id=1000, flags="DF")
    return IPv6(src="2001:db8::1", dst="2001:db8::2", fl=0x12345)


def one_checksum(ether: Ether, version: int, transport: type[Packet], size: int) -> Unfinished:
    """A frame whose checksum is still to be made; nothing is cut."""
    head = TCP(sport=4000, dport=5000, seq=7, flags="PA") if transport is TCP else UDP(sport=4000, dport=5000)
    packet = ether / network(version) / head / Raw(pattern(size))
    offset = 16 if transport is TCP else 6
    header = VirtioNetHeader(flags=NEEDS_CSUM, csum_start=csum_start(packet, transport), csum_offset=offset)
    return Unfinished(partial(packet, transport), header, (finish(packet),))


def to_be_cut(ether: Ether, version: int, size: int, flags: str = "PA") -> Unfinished:
    """A TCP segment longer than any frame, and the segments that are to be made of it: sequence numbers and IP ids go
    on, PSH and FIN are the last one's, CWR is the first one's."""
    options = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]
    tcp = TCP(sport=4000, dport=5000, seq=0xFFFFF000, ack=9, flags=flags, options=options)
    packet = ether / network(version) / tcp / Raw(pattern(size))
    start = csum_start(packet, TCP)
    gso = (GSO_TCPV4 if version == 4 else GSO_TCPV6) | (GSO_ECN if "C" in flags else 0)
    header = VirtioNetHeader(NEEDS_CSUM, gso, start + 32, MSS, start, 16)
    payload = pattern(size)
    finished = []
    for number, at in enumerate(range(0, size, MSS)):
        each = ether / network(version) / tcp / Raw(payload[at : at + MSS])
        if version == 4:
            each[IP].id = 1000 + number
        each[TCP].seq = (0xFFFFF000 + at) % (1 << 32)
        is_last = at + MSS >= size
        each[TCP].flags = "".join(
            flag for flag in flags if not (flag in "PF" and not is_last) and not (flag == "C" and number)
        )
        finished.append(finish(each))
    return Unfinished(partial(packet, TCP), header, tuple(finished))


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


CASES = {
    "checksum-udp4": lambda ether: one_checksum(ether, 4, UDP, 1200),
    "checksum-udp6": lambda ether: one_checksum(ether, 6, UDP, 1201),
    "checksum-tcp4": lambda ether: one_checksum(ether, 4, TCP, 1),
    "checksum-tcp6": lambda ether: one_checksum(ether, 6, TCP, 1300),
    "tso4": lambda ether: to_be_cut(ether, 4, 40_000),
    "tso4-longest": lambda ether: to_be_cut(ether, 4, MOST - ETHERNET - 52),
    "tso4-two": lambda ether: to_be_cut(ether, 4, MSS + 1, "FPA"),
    "tso4-ecn": lambda ether: to_be_cut(ether, 4, 10 * MSS, "CPA"),
    "tso6": lambda ether: to_be_cut(ether, 6, 30_001),
}


# ---- The host's end


class Host:
    """`tap0` is the NIC's other end, with a socket of the kernel's that gives and takes virtio headers; behind a bridge
    is `plain`, whose frames are read as they would be on a wire."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(Tap(offloads=False, name="plain", beside=tap))
            (self.plain,) = plain.fds()
            self.headed = stack.enter_context(tap.inside(self._make))
            self._stack = stack.pop_all()

    def _make(self) -> socket.socket:
        with IPRoute() as routes:
            routes.link("add", ifname="br0", kind="bridge")
            (bridge,) = routes.link_lookup(ifname="br0")
            for name in (self.tap.name, "plain"):
                (index,) = routes.link_lookup(ifname=name)
                routes.link("set", index=index, master=bridge)
            routes.link("set", index=bridge, state="up")
        headed = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        headed.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        headed.bind((self.tap.name, ETH_P_ALL))
        headed.settimeout(SECONDS)
        return headed

    def give(self, unfinished: Unfinished) -> None:
        """Has the kernel send it out of tap0, to the guest."""
        self.headed.send(NET_HEADER.pack(*unfinished.header[:6]) + unfinished.frame)

    def taken(self, source: str) -> tuple[VirtioNetHeader, bytes]:
        """The next frame from this address as it came into tap0, with the kernel's idea of what is still to be done."""
        while True:
            data, (_, _, kind, _, _) = self.headed.recvfrom(1 << 17)
            frame = data[NET_HEADER.size :]
            if kind != PACKET_OUTGOING and frame[6:12] == as_bytes(source):
                return VirtioNetHeader(*NET_HEADER.unpack_from(data)), frame

    def on_the_wire(self, source: str, count: int) -> list[bytes]:
        """The next frames from this address that come out of `plain`."""
        found: list[bytes] = []
        poller = select.poll()
        poller.register(self.plain, select.POLLIN)
        while len(found) < count:
            assert poller.poll(SECONDS * 1000), f"{len(found)} of {count} frames left the bridge in {SECONDS:g} s"
            frame = os.read(self.plain, 1 << 17)
            if frame[6:12] == as_bytes(source):
                found.append(frame)
        return found

    def close(self) -> None:
        self._stack.close()


def as_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


# ---- The guest's end


class Service:
    """offload_service in the guest."""

    def __init__(self, driver: GuestProcess, process: GuestProcess, mac: str) -> None:
        self.mac = mac
        self.driver, self._process = driver, process
        self._lines = process.lines(timeout=SECONDS)
        facts = self._next()
        self.offloads = Offload(facts["offloads"])
        self.largest: int = facts["largest"]

    def _next(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(next(self._lines))
        return said

    def _ask(self, **asked: object) -> dict[str, Any]:
        self._process.write(json.dumps(asked).encode() + b"\n")
        return self._next()

    def send(self, *frames: tuple[bytes, VirtioNetHeader | None]) -> None:
        told = [(base64.b64encode(frame).decode(), header) for frame, header in frames]
        assert self._ask(send=told) == {"sent": len(frames)}

    def receive(self, count: int) -> list[tuple[bytes, VirtioNetHeader | None, int]]:
        """The next frames from PEER: bytes, header, and in how many buffers."""
        found = self._ask(**{"receive": count, "from": PEER})["frames"]
        assert len(found) == count, f"{len(found)} of {count} frames came in {SECONDS:g} s"
        return [
            (
                base64.b64decode(each["frame"]),
                None if each["header"] is None else VirtioNetHeader(*each["header"]),
                each["buffers"],
            )
            for each in found
        ]

    def end(self) -> dict[str, Any]:
        self._process.close_stdin()
        assert self._process.wait(testbed.STOP_SECONDS) == 0, self._process.stderr
        testbed.end(self.driver)
        counters: dict[str, Any] = json.loads(self.driver.stdout.splitlines()[-1])
        return counters


@contextlib.contextmanager
def serving(guest: Guest, offloads: Offload, options: Sequence[str] = ()) -> Iterator[Service]:
    pci = testbed.nics(guest)[0][0]
    guest.put(testbed.manifest(pci).encode(), testbed.MANIFEST)
    command = testbed.netbridge("run", testbed.MANIFEST, "--json", *options)
    with guest.start(command, log=guest.artefacts / "driver.log") as driver:
        mac = testbed.wait_for_line(driver, r" prepared .*\bmac=(\S+)")[1]
        words = ["python3", "-m", "tests.e2e.offload_service", testbed.SOCKET, str(int(offloads))]
        log = guest.artefacts / "service.log"
        with guest.start(words, user=testbed.SERVICE_USER, stdin=True, log=log) as process:
            testbed.wait_for_line(driver, r" serving ")
            service = Service(driver, process, mac)
            yield service
            counters = service.end()
    check_spotless(counters)
    assert not guest.iommu_faults()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Tap() as tap, contextlib.closing(Host(tap)) as host:
        yield host


@pytest.fixture(scope="module")
def guest_of(guests: Session, host: Host) -> Iterator[Guest]:
    with guests.boot("offloads", nics=[Nic(wire=host.tap)], snapshot=False) as guest:
        yield guest


@pytest.fixture(scope="class")
def service(guest_of: Guest) -> Iterator[Service]:
    """A service that can take all offloads that there are."""
    with serving(guest_of, TSO | LRO | USO) as service:
        yield service


class TestAllOffloads:
    def test_what_is_agreed(self, service: Service) -> None:
        assert service.offloads == TSO | LRO, "QEMU 7.2 offers no USO"
        assert service.largest == MOST + 22

    @pytest.mark.parametrize("case", CASES)
    def test_what_the_kernel_leaves_undone_reaches_the_service(self, service: Service, host: Host, case: str) -> None:
        """Whole, however long, over as many buffers as it takes, with a header that says what is to be done."""
        unfinished = CASES[case](Ether(dst=service.mac, src=PEER))
        host.give(unfinished)
        ((frame, header, buffers),) = service.receive(1)
        assert frame == unfinished.frame
        assert header is not None
        # hdr_len is a hint (virtio 1.3 §5.1.6.4): the kernel's is of what it has in one piece.
        wanted = unfinished.header._replace(hdr_len=header.hdr_len, num_buffers=buffers)
        assert header == wanted
        if unfinished.header.gso_type:
            assert header.hdr_len >= unfinished.header.hdr_len
        assert (buffers > 1) == (len(frame) > BUFFER)

    @pytest.mark.parametrize("case", CASES)
    def test_what_the_service_leaves_undone_the_kernel_does(self, service: Service, host: Host, case: str) -> None:
        unfinished = CASES[case](Ether(dst=STRANGER, src=service.mac))
        service.send((unfinished.frame, unfinished.header))
        header, frame = host.taken(service.mac)
        assert frame == unfinished.frame
        assert header._replace(hdr_len=0) == unfinished.header._replace(hdr_len=0), "as the kernel understood it"
        assert host.on_the_wire(service.mac, len(unfinished.finished)) == list(unfinished.finished)

    def test_finished_frames_go_both_ways_with_an_empty_header(self, service: Service, host: Host) -> None:
        finished = CASES["checksum-tcp4"](Ether(dst=service.mac, src=PEER)).finished[0]
        host.give(Unfinished(finished, VirtioNetHeader(), ()))
        ((frame, header, _),) = service.receive(1)
        assert frame == finished
        assert header is not None
        assert (header.flags & NEEDS_CSUM, header.gso_type) == (0, 0)
        answer = CASES["checksum-tcp4"](Ether(dst=STRANGER, src=service.mac)).finished[0]
        for given in (None, VirtioNetHeader()):
            service.send((answer, given))
            assert host.on_the_wire(service.mac, 1) == [answer]


@pytest.mark.parametrize(
    ("offloads", "options"),
    [(Offload(0), ()), (TSO | LRO, ("--without", "GUEST_TSO4", "--without", "GUEST_TSO6", "--without", "GUEST_CSUM"))],
    ids=["not-asked-for", "turned-off"],
)
def test_without_receive_offloads_the_kernel_finishes_frames_first(
    guest_of: Guest, host: Host, offloads: Offload, options: Sequence[str]
) -> None:
    with serving(guest_of, offloads, options) as service:
        assert not service.offloads & LRO
        for case in CASES:
            unfinished = CASES[case](Ether(dst=service.mac, src=PEER))
            host.give(unfinished)
            came = service.receive(len(unfinished.finished))
            assert [frame for frame, _, _ in came] == list(unfinished.finished), case
            assert all(header is None for _, header, _ in came)
