"""The tap service with a real TAP device, in a network namespace: the kernel answers what the driver brings."""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import inet_aton
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from netbridge.ipc.errors import Reason
from netbridge.ipc.offloads import GSO_TCPV4, NEEDS_CSUM, Offload, VirtioNetHeader
from netbridge.ipc.server import ClientReady
from tests.unit.port_fakes import DEADLINE_SECONDS, FACTS, MAC, STRIDE, FakeRings, OfferedSession, ServedPort

PEER_MAC, PEER, OURS = "02:00:00:00:00:01", "192.0.2.1", "192.0.2.2"
ROOM = STRIDE - 64
# No router solicitations and the like: what comes is what was asked for.
QUIET = "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6"


def may_make_one() -> bool:
    probe = ["unshare", "--net", "--mount", "sh", "-c", f"test -w /dev/net/tun && {QUIET}"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not may_make_one(), reason="network namespaces or /dev/net/tun: not for this user"),
]


@contextmanager
def tap(path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    service = [sys.executable, "-m", "netbridge.services.tap", "--socket", str(path), "--user", str(os.geteuid())]
    command = ["unshare", "--net", "sh", "-c", f'{QUIET}; exec "$@"', "sh", *service, "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def session(
    tmp_path: Path, *options: str, **geometry: Any
) -> Iterator[tuple[FakeRings, ServedPort, subprocess.Popen[str]]]:
    path = tmp_path / "aethernet.sock"
    with (
        OfferedSession(**geometry) as offered,
        ServedPort(path, agree=lambda asked: asked & offered.session.offloads) as port,
    ):
        with port.paused() as server:
            server.offer(offered.session)
        driver = FakeRings(offered)
        with tap(path, "--address", f"{OURS}/24", "--name", "nb7", "--wait", "60", *options) as process:
            # Longer than other services: it imports pyroute2, and makes a network namespace.
            assert isinstance(port.events.get(timeout=6 * DEADLINE_SECONDS), ClientReady)
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["event"] == "connected"
            yield driver, port, process


def inside(process: subprocess.Popen[str], *command: str) -> str:
    namespace = ["nsenter", f"--net=/proc/{process.pid}/ns/net"]
    return subprocess.run([*namespace, *command], capture_output=True, text=True, check=True).stdout


def link(process: subprocess.Popen[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(inside(process, "ip", "-json", "link", "show", "nb7"))[0]
    return found


def resolve(driver: FakeRings) -> None:
    """The first frame of any conversation; the answer shows that the interface is up."""
    driver.deliver(bytes(Ether(src=PEER_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=PEER_MAC, psrc=PEER, pdst=OURS)))
    (answer,) = driver.await_sent(1)
    reply = Ether(answer)
    assert (reply.src, reply[ARP].op, reply[ARP].psrc) == (MAC.hex(":"), 2, OURS)


def await_icmp(driver: FakeRings) -> ICMP:
    """The next ICMP message; the kernel's questions about our address are answered."""
    found: list[ICMP] = []
    while not found:
        for sent in driver.await_sent(1):
            packet = Ether(sent)
            if ARP in packet:
                answer = ARP(op=2, hwsrc=PEER_MAC, psrc=PEER, hwdst=MAC.hex(":"), pdst=OURS)
                driver.deliver(bytes(Ether(src=PEER_MAC, dst=MAC.hex(":")) / answer))
            else:
                found.append(packet[ICMP])
    assert len(found) == 1
    return found[0]


def test_the_linux_stack_answers(tmp_path: Path) -> None:
    with session(tmp_path) as (driver, _, process):
        resolve(driver)
        for number, size in enumerate([0, 1, 1472, *range(100, 120)]):
            request = Ether(src=PEER_MAC, dst=MAC.hex(":")) / IP(src=PEER, dst=OURS) / ICMP(id=1, seq=number)
            # In pieces, too: it is one frame all the same.
            driver.deliver(bytes(request / Raw(bytes(size))), piece_bytes=ROOM if number % 2 else 700)
            reply = await_icmp(driver)
            assert (reply.type, reply.seq, bytes(reply.payload)) == (0, number, bytes(size))
            driver.take_back()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE_SECONDS)
        assert (process.returncode, err) == (0, "")
        closed = json.loads(out.splitlines()[-1])
        assert closed["frames_in"] == closed["frames_out"] >= 24
        assert closed["refused"] == 0


def test_the_interface_is_as_the_device_is(tmp_path: Path) -> None:
    with session(tmp_path) as (driver, port, process):
        resolve(driver)
        await_link(process, address=MAC.hex(":"), mtu=1500, operstate="UP")
        other = bytes.fromhex("520000000009")
        with port.paused() as server:
            server.update(FACTS._replace(mac=other, mtu=1400, link_up=False))
        await_link(process, address=other.hex(":"), mtu=1400, operstate="DOWN")
        with port.paused() as server:
            server.update(FACTS._replace(mtu=9000))
        await_link(process, address=MAC.hex(":"), mtu=ROOM - 18, operstate="UP")  # a frame has to fit a buffer


@pytest.mark.parametrize(("pieces", "mtu"), [(1, ROOM - 18), (3, 3 * ROOM - 18), (5, 9000)])
def test_the_mtu_is_what_a_frame_may_have_in_all_its_pieces(tmp_path: Path, pieces: int, mtu: int) -> None:
    with session(tmp_path, tx_count=8, tx_pieces=pieces, tx_largest=9022) as (driver, port, process):
        resolve(driver)
        with port.paused() as server:
            server.update(FACTS._replace(mtu=9000))
        await_link(process, mtu=mtu, operstate="UP")
        request = Ether(src=PEER_MAC, dst=MAC.hex(":")) / IP(src=PEER, dst=OURS) / ICMP(id=1, seq=7)
        payload = os.urandom(mtu - 28)
        driver.deliver(bytes(request / Raw(payload)))
        reply = await_icmp(driver)
        assert (reply.type, reply.seq, bytes(reply.payload)) == (0, 7, payload)


UDP_ECHO = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo:
    echo.bind(("", 7))
    print("bound", flush=True)
    while True:
        data, sender = echo.recvfrom(65536)
        echo.sendto(data, sender)
"""
CHECKSUM_OFFLOADS = Offload.CSUM | Offload.GUEST_CSUM


@pytest.mark.parametrize(
    ("options", "offloads", "left"),
    [((), CHECKSUM_OFFLOADS, True), ((), 0, False), (("--no-offloads",), CHECKSUM_OFFLOADS, False)],
)
def test_checksums_are_left_to_the_device_that_can_make_them(
    tmp_path: Path, options: tuple[str, ...], offloads: int, left: bool
) -> None:
    offered = 0 if "--no-offloads" in options else offloads
    with session(tmp_path, *options, offloads=offered) as (driver, _, process):
        resolve(driver)
        namespace = ["nsenter", f"--net=/proc/{process.pid}/ns/net"]
        with subprocess.Popen([*namespace, sys.executable, "-c", UDP_ECHO], stdout=subprocess.PIPE, text=True) as echo:
            try:
                assert echo.stdout is not None
                assert echo.stdout.readline() == "bound\n"
                question = IP(src=PEER, dst=OURS) / UDP(sport=4000, dport=7) / Raw(b"data" * 100)
                whole = bytes(Ether(src=PEER_MAC, dst=MAC.hex(":")) / question)
                header = b""
                if left:
                    # As Linux hands it over: the field holds the sum of the pseudo header, the rest is to be added.
                    header = VirtioNetHeader(NEEDS_CSUM, csum_start=34, csum_offset=6).pack()
                    whole = whole[:40] + in4_pseudo(question).to_bytes(2, "big") + whole[42:]
                driver.deliver(whole, header=header)
                frame, header = await_udp(driver)
            finally:
                echo.kill()
        answer = Ether(frame)
        assert bytes(answer[UDP].payload) == b"data" * 100
        if left:
            said = VirtioNetHeader.unpack(header)
            assert (said.flags, said.gso_type, said.csum_start, said.csum_offset) == (NEEDS_CSUM, 0, 34, 6)
            assert answer[UDP].chksum == in4_pseudo(answer[IP])
        else:
            assert header == b""
            sum_there = answer[UDP].chksum
            del answer[UDP].chksum
            assert Ether(bytes(answer))[UDP].chksum == sum_there


def in4_pseudo(packet: IP) -> int:
    """The sum of the pseudo header (RFC 768), not complemented."""
    length = len(bytes(packet[UDP]))
    words = inet_aton(packet.src) + inet_aton(packet.dst) + struct.pack("!HH", 17, length)
    total: int = sum(struct.unpack("!6H", words))
    return (total & 0xFFFF) + (total >> 16)


def await_udp(driver: FakeRings) -> tuple[bytes, bytes]:
    """The next datagram and the virtio header in front of it."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        for frame, header, _ in driver.take_sent_with_headers():
            packet = Ether(frame)
            if ARP in packet:
                answer = ARP(op=2, hwsrc=PEER_MAC, psrc=PEER, hwdst=MAC.hex(":"), pdst=OURS)
                driver.deliver(bytes(Ether(src=PEER_MAC, dst=MAC.hex(":")) / answer))
            elif UDP in packet:
                return frame, header
        select.select([driver.client_doorbell], [], [], 0.01)
    raise AssertionError("no datagram came")


def test_a_header_that_does_not_fit_its_frame_goes_no_further(tmp_path: Path) -> None:
    with session(tmp_path, offloads=CHECKSUM_OFFLOADS) as (driver, _, process):
        resolve(driver)
        request = bytes(Ether(src=PEER_MAC, dst=MAC.hex(":")) / IP(src=PEER, dst=OURS) / ICMP(id=1, seq=1))
        driver.deliver(request, header=VirtioNetHeader(NEEDS_CSUM, csum_start=len(request), csum_offset=0).pack())
        driver.deliver(request, header=VirtioNetHeader(gso_type=GSO_TCPV4, gso_size=1).pack())
        driver.deliver(request, header=VirtioNetHeader().pack())
        assert await_icmp(driver).type == 0
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=DEADLINE_SECONDS)
        assert json.loads(out.splitlines()[-1])["bad_headers"] == 2


def await_link(process: subprocess.Popen[str], **wanted: object) -> dict[str, object]:
    """The interface once it is so. A look costs a process, so there is no pause between two."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not wanted.items() <= (found := link(process)).items():
        assert time.monotonic() < deadline, f"it should be {wanted}, and is still {found}"
    return found


def test_it_keeps_one_capability(tmp_path: Path) -> None:
    with session(tmp_path) as (driver, _, process):
        resolve(driver)
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        for kind in ("CapPrm", "CapEff", "CapBnd"):
            assert int(status[kind], 16) == 1 << 12, kind
        assert (int(status["CapInh"], 16), int(status["CapAmb"], 16)) == (0, 0)
        assert (status["NoNewPrivs"], status["Groups"]) == ("1", "")


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--address", "192.0.2.300/24"), 2, "'192.0.2.300/24' does not appear to be"),
        (("--name", "a b"), 2, "interface name 'a b'"),
        (("--name", "x" * 16), 2, "expected 1 to 15 characters"),
        (("--user", "nobody-of-this-name"), 2, "there is no user nobody-of-this-name"),
        (("--name", "lo"), 1, "cannot make the TAP device lo: "),
        ((), 5, "no driver listens at"),
    ],
)
def test_what_a_user_can_do_wrong(tmp_path: Path, options: tuple[str, ...], code: int, says: str) -> None:
    with tap(tmp_path / "none.sock", *options) as process:
        _, err = process.communicate(timeout=6 * DEADLINE_SECONDS)
        assert process.returncode == code
        assert says in err
        assert "Traceback" not in err


def test_what_is_not_there_or_not_allowed(tmp_path: Path) -> None:
    """No device file; a user without CAP_NET_ADMIN; and addresses that the kernel will not have."""
    hide = ["unshare", "--net", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"]
    powerless = ["unshare", "--net", "setpriv", "--bounding-set=-all", "--"]
    quiet = ["unshare", "--net", "sh", "-c", f'{QUIET}; exec "$@"', "sh"]
    for place, options, says in (
        (hide, (), "cannot open /dev/net/tun: No such file or directory; load the module: modprobe tun"),
        (powerless, (), "Operation not permitted; it takes CAP_NET_ADMIN: start the service as root"),
        (quiet, ("--address", "2001:db8::2/64"), "address 2001:db8::2/64: Permission denied; IPv6 is turned off here"),
        (quiet, ("--address", "192.0.2.2/24", "--address", "192.0.2.2/24"), "address 192.0.2.2/24: File exists"),
    ):
        words = [sys.executable, "-m", "netbridge.services.tap", "--socket", str(tmp_path / "none.sock"), *options]
        done = subprocess.run([*place, *words, "--user", "root"], capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        assert says in done.stderr
        assert done.stderr.count("\n") == 1, "one line, and no traceback"


def test_a_second_one_is_told_what_the_first_one_has(tmp_path: Path) -> None:
    with session(tmp_path) as (driver, port, process):
        resolve(driver)
        words = [
            sys.executable,
            "-m",
            "netbridge.services.tap",
            "--socket",
            str(port.path),
            "--user",
            str(os.geteuid()),
        ]
        namespace = ["nsenter", f"--net=/proc/{process.pid}/ns/net"]
        for name, code, says in (
            ("nb7", 1, "nb7: Device or resource busy; somebody has it"),
            ("nb8", 5, "another client has the port"),
        ):
            done = subprocess.run(
                [*namespace, *words, "--name", name], capture_output=True, text=True, check=False, timeout=60
            )
            assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
            assert says in done.stderr
        assert "nb8" not in inside(process, "ip", "link"), "nothing is left of it"
        resolve(driver)


def test_an_interface_that_is_removed_ends_it(tmp_path: Path) -> None:
    with session(tmp_path) as (driver, _, process):
        resolve(driver)
        inside(process, "ip", "link", "delete", "nb7")
        out, err = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 1
        assert err == "netbridge-tap: nb7: File descriptor in bad state; was the interface removed?\n"
        assert json.loads(out.splitlines()[-1])["event"] == "closed"


def test_an_interface_that_is_down_loses_frames_and_comes_up_again(tmp_path: Path) -> None:
    with session(tmp_path) as (driver, port, process):
        resolve(driver)
        inside(process, "ip", "link", "set", "nb7", "down")
        driver.deliver(bytes(Ether(src=PEER_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(psrc=PEER, pdst=OURS)))
        with port.paused() as server:
            server.update(FACTS._replace(mtu=1400))
        await_link(process, mtu=1400, operstate="DOWN")
        inside(process, "ip", "link", "set", "nb7", "up")
        await_link(process, mtu=1400, operstate="UP")
        resolve(driver)


def test_the_next_session_has_the_same_interface_whatever_its_offloads(tmp_path: Path) -> None:
    with session(tmp_path, offloads=CHECKSUM_OFFLOADS) as (driver, port, process), OfferedSession(8) as second:
        resolve(driver)
        index = link(process)["ifindex"]
        with port.paused() as server:
            server.agree = lambda _asked: 0
            server.dismiss(Reason.DEVICE_RESET)
            server.offer(second.session)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "closed"
        connected = json.loads(process.stdout.readline())
        assert (connected["event"], connected["session"]) == ("connected", 8)
        assert link(process)["ifindex"] == index
        resolve(FakeRings(second))


def test_a_service_that_is_killed_leaves_no_interface(tmp_path: Path) -> None:
    with session(tmp_path) as (driver, _, process):
        resolve(driver)
        with Path(f"/proc/{process.pid}/ns/net").open() as namespace:
            process.kill()
            process.wait()
            enter = ["nsenter", f"--net=/proc/self/fd/{namespace.fileno()}", "ip", "link"]
            links = subprocess.run(enter, capture_output=True, text=True, check=True, pass_fds=[namespace.fileno()])
        assert "nb7" not in links.stdout
