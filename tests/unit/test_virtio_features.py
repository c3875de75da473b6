"""Feature bits as data, and what negotiation makes of them."""

import json
import re

import pytest

from netbridge.errors import UsageError
from netbridge.virtio import features
from netbridge.virtio.errors import FeatureMissing
from netbridge.virtio.features import FEATURES, REQUIRED, SUPPORTED, Feature, feature, select
from netbridge.virtio.negotiation import negotiate
from tests.unit.virtio_fakes import ALL_SUPPORTED, mask_of

MODERN = mask_of("VERSION_1", "ACCESS_PLATFORM")


def test_every_bit_and_every_name_is_there_once() -> None:
    assert len({item.bit for item in FEATURES}) == len({item.name for item in FEATURES}) == len(FEATURES)
    assert all(0 <= item.bit <= features.LARGEST_BIT for item in FEATURES)
    assert [item.bit for item in FEATURES] == sorted(item.bit for item in FEATURES)


@pytest.mark.parametrize(
    ("name", "mask"),
    # From linux/virtio_net.h and linux/virtio_config.h, as masks: a bit number used as a mask would show here.
    [
        ("MTU", 0x8),
        ("MAC", 0x20),
        ("MRG_RXBUF", 0x8000),
        ("STATUS", 0x1_0000),
        ("CTRL_VQ", 0x2_0000),
        ("MQ", 0x40_0000),
        ("INDIRECT_DESC", 0x1000_0000),
        ("EVENT_IDX", 0x2000_0000),
        ("VERSION_1", 0x1_0000_0000),
        ("ACCESS_PLATFORM", 0x2_0000_0000),
        ("RING_PACKED", 0x4_0000_0000),
        ("RING_RESET", 0x100_0000_0000),
        ("STANDBY", 0x4000_0000_0000_0000),
    ],
)
def test_masks_are_those_of_the_specification(name: str, mask: int) -> None:
    assert feature(name).mask == mask


def test_what_a_feature_depends_on_exists() -> None:
    for item in FEATURES:
        for group in item.requires:
            for name in group:
                feature(name)


@pytest.mark.parametrize("name", ["MRG_RXBUF", "mrg_rxbuf", "VIRTIO_NET_F_MRG_RXBUF", " mrg_RXBUF "])
def test_a_feature_is_found_by_any_usual_name(name: str) -> None:
    assert feature(name) is features.MRG_RXBUF


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"no virtio feature called 'MRG_RXBUFF'; did you mean MRG_RXBUF\?"):
        feature("MRG_RXBUFF")


def test_everything_wanted_and_offered_is_agreed() -> None:
    outcome = negotiate(ALL_SUPPORTED)
    assert outcome.agreed == ALL_SUPPORTED
    assert {"MTU", "MAC", "MRG_RXBUF", "STATUS", "CTRL_VQ", "VERSION_1", "ACCESS_PLATFORM"} <= set(outcome.names)
    assert all(outcome.has(item) for item in SUPPORTED)


def test_what_is_offered_and_not_wanted_is_never_agreed() -> None:
    outcome = negotiate((1 << 64) - 1)
    assert outcome.agreed == ALL_SUPPORTED


def test_bits_that_nobody_knows_are_listed_and_not_agreed() -> None:
    outcome = negotiate(MODERN | 1 << 58 | 1 << 42)
    unknown = {row.name: row.note for row in outcome.rows if row.bit in (42, 58)}
    assert unknown == {"bit 42": "unknown to this driver", "bit 58": "unknown to this driver"}
    assert outcome.agreed == MODERN


@pytest.mark.parametrize("name", [item.name for item in SUPPORTED if item not in REQUIRED])
def test_any_feature_but_the_required_can_be_turned_off(name: str) -> None:
    outcome = negotiate(ALL_SUPPORTED, select(off=[name]), turned_off=[feature(name)])
    gone = {name}
    while more := {item.name for item in FEATURES if any(gone >= set(group) for group in item.requires)} - gone:
        gone |= more
    assert outcome.agreed == ALL_SUPPORTED & ~mask_of(*gone)
    assert next(row.note for row in outcome.rows if row.name == name) == "turned off"


@pytest.mark.parametrize("name", [item.name for item in REQUIRED])
def test_a_required_feature_cannot_be_turned_off(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot be turned off"):
        select(off=[name])


def test_turning_off_what_is_never_on_is_a_mistake_worth_telling() -> None:
    with pytest.raises(UsageError, match=r"ADMIN_VQ is never on: it is for .*; what can be turned off is .*MTU, MAC"):
        select(off=["admin_vq"])


@pytest.mark.parametrize(
    ("missing", "flag"), [("VERSION_1", "disable-legacy=on"), ("ACCESS_PLATFORM", "iommu_platform=on")]
)
def test_a_missing_required_feature_names_itself_and_the_flag_that_brings_it(missing: str, flag: str) -> None:
    with pytest.raises(FeatureMissing, match=rf"^0000:01:00.0 does not offer {missing}, .*{flag}") as caught:
        negotiate(ALL_SUPPORTED & ~feature(missing).mask, device="0000:01:00.0")
    assert caught.value.missing == (missing,)


def test_all_missing_features_are_told_at_once() -> None:
    with pytest.raises(FeatureMissing) as caught:
        negotiate(0)
    assert caught.value.missing == ("VERSION_1", "ACCESS_PLATFORM")
    assert "disable-legacy=on" in str(caught.value)
    assert "iommu_platform=on" in str(caught.value)


def test_standby_is_refused_when_offered_and_when_asked_for() -> None:
    outcome = negotiate(ALL_SUPPORTED | feature("STANDBY").mask)
    assert not outcome.has(feature("STANDBY"))
    assert next(row.note for row in outcome.rows if row.name == "STANDBY").startswith("refused: ")
    with pytest.raises(UsageError, match="STANDBY cannot be asked for"):
        negotiate(ALL_SUPPORTED, [feature("STANDBY")])


@pytest.mark.parametrize("item", [item for item in FEATURES if item not in SUPPORTED], ids=str)
def test_what_is_never_accepted_says_why(item: Feature) -> None:
    outcome = negotiate(MODERN | item.mask)
    assert not outcome.has(item)
    assert next(row.note for row in outcome.rows if row.name == item.name) == f"refused: {item.refused}"
    with pytest.raises(UsageError, match=f"{item} cannot be asked for: {re.escape(item.refused)}"):
        negotiate(MODERN | item.mask, [item])


def test_what_is_not_wanted_this_time_is_told_from_what_is_turned_off() -> None:
    wanted = [item for item in SUPPORTED if item.name not in ("MQ", "CSUM", "MTU")]
    notes = {row.name: row.note for row in negotiate(ALL_SUPPORTED, wanted, turned_off=[features.MTU]).rows}
    assert notes["MTU"] == "turned off"
    assert notes["MQ"] == "of no use to one queue pair"
    assert notes["CSUM"] == "no client of the port takes it"


def test_the_table_of_all_features_needs_no_device() -> None:
    lines = features.known_table().splitlines()
    assert len(lines) == 1 + len(FEATURES)
    assert any(re.match(r"32 +VERSION_1 +required +the device follows", line) for line in lines)
    assert any(re.match(r"62 +STANDBY +never +this driver owns its device alone", line) for line in lines)
    rows = features.known_as_dict()
    assert [row["name"] for row in rows if row["refused"]] == [item.name for item in FEATURES if item.refused]


def test_a_feature_falls_with_what_it_depends_on() -> None:
    wanted = [feature(name) for name in ("CSUM", "HOST_TSO4", "HOST_ECN", "MQ", "CTRL_VQ")]
    without_csum = MODERN | mask_of("HOST_TSO4", "HOST_ECN", "MQ", "CTRL_VQ")
    outcome = negotiate(without_csum, wanted)
    assert outcome.names == ("CTRL_VQ", "MQ", "VERSION_1", "ACCESS_PLATFORM")
    notes = {row.name: row.note for row in outcome.rows}
    assert notes["CSUM"] == "the device does not offer it"
    assert notes["HOST_TSO4"] == "depends on CSUM"
    assert notes["HOST_ECN"] == "depends on HOST_TSO4 or HOST_TSO6"


def test_one_of_several_alternatives_is_enough() -> None:
    wanted = [feature(name) for name in ("CSUM", "HOST_TSO6", "HOST_ECN")]
    outcome = negotiate(MODERN | mask_of("CSUM", "HOST_TSO6", "HOST_ECN"), wanted)
    assert outcome.has(feature("HOST_ECN"))


def test_the_table_has_a_line_for_every_bit_that_matters() -> None:
    lines = negotiate(MODERN | mask_of("MAC", "GUEST_UFO")).table().splitlines()
    assert lines[0].split()[:5] == ["bit", "feature", "offered", "wanted", "agreed"]
    assert any(re.match(r"5 +MAC +yes +yes +yes ", line) for line in lines)
    assert any(re.match(r"10 +GUEST_UFO +yes +- +- +refused: Linux has given it up", line) for line in lines)
    assert any(re.match(r"15 +MRG_RXBUF +- +yes +- +the device does not offer it", line) for line in lines)


def test_the_machine_readable_form_keeps_all_64_bits() -> None:
    outcome = negotiate(MODERN | 1 << 63)
    document = json.loads(json.dumps(outcome.as_dict()))
    assert int(document["offered"], 16) == MODERN | 1 << 63
    assert int(document["agreed"], 16) == MODERN | 1 << 63
    assert {entry["name"] for entry in document["features"]} >= {"VERSION_1", "ACCESS_PLATFORM", "SPEED_DUPLEX"}
