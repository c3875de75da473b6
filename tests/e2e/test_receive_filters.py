"""What a client asks of the device, on QEMU's own: receive modes, MAC table, VLANs, MAC address. Frames tell.

After the single-port suites of DPDK's test plans: promiscuous, MAC filter, VLAN.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qemu.guest import Guest
from qemu.wire import Wire
from tests.e2e.asking import Asking, asking

STRANGER, ANOTHER = "52:54:00:00:0a:01", "52:54:00:00:0a:02"
GROUP, OTHER_GROUP = "01:00:5e:00:00:01", "33:33:00:00:00:02"
BROADCAST = "ff:ff:ff:ff:ff:ff"


@pytest.fixture
def irq() -> str:
    return "msix"


@pytest.fixture
def bed(irq: str, guest: Guest, wire: Wire) -> Iterator[Asking]:
    with asking(guest, wire, irq=irq if irq == "msix" else intx_line(guest)) as bed:
        yield bed
        counters = bed.stop()
        assert not any(counters["device_faults"].values())
        assert not any(counters["refused_handles"].values())
    assert not guest.iommu_faults()


def intx_line(guest: Guest) -> str:
    """The NIC's Interrupt Line register, which a manifest has to name."""
    return str(
        guest.eval("open(__import__('glob').glob('/sys/bus/pci/devices/0000:01:00.0/config')[0], 'rb').read()[60]")
    )


@pytest.mark.parametrize("irq", ["msix", "intx"])
def test_promiscuous_off_and_on(bed: Asking) -> None:
    assert bed.passes(STRANGER), "at first every frame is wanted"
    assert bed.filter() == "DONE"
    assert not bed.passes(STRANGER)
    assert bed.passes(bed.mac)
    assert bed.passes(BROADCAST)
    assert bed.filter(promiscuous=True) == "DONE"
    assert bed.passes(STRANGER)
    assert bed.passes(GROUP)


def test_all_multicast(bed: Asking) -> None:
    assert bed.filter() == "DONE"
    assert not bed.passes(GROUP)
    assert bed.filter(all_multicast=True) == "DONE"
    assert bed.passes(GROUP)
    assert bed.passes(OTHER_GROUP)
    assert not bed.passes(STRANGER)


def test_more_receive_modes(bed: Asking) -> None:
    assert bed.filter(all_unicast=True) == "DONE"
    assert bed.passes(STRANGER)
    assert not bed.passes(GROUP)
    assert bed.filter(all_multicast=True, no_multicast=True) == "DONE"
    assert not bed.passes(GROUP)
    assert bed.filter(no_unicast=True) == "DONE"
    assert not bed.passes(bed.mac)


def test_mac_filter_add_and_remove(bed: Asking) -> None:
    assert bed.filter(unicast=[STRANGER]) == "DONE"
    assert bed.passes(STRANGER)
    assert not bed.passes(ANOTHER)
    assert bed.filter(unicast=[STRANGER, ANOTHER]) == "DONE"
    assert bed.passes(STRANGER)
    assert bed.passes(ANOTHER)
    assert bed.filter(unicast=[ANOTHER]) == "DONE"
    assert not bed.passes(STRANGER)
    assert bed.passes(ANOTHER)
    assert bed.passes(bed.mac), "its own address it keeps"


def test_mac_filter_multicast(bed: Asking) -> None:
    assert bed.filter(multicast=[GROUP]) == "DONE"
    assert bed.passes(GROUP)
    assert not bed.passes(OTHER_GROUP)
    assert bed.filter(multicast=[OTHER_GROUP]) == "DONE"
    assert not bed.passes(GROUP)
    assert bed.passes(OTHER_GROUP)


@pytest.mark.parametrize(
    "wanted",
    [
        {"unicast": [GROUP]},
        {"unicast": ["00:00:00:00:00:00"]},
        {"multicast": [STRANGER]},
        {"unicast": [STRANGER], "vlans": [4095]},
    ],
)
def test_mac_filter_invalid(bed: Asking, wanted: dict[str, object]) -> None:
    assert bed.filter(unicast=[ANOTHER]) == "DONE"
    assert bed.filter(**wanted) == "INVALID"
    assert bed.passes(ANOTHER), "what was wanted before still holds"
    assert not bed.passes(STRANGER)


def test_a_full_mac_table(bed: Asking) -> None:
    many = [f"52:54:00:00:0b:{number:02x}" for number in range(64)]
    assert bed.filter(unicast=many) == "DONE"
    assert bed.passes(many[0])
    assert bed.passes(many[-1])
    assert not bed.passes(STRANGER)


def test_vlan_filter(bed: Asking) -> None:
    assert bed.passes(bed.mac, vlan=5), "promiscuous: whatever its tag"
    assert bed.filter() == "DONE"
    assert not bed.passes(bed.mac, vlan=5)
    assert bed.passes(bed.mac)
    assert bed.filter(vlans=[5, 4094]) == "DONE"
    assert bed.passes(bed.mac, vlan=5)
    assert bed.passes(bed.mac, vlan=4094)
    assert not bed.passes(bed.mac, vlan=6)
    assert bed.filter(vlans=[6]) == "DONE"
    assert not bed.passes(bed.mac, vlan=5)
    assert bed.passes(bed.mac, vlan=6)


def test_mac_change(bed: Asking) -> None:
    assert bed.filter() == "DONE"
    assert bed.ask(mac=ANOTHER) == {"verdict": "DONE"}
    assert bed.ask(facts=True)["mac"] == ANOTHER
    assert bed.passes(ANOTHER)
    assert not bed.passes(bed.mac)
    assert bed.ask(mac=GROUP)["verdict"] == "INVALID"
    assert bed.passes(ANOTHER)


def test_the_next_session_begins_with_every_frame(guest: Guest, wire: Wire) -> None:
    with asking(guest, wire) as bed:
        assert bed.filter() == "DONE"
        assert bed.ask(mac=ANOTHER) == {"verdict": "DONE"}
        assert not bed.passes(STRANGER)
        bed.stop()
    with asking(guest, wire) as again:
        assert again.mac == bed.mac
        assert again.passes(STRANGER)
        again.stop()


@pytest.mark.parametrize(
    ("off", "wanted", "missing"),
    [
        ("CTRL_RX", {"promiscuous": True}, "CTRL_RX"),
        ("CTRL_VLAN", {"vlans": [5]}, "CTRL_VLAN"),
        ("CTRL_RX_EXTRA", {"no_broadcast": True}, "CTRL_RX_EXTRA"),
    ],
)
def test_what_is_turned_off_is_refused_with_the_reason(
    guest: Guest, wire: Wire, off: str, wanted: dict[str, object], missing: str
) -> None:
    with asking(guest, wire, options=["--without", off]) as bed:
        said = bed.ask(filter=wanted)
        assert said["verdict"] == "NOT_OFFERED"
        assert missing in said["text"]
        assert bed.passes(bed.mac)
        bed.stop()
