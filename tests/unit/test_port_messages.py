"""Control messages: the bytes are those of docs/port.md, and no bytes whatever raise anything but BadMessage."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netbridge.ipc.errors import BadMessage, Reason
from netbridge.ipc.geometry import Geometry, RegionGeometry, RingGeometry
from netbridge.ipc.messages import (
    LONGEST_MESSAGE,
    Bye,
    Facts,
    Hello,
    Link,
    Ready,
    Welcome,
    common_version,
    parse,
)

# A loaded machine is no failure.
unhurried = settings(deadline=None)

u16 = st.integers(0, (1 << 16) - 1)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
facts = st.builds(Facts, st.binary(min_size=6, max_size=6), st.integers(68, 65535), st.booleans(), u32)
rings = st.builds(RingGeometry, u64, u32)
regions = st.builds(RegionGeometry, u64, u32, u32, st.booleans())
geometries = st.builds(Geometry, u64, rings, rings, rings, rings, regions, regions, u32, u32, u32, u32, u32)
offloads = u64.map(lambda bits: bits & sum(1 << bit for bit in (0, 1, 7, 8, 9, 11, 12, 13, 54, 55, 56)))
names = st.text("abcXYZ019._-", min_size=1, max_size=32)
hellos = st.builds(
    lambda name, versions, bits: Hello(name, min(versions), max(versions), bits),
    names,
    st.tuples(st.integers(1, 65535), st.integers(1, 65535)),
    u64,
)
messages = st.one_of(
    hellos,
    st.builds(Welcome, st.integers(1, 65535), facts, geometries, offloads, st.integers(1, 256)),
    st.just(Ready()),
    st.builds(Link, facts),
    st.builds(Bye, st.sampled_from(Reason), st.text("abc äß,.", max_size=40).map(str.strip)),
)

AnyMessage = Hello | Welcome | Ready | Link | Bye

GEOMETRY = Geometry(
    rings_size=0x5000,
    rx_active=RingGeometry(0, 16),
    rx_free=RingGeometry(0x200, 16),
    tx_active=RingGeometry(0x400, 8),
    tx_done=RingGeometry(0x600, 8),
    rx=RegionGeometry(0x8000, 16, 2048, read_only=True),
    tx=RegionGeometry(0x4000, 8, 2048),
    headroom=64,
    continuation_offset=52,
    rx_limit=12,
    tx_largest=9022,
    tx_pieces=5,
)


def header(kind: int, length: int) -> bytes:
    return struct.pack("<4sHHII", b"NBPT", kind, 1, length, 0)


@unhurried
@given(messages)
def test_what_is_packed_is_parsed(message: AnyMessage) -> None:
    parsed = parse(message.pack())
    assert type(parsed) is type(message)
    assert parsed == message
    assert len(message.pack()) <= LONGEST_MESSAGE


@unhurried
@given(st.binary(max_size=LONGEST_MESSAGE + 8))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        parse(data)
    except BadMessage as error:
        assert str(error)


@unhurried
@given(messages, st.data())
def test_a_damaged_message_parses_or_is_refused(message: AnyMessage, data: st.DataObject) -> None:
    packed = bytearray(message.pack())
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse(bytes(packed))
    except BadMessage:
        pass


@unhurried
@given(messages, st.integers(-8, 8).filter(bool))
def test_a_message_of_another_length_is_refused(message: AnyMessage, by: int) -> None:
    packed = message.pack()
    changed = packed[:by] if by < 0 else packed + bytes(by)
    with pytest.raises(BadMessage):
        parse(changed)
    # Nor does it help to say so in the header.
    with pytest.raises(BadMessage):
        parse(changed[:8] + struct.pack("<I", len(changed)) + changed[12:])


def test_hello_is_the_documented_bytes() -> None:
    body = struct.pack("<HHIQ32s", 1, 3, 0, 5, b"my-stack")
    assert Hello("my-stack", 1, 3, 5).pack() == header(1, 64) + body


def test_welcome_is_the_documented_bytes() -> None:
    welcome = Welcome(0x1234, Facts(b"\x52\x54\0\x12\x34\x56", 9000, True, 25_000), GEOMETRY, 1 << 56 | 1, 4)
    body = struct.pack("<6sHII", b"\x52\x54\0\x12\x34\x56", 1, 9000, 25_000)
    body += struct.pack("<HHIIIQQII", 0x1234, 4, 64, 52, 12, 1 << 56 | 1, 0x5000, 9022, 5)
    for offset, slots in ((0, 16), (0x200, 16), (0x400, 8), (0x600, 8)):
        body += struct.pack("<QII", offset, slots, 0)
    body += struct.pack("<QIIII", 0x8000, 16, 2048, 1, 0)
    body += struct.pack("<QIIII", 0x4000, 8, 2048, 0, 0)
    assert welcome.pack() == header(2, 184) + body


def test_the_short_messages_are_the_documented_bytes() -> None:
    assert Ready().pack() == header(3, 16)
    assert Link(Facts(bytes(6), 1500, False)).pack() == header(4, 32) + bytes(6) + struct.pack("<HII", 0, 1500, 0)
    assert Bye(Reason.BUSY, "later").pack() == header(5, 128) + struct.pack("<II104s", 2, 0, b"later")


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, b"X", "magic"),
        (4, b"\x09", "unknown message type 9"),
        (6, b"\x02", "version 2"),
        (12, b"\x01", "reserved"),
        (16, b"\x00", "version range 0"),
        (18, b"\x00", "version range 1 to 0"),
        (20, b"\x01", "reserved"),
        (32, b"\0", "name"),
        (33, b"/", "name"),
        (34, b"\0x", "name"),
    ],
)
def test_what_is_wrong_with_a_hello_is_named(at: int, value: bytes, says: str) -> None:
    packed = bytearray(Hello("abc").pack())
    packed[at : at + len(value)] = value
    with pytest.raises(BadMessage, match=says):
        parse(bytes(packed))


def test_a_version_that_is_not_spoken_is_its_own_reason() -> None:
    with pytest.raises(BadMessage) as caught:
        common_version(Hello("abc", 2, 3))
    assert caught.value.reason is Reason.VERSION
    assert common_version(Hello("abc", 1, 9)) == 1


def test_unknown_flags_are_refused() -> None:
    link = bytearray(Link(Facts(bytes(6))).pack())
    link[22] |= 4
    with pytest.raises(BadMessage, match="unknown link flags"):
        parse(bytes(link))
    welcome = bytearray(Welcome(1, Facts(bytes(6)), GEOMETRY).pack())
    welcome[136 + 16] |= 2
    with pytest.raises(BadMessage, match="unknown region flags"):
        parse(bytes(welcome))
    with pytest.raises(BadMessage, match=r"unknown offloads 0x4$"):
        parse(Welcome(1, Facts(bytes(6)), GEOMETRY, offloads=5).pack())


@pytest.mark.parametrize("pairs", [0, 257, 65535])
def test_queue_pairs_that_no_entry_can_name(pairs: int) -> None:
    with pytest.raises(BadMessage, match=f"{pairs} queue pairs"):
        parse(Welcome(1, Facts(bytes(6)), GEOMETRY, queue_pairs=pairs).pack())


def test_an_unknown_reason_reads_as_unspecified() -> None:
    packed = Bye(Reason.BUSY).pack()
    assert parse(packed[:16] + struct.pack("<I", 4_000_000_000) + packed[20:]) == Bye(Reason.UNSPECIFIED)


def test_the_text_of_a_bye_cannot_forge_log_lines() -> None:
    message = parse(Bye(Reason.FAILED, "one\ntwo\x1b[31m").pack())
    assert message == Bye(Reason.FAILED, "one?two?[31m")


def test_a_long_text_is_cut_at_a_character() -> None:
    message = parse(Bye(Reason.FAILED, "ä" * 100).pack())
    assert message == Bye(Reason.FAILED, "ä" * 52)
    assert parse(Bye(Reason.FAILED, "x" + "ä" * 100).pack()) == Bye(Reason.FAILED, "x" + "ä" * 51)


@pytest.mark.parametrize("name", ["", "x" * 33, "a b", "ä", "a/b"])
def test_a_name_that_no_client_may_have(name: str) -> None:
    with pytest.raises(ValueError, match="client name"):
        Hello(name).pack()


@pytest.mark.parametrize("bad", [Facts(b"12345"), Facts(bytes(6), mtu=67), Facts(bytes(6), speed_mbps=1 << 32)])
def test_facts_that_no_device_has(bad: Facts) -> None:
    with pytest.raises(ValueError):
        bad.check()
