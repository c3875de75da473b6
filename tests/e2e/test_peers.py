"""Other peers of a guest's NIC than one wire: an interface of the host's kernel, and another guest."""

from __future__ import annotations

from pathlib import Path

import pytest
from scapy.layers.l2 import ARP, Ether

from qemu.guest import Guest, Nic
from qemu.session import Session
from qemu.switch import Harm, Switch
from qemu.tap import Tap
from qemu.views import device_view

HOST = "02:00:00:00:00:01"
IS_AT = 2  # the operation of an ARP reply (RFC 826)


def interface(guest: Guest, address: str) -> str:
    """The kernel's name for the guest's first NIC, after it was given an address."""
    (name,) = guest.run(["sh", "-c", "ls /sys/bus/pci/devices/0000:01:00.0/virtio*/net"]).stdout.split()
    guest.run(["ip", "addr", "add", address, "dev", name])
    guest.bring_up(name)
    return name


@pytest.mark.guest_with(queue_pairs=2, offloads=True, cpus=2)  # Linux uses as many pairs as it has processors
def test_the_host_s_kernel_as_peer_with_two_queue_pairs_and_offloads(guest: Guest, tap: Tap) -> None:
    name = interface(guest, "10.9.8.1/24")
    mac = guest.machine.nics[0].mac
    tap.packets.settimeout(60)
    tap.packets.send(bytes(Ether(dst=mac, src=HOST) / ARP(pdst="10.9.8.1", psrc="10.9.8.9", hwsrc=HOST)))
    while not ((frame := Ether(tap.packets.recv(2048))).haslayer(ARP) and frame[ARP].op == IS_AT):
        pass
    assert (frame[ARP].psrc, frame[ARP].hwsrc) == ("10.9.8.1", mac)
    # Both are in what is kept of the guest, as they crossed.
    captured = tap.captured()
    assert captured is not None
    assert min(captured) >= 1
    assert bytes(frame) in (guest.artefacts / "wire.pcap").read_bytes()
    assert "tap0" in tap.run(["cat", "/proc/net/dev"]).stdout
    queues = guest.run(["ls", f"/sys/class/net/{name}/queues"]).stdout.split()
    assert {"rx-0", "rx-1", "tx-0", "tx-1"} <= set(queues)
    features = device_view(guest).features
    assert "VIRTIO_NET_F_MQ" in features
    assert "VIRTIO_NET_F_HOST_TSO4" in features


def test_two_guests_joined_by_a_switch_that_does_harm(guests: Session, artefacts: Path) -> None:
    nics = [Nic(mac=f"52:54:00:00:00:0{n}") for n in (1, 2)]
    with (
        guests.boot(f"{artefacts.name}/one", nics=[nics[0]]) as one,
        guests.boot(f"{artefacts.name}/two", nics=[nics[1]]) as two,
        Switch([one.wire, two.wire]) as switch,
    ):
        interface(one, "10.9.8.1/24")
        interface(two, "10.9.8.2/24")

        def ping(count: int, patience: int = 20) -> str:
            words = ["busybox", "ping", "-c", str(count), "-i", "0.1", "-W", str(patience), "10.9.8.2"]
            return one.run(words, check=False, timeout=120).stdout

        assert "10 packets received" in ping(10)
        switch.harm = Harm(duplication=0.5, seed=3)
        said = ping(10)
        assert "10 packets received" in said
        assert "duplicates" in said
        assert switch.counters.duplicated
        # Each is overtaken by none: what is held goes on its way after a while.
        switch.harm = Harm(reordering=0.5, seed=3)
        assert "10 packets received" in ping(10)
        assert switch.counters.reordered
        switch.harm = Harm(delay=0.2)
        said = ping(3)
        assert "3 packets received" in said
        assert float(said.rpartition(" = ")[2].partition("/")[0]) >= 400, f"milliseconds there and back: {said}"
        switch.harm = Harm(loss=1.0)
        before = switch.counters.lost
        assert "100% packet loss" in ping(2, patience=1)
        assert switch.counters.lost > before
        switch.harm = Harm()
        switch.cut(1)
        assert "100% packet loss" in ping(2, patience=1)
        assert switch.counters.cut
        switch.mend(1)
        assert "3 packets received" in ping(3)
