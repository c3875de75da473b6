"""PCI addresses in every usual form, and what sysfs says of a function."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vfio
from tests.unit.vfio_fakes import FakeSysfs

ADDRESSES = st.builds(
    vfio.PciAddress,
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFF),
    st.integers(0, 0x1F),
    st.integers(0, 7),
)


@pytest.mark.parametrize(
    "text",
    [
        "0000:00:1f.0",
        "00:1f.0",
        "0:1f.0",
        "0000:00:1F:0",
        "00:1f:0",
        "0x00:0x1F:0x0",
        "0x0000:0x00:0x1F:0x0",
        " 0000:00:1f.0\n",
        "/sys/bus/pci/devices/0000:00:1f.0",
    ],
)
def test_every_usual_form_is_read(text: str) -> None:
    address = vfio.PciAddress.parse(text)
    assert address == vfio.PciAddress(0, 0, 0x1F, 0)
    assert str(address) == "0000:00:1f.0"


def test_a_domain_of_more_than_16_bits_is_read() -> None:
    assert str(vfio.PciAddress.parse("10000:e1:00.0")) == "10000:e1:00.0"


@given(ADDRESSES)
def test_what_is_written_is_read_back(address: vfio.PciAddress) -> None:
    assert vfio.PciAddress.parse(str(address)) == address


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    try:
        vfio.PciAddress.parse(text)
    except vfio.BadAddress as error:
        assert repr(text) in str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a PCI address"),
        ("hello", "not a PCI address"),
        ("00.1f.0", "not a PCI address"),
        ("00:1f", "not a PCI address"),
        ("0000:00:1f.", "not a PCI address"),
        ("0000:00:1f.0.1", "not a PCI address"),
        ("0000.00:1f:0", "not a PCI address"),
        ("1:2:3:4:5", "not a PCI address"),
        ("0000:00:-1.0", "not a PCI address"),
        ("0000:00:1f", "no function number"),
        ("00:20.0", "device 0x20 is more than 0x1f"),
        ("00:1f.8", "function 0x8 is more than 0x7"),
        ("0:100:00.0", "bus 0x100 is more than 0xff"),
    ],
)
def test_what_is_no_address_is_refused(text: str, says: str) -> None:
    with pytest.raises(vfio.BadAddress, match=says) as caught:
        vfio.PciAddress.parse(text)
    assert isinstance(caught.value, ValueError)
    assert "write 0000:00:1f.0" in str(caught.value)


def test_addresses_are_ordered_and_hashable() -> None:
    late, early = vfio.PciAddress.parse("01:00.0"), vfio.PciAddress.parse("00:1f.7")
    assert sorted({late, early, vfio.PciAddress.parse("01:00.0")}) == [early, late]


def test_what_sysfs_says(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path / "sys")
    sysfs.function("0000:00:03.0", driver="virtio-pci", group=7, cdev="vfio4")
    sysfs.function("0000:00:03.1", device=0x1000, class_code=0x060400, group=7)
    function = vfio.PciFunction("00:03.0", sysfs_root=str(sysfs.root))
    assert (function.vendor_id, function.device_id, function.class_code) == (0x1AF4, 0x1041, 0x020000)
    assert function.subsystem_ids == (0x1AF4, 0x1100)
    assert function.driver == "virtio-pci"
    assert function.driver_override is None
    assert function.iommu_group == 7
    assert [str(member) for member in function.group_members] == ["0000:00:03.0", "0000:00:03.1"]
    assert function.numa_node is None
    assert function.vfio_cdev == "vfio4"
    assert not function.is_bridge
    assert not function.noiommu
    other = vfio.PciFunction("00:03.1", sysfs_root=str(sysfs.root))
    assert other.driver is None
    assert other.is_bridge
    assert other.vfio_cdev is None


def test_a_function_without_an_iommu(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path / "sys")
    sysfs.function("0000:00:03.0")
    function = vfio.PciFunction("00:03.0", sysfs_root=str(sysfs.root))
    assert function.iommu_group is None
    assert function.group_members == ()


def test_a_missing_function_names_the_nearest(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path / "sys")
    for address in ("0000:00:02.0", "0000:00:1f.0", "0000:00:1f.2", "0000:00:1f.3", "0000:04:00.0"):
        sysfs.function(address)
    with pytest.raises(vfio.DeviceNotFound) as caught:
        vfio.PciFunction("00:1f.1", sysfs_root=str(sysfs.root))
    text = str(caught.value)
    assert text.startswith("0000:00:1f.1: there is no such PCI function")
    assert "0000:00:1f.0 (1af4:1041, class 0x020000), 0000:00:1f.2" in text
    assert "0000:04:00.0" not in text
    assert caught.value.device == "0000:00:1f.1"


def test_all_functions_in_order(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path / "sys")
    sysfs.function("0000:04:00.0")
    sysfs.function("0000:00:02.0")
    found = vfio.functions(sysfs_root=str(sysfs.root))
    assert [str(address) for address in found] == ["0000:00:02.0", "0000:04:00.0"]
    assert vfio.functions(sysfs_root=str(tmp_path / "nothing")) == ()


def test_odd_attributes_are_told_apart_from_missing_ones(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path)
    path = sysfs.function("0000:00:03.0", group=7)
    function = vfio.PciFunction("0000:00:03.0", sysfs_root=str(tmp_path))
    for text in ("", "what\n"):
        (path / "vendor").write_text(text)
        (path / "numa_node").write_text(text)
        with pytest.raises(vfio.Malformed, match="where its vendor should be"):
            _ = function.vendor_id
        with pytest.raises(vfio.Malformed, match="where its numa_node should be"):
            _ = function.numa_node
    (path / "vendor").unlink()
    (path / "numa_node").unlink()
    with pytest.raises(vfio.DeviceNotFound, match="was it unplugged"):
        _ = function.vendor_id
    assert function.numa_node is None
    (tmp_path / "bus/pci/devices/odd").mkdir()
    assert vfio.functions(sysfs_root=str(tmp_path)) == (function.address,)
