"""A box in place of guests: which one is meant, whether its NIC may be taken, and what the wire to it hands on."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scapy.layers.l2 import Dot1Q, Ether
from scapy.utils import PcapNgReader

from qemu import examine, interface
from qemu.box import Box
from qemu.dimensions import Dimensions
from qemu.errors import HarnessError
from qemu.interface import Interface, InterfaceWire
from qemu.metal import unpinned
from qemu.tap import CLONE_NEWNET, Tap
from qemu.target import Target, described

NIC, OTHER = "0000:03:00.0", "0000:01:00.0"

# Which box


@pytest.mark.parametrize(
    ("target", "connect"),
    [
        ("ssh://box", ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "box"]),
        ("ssh://root@box/", ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "root@box"]),
        ("ssh://root@box:2222", ["ssh", "-p", "2222", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "root@box"]),
        ("ssh://[fe80::1]:22", ["ssh", "-p", "22", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "fe80::1"]),
    ],
)
def test_a_box_by_ssh(target: str, connect: list[str]) -> None:
    made = described(target, NIC)
    assert made.words(made.connect) == connect
    assert made.nic == NIC


@pytest.mark.parametrize(
    ("target", "nic", "said"),
    [
        ("ssh://box", None, "wants --nic"),
        ("ssh://", NIC, r"expected ssh://\[user@\]host\[:port\]"),
        ("ssh://-oProxyCommand=x", NIC, "expected ssh://"),
        ("ssh://-l@box", NIC, "expected ssh://"),
        ("ssh://box:many", NIC, "the port is a number"),
        ("ssh://box/var/tmp", NIC, "with nothing behind it"),
        ("box", NIC, r"--target is ssh://.*, FILE.toml or lab:FILE.yaml, not 'box'"),
    ],
)
def test_what_is_no_box_is_refused(target: str, nic: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        described(target, nic)


def test_a_box_by_its_description(tmp_path: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(f'host = "root@bench"\nnic = "{OTHER}"\npower = ["fence", "{{action}}"]\n')
    assert described(str(path), None).nic == OTHER
    made = described(str(path), NIC)
    assert (made.nic, made.power, made.name) == (NIC, ("fence", "{action}"), "bench")


def test_what_is_pinned_has_no_place_on_a_box() -> None:
    assert unpinned(Dimensions(), Dimensions()) is None
    assert unpinned(Dimensions(ring="packed"), Dimensions()) == "needs a guest of QEMU's, with ring='packed'"


# Whether its NIC may be taken


def facts(**changes: Any) -> dict[str, Any]:
    def function(kind: str, *group: str, driver: str = "virtio-pci") -> dict[str, Any]:
        return {
            "class": kind,
            "group": list(group),
            "driver": driver,
            "interfaces": ["eth1"],
            "mac": "52:54:00:00:00:01",
        }

    pci = {
        "0000:00:00.0": function("0x060000"),
        OTHER: function("0x020000", OTHER),
        NIC: function("0x020000", NIC),
    }
    return {
        "uid": 0,
        "connection": "192.0.2.1 50000 192.0.2.2 22",
        "addresses": {"127.0.0.1": "lo", "192.0.2.2": "eth0", "192.0.2.3": "eth1"},
        "default": "eth0",
        "pci": pci,
        "functions": {"lo": [], "eth0": [OTHER], "eth1": [NIC]},
    } | changes


def test_a_nic_that_nothing_hangs_on_may_be_taken() -> None:
    assert examine.obstacle(facts(), NIC) is None
    assert examine.mac_address(facts(), NIC) == "52:54:00:00:00:01"
    # A connection that tells of itself by no address of the box: the default route is still looked at.
    assert examine.obstacle(facts(connection="", default=""), OTHER) is None
    assert "default route" in str(examine.obstacle(facts(connection="198.51.100.1 1 198.51.100.2 22"), OTHER))


def no_iommu(found: dict[str, Any]) -> None:
    found["pci"][NIC]["group"] = []


def share_a_group(found: dict[str, Any]) -> None:
    found["pci"][NIC]["group"] = [OTHER, NIC]


@pytest.mark.parametrize(
    ("nic", "change", "said"),
    [
        (NIC, lambda found: found.update(uid=1000), "one is user 1000 there, and VFIO takes root"),
        ("0000:09:00.0", lambda _: None, f"no PCI function 0000:09:00.0; its NICs are {OTHER}, {NIC}"),
        ("0000:00:00.0", lambda _: None, "is no NIC (class 0x060000)"),
        (OTHER, lambda _: None, f"the NIC {OTHER} carries this connection (192.0.2.2) (interface eth0)"),
        (NIC, lambda found: found["functions"].update(eth0=[OTHER, NIC]), "carries this connection"),  # a bond of both
        (
            NIC,
            lambda found: found.update(connection="::ffff:192.0.2.1 1 ::ffff:192.0.2.3 22"),
            "carries this connection",
        ),
        (NIC, lambda found: found.update(default="eth1"), "carries the box's default route (interface eth1)"),
        (NIC, share_a_group, f"shares an IOMMU group with {OTHER}, which carries this connection"),
        (NIC, no_iommu, "is behind no IOMMU: switch VT-d"),
    ],
    ids=["user", "none", "bridge", "ssh", "bond", "mapped", "default", "group", "iommu"],
)
def test_a_nic_that_may_not_be_taken(nic: str, change: Callable[[dict[str, Any]], object], said: str) -> None:
    found = facts()
    change(found)
    assert said in str(examine.obstacle(found, nic))


def test_a_nic_whose_address_is_not_known() -> None:
    found = facts()
    found["pci"][NIC].update(mac="", driver="vfio-pci")
    with pytest.raises(HarnessError, match=r"no network interface now \(the driver vfio-pci\)"):
        examine.mac_address(found, NIC)


# The wire


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eth9", "there is no interface eth9 on this machine, only eth0, eth1, eth2, eth3, lo"),
        ("eth0", "eth0 has the address 192.0.2.2, so this machine uses it"),
        ("eth1", "the interface eth1 is down: ip link set eth1 up"),
        ("eth2", "eth2 belongs to br0"),
        ("lo", "lo is no wire"),
        ("eth3", "None"),
    ],
)
def test_an_interface_that_is_no_wire(name: str, said: str) -> None:
    there = {
        "lo": Interface("lo", True, ("127.0.0.1",), None, 65536),
        "eth0": Interface("eth0", True, ("fe80::1", "192.0.2.2"), None, 1500),
        "eth1": Interface("eth1", False, (), None, 1500),
        "eth2": Interface("eth2", True, (), "br0", 1500),
        "eth3": Interface("eth3", True, ("fe80::3",), None, 1500),
    }
    assert said in str(interface.obstacle(name, there))


LONG = 30.0
MAC, PEER, STRANGER = "52:54:00:12:34:56", "02:00:00:00:00:01", "02:00:00:00:00:99"


def frame(source: str, target: str = PEER, *layers: Any) -> bytes:
    made = Ether(src=source, dst=target)
    for layer in layers:
        made /= layer
    return bytes(made / (b"\x88\xb5" if layers else b"") / bytes(60))


class Cable:
    """The wire to a NIC that the test plays: whatever is written to the tap's descriptor has come by the cable."""

    def __init__(self, tmp_path: Path):
        self.tap = Tap(offloads=False, name="eth1")
        self.inside = ThreadPoolExecutor(1)  # its thread stays in the tap's namespace

        def enter() -> InterfaceWire:
            assert ctypes.CDLL(None).setns(self.tap._namespace, CLONE_NEWNET) == 0
            return InterfaceWire("eth1", MAC, tmp_path / "wire.pcap")

        self.wire = self.inside.submit(enter).result()

    def come(self, data: bytes) -> None:
        os.write(self.tap._fds[0], data)

    def goes(self) -> bytes:
        return os.read(self.tap._fds[0], 65536)

    def close(self) -> None:
        self.inside.submit(self.wire.close).result()
        self.inside.shutdown()
        self.tap.close()


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[Cable]:
    made = Cable(tmp_path)
    yield made
    made.close()


@pytest.mark.needs_root
def test_noise_is_kept_and_not_handed_on(cable: Cable, tmp_path: Path) -> None:
    wire = cable.wire
    lldp = frame(STRANGER, "01:80:c2:00:00:0e")
    cable.come(lldp)
    cable.come(frame(MAC))
    cable.come(frame(STRANGER, "ff:ff:ff:ff:ff:ff"))
    assert [one.data for one in wire.take(LONG)] == [frame(MAC)]
    # Somebody to whom a frame was sent is no stranger any more.
    wire.send(frame(PEER, STRANGER))
    assert cable.goes() == frame(PEER, STRANGER)
    cable.come(frame(STRANGER))
    assert [one.data for one in wire.take(LONG)] == [frame(STRANGER)]
    assert (wire.received, wire.sent, wire.noise) == (2, 1, 2)
    cable.inside.submit(wire.close).result()
    with PcapNgReader(str(tmp_path / "wire.pcap")) as reader:
        kept = [bytes(packet) for packet in reader]
    assert sorted(kept) == sorted(
        [lldp, frame(MAC), frame(STRANGER, "ff:ff:ff:ff:ff:ff"), frame(PEER, STRANGER), frame(STRANGER)]
    )


@pytest.mark.needs_root
def test_a_vlan_tag_is_where_it_was_on_the_cable(cable: Cable) -> None:
    tagged = frame(MAC, PEER, Dot1Q(vlan=7, prio=3))
    cable.come(tagged)
    assert [one.data for one in cable.wire.take(LONG)] == [tagged]
    cable.wire.send(frame(PEER, MAC, Dot1Q(vlan=7)))
    assert cable.goes() == frame(PEER, MAC, Dot1Q(vlan=7))


@pytest.mark.needs_root
def test_the_wire_s_own_end_says_nothing_and_a_frame_that_is_too_long_is_told(cable: Cable) -> None:
    with pytest.raises(ValueError, match="does not pass eth1, whose MTU is 1500"):
        cable.inside.submit(cable.wire.send, frame(PEER, MAC) + bytes(2000)).result()
    cable.tap.run(["ip", "link", "set", "eth1", "down"])
    with pytest.raises(HarnessError, match="eth1: no frame can be sent: Network is down"):
        cable.wire.send(frame(PEER, MAC))
    cable.tap.run(["ip", "link", "set", "eth1", "up"])
    cable.come(frame(MAC))
    assert [one.data for one in cable.wire.take(LONG)] == [frame(MAC)]


# The options


class Config:
    """pytest's, with these options given."""

    def __init__(self, **given: str | int):
        self.given = given
        self.option = SimpleNamespace(numprocesses=given.get("numprocesses"))

    def getoption(self, name: str) -> Any:
        return self.given.get(name)


def chosen(tmp_path: Path, **given: str | int) -> Target | None:
    return Target.chosen(Config(**given), tmp_path, 1.0, print)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nic": NIC}, "--nic is for a box: name it with --target"),
        ({"wire": "eth1"}, "--wire is for a box: name it with --target"),
        (
            {"target": "ssh://box", "nic": "3:0.0"},
            "--nic: expected a PCI address such as \"0000:03:00.0\", not '3:0.0'",
        ),
        (
            {"target": "ssh://box", "nic": NIC, "numprocesses": 2},
            "a box is one: with --target there are no parallel runs",
        ),
        ({"target": "box"}, "--target is ssh://"),
        ({"target": "no-such.toml"}, "no-such.toml"),
        ({"target": "lab:no-such.yaml"}, "there is no file no-such.yaml"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, given: dict[str, str | int], said: str) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        chosen(tmp_path, **given)
    assert said in str(caught.value)


def test_without_labgrid_it_is_told_how_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "labgrid", None)
    (tmp_path / "farm.yaml").write_text("targets: {}\n")
    with pytest.raises(pytest.UsageError, match=r"needs labgrid: pip install '\.\[lab\]'"):
        chosen(tmp_path, target=f"lab:{tmp_path}/farm.yaml")


def test_without_a_target_tests_run_in_guests(tmp_path: Path) -> None:
    assert chosen(tmp_path) is None
    made = chosen(tmp_path, target="ssh://root@box", nic=NIC, wire="eth1")
    assert made is not None
    assert (made.name, made.wire) == ("box", "eth1")


def test_a_wire_that_cannot_be_is_told_before_anybody_is_called(tmp_path: Path) -> None:
    made = chosen(tmp_path, target="ssh://root@box.invalid", nic=NIC, wire="no-such-wire")
    assert made is not None
    with pytest.raises(HarnessError, match="--wire no-such-wire: there is no interface no-such-wire on this machine"):
        made.connect(lambda _: None)


def test_a_wire_without_permission_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(interface, "interfaces", lambda: {"eth1": Interface("eth1", True, (), None, 1500)})
    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(HarnessError, match="eth1 cannot be the wire: that takes root, or CAP_NET_RAW"):
        InterfaceWire("eth1", MAC)


@pytest.mark.thorough
def test_a_box_that_was_lost_is_switched_off_and_on_and_looked_at_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The box is a shell of this machine, as in test_qemu_box.py."""
    path = tmp_path / "bench.toml"
    path.write_text(
        f'host = "here"\nnic = "{NIC}"\nconnect = ["sh", "-c"]\npython = "{sys.executable}"\n'
        f'power = ["sh", "-c", "echo {{action}} >>{tmp_path}/power"]\n'
    )
    looked: list[str] = []
    filled: list[str] = []

    def look(box: Box) -> dict[str, Any]:
        looked.append(box.scratch)
        return facts()

    monkeypatch.setattr(Box, "dmesg", lambda _: "[    0.000000] Linux version")
    monkeypatch.setattr(examine, "look", look)
    target = chosen(tmp_path, target=str(path))
    assert target is not None
    try:
        box = target.connect(lambda box: filled.append(box.scratch))
        assert target.connect(lambda _: pytest.fail("it is there already")) is box
        sleeping = box.start(["sleep", "100"])
        box._link.kill()
        with pytest.raises(HarnessError):  # told when the end of the connection was seen here
            sleeping.wait(60)
        assert target.connect(lambda box: filled.append(box.scratch)) is box
        assert box.run(["echo", "again"]).stdout == "again\n"
    finally:
        target.close()
    assert (tmp_path / "power").read_text() == "cycle\n"
    assert len(set(filled)) == 2
    assert looked == filled
    assert not Path(filled[1]).exists()
    shutil.rmtree(filled[0])  # its keeper was killed
