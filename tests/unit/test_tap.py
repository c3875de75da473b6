"""The tap service with a real TAP device, in a network namespace: the kernel answers what the driver brings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

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
def session(tmp_path: Path, *options: str) -> Iterator[tuple[FakeRings, ServedPort, subprocess.Popen[str]]]:
    path = tmp_path / "aethernet.sock"
    with OfferedSession() as offered, ServedPort(path) as port:
        with port.paused() as server:
            server.offer(offered.session)
        driver = FakeRings(offered)
        with tap(path, "--address", f"{OURS}/24", "--name", "nb7", "--wait", "60", *options) as process:
            # Longer than other services: it imports pyroute2, and makes a network namespace.
            assert isinstance(port.events.get(timeout=6 * DEADLINE_SECONDS), ClientReady)
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
