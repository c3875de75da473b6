"""The vhost-user front-end against a back-end that keeps to the specification, and against one that lies."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vfio
from netbridge.errors import DeviceError
from netbridge.virtio import commands, features
from netbridge.virtio.errors import (
    ControlRefused,
    FeatureMissing,
    FeaturesRefused,
    Gone,
    Misbehaved,
    NotOffered,
    VectorRefused,
    WrongState,
)
from netbridge.virtio.interrupts import InterruptMode
from netbridge.virtio.net import NetDevice
from netbridge.virtio.states import State
from netbridge.virtio.vhost_user import messages
from netbridge.virtio.vhost_user.connection import Refused
from netbridge.virtio.vhost_user.memory import VhostDma, VhostMemory
from netbridge.virtio.vhost_user.transport import VhostUser
from tests.descriptors import count_open_fds
from tests.unit import vhost_fakes as spec
from tests.unit.vhost_fakes import FakeBackEnd

MAC = bytes.fromhex("525400123456")
NAME = "/run/fake.sock"


class Bench:
    """A network device on a fake back-end."""

    def __init__(self, back_end: FakeBackEnd, *, most_pairs: int = 1, **options: object) -> None:
        self.back_end = back_end
        self.memory = VhostMemory()
        self.transport = VhostUser(NAME, self.memory, answer_seconds=0.5, **options)  # type: ignore[arg-type]
        self.net = NetDevice(
            self.transport,
            VhostDma(self.memory),
            required=(features.VERSION_1,),
            most_pairs=most_pairs,
            reset_deadline_s=0.05,
        )

    def attach(self) -> None:
        self.transport.attach(self.back_end.connect())

    def start(self) -> None:
        self.attach()
        self.net.configure()
        self.net.start()

    def close(self) -> None:
        self.net.close()
        if hasattr(self.back_end, "thread"):
            self.back_end.join()


Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    before = count_open_fds()
    benches: list[Bench] = []

    def make_one(back_end: FakeBackEnd | None = None, **options: Any) -> Bench:
        benches.append(Bench(back_end or FakeBackEnd(), **options))
        return benches[-1]

    yield make_one
    for bench in benches:
        bench.close()
    assert count_open_fds() == before


# ---- Into service and out of it


def test_brings_a_back_end_into_service(make: Make) -> None:
    bench = make(mac=MAC)
    bench.start()
    back_end = bench.back_end
    bench.net.reset()  # after this, the back-end has seen all
    assert back_end.names()[:5] == [1, 15, 16, 17, 3]
    assert back_end.agreed_protocol == spec.P_MQ | spec.P_REPLY_ACK | spec.P_NET_MTU | spec.P_STATUS
    assert back_end.features == spec.F_VERSION_1 | spec.F_MRG_RXBUF | spec.F_PROTOCOL_FEATURES


def test_hands_both_rings_over_as_they_are(make: Make) -> None:
    bench = make()
    bench.start()
    rings = bench.back_end.vrings
    assert sorted(rings) == [0, 1]
    for ring in rings.values():
        assert (ring.size, ring.base, ring.enabled) == (256, 0, 1)
        # What the driver wrote at `descriptors` is there: zeroes so far, in memory that both see.
        view = bench.back_end.at(ring.used, 4)
        view[:] = b"\1\0\0\0"
        view.release()
    # The fake's mapping and the driver's are the same memory.
    block = bytes(bench.net._queues._block.view)  # type: ignore[union-attr]
    assert block.count(b"\1") == 2


def test_kick_and_call_are_connected(make: Make) -> None:
    bench = make()
    bench.start()
    ring = bench.back_end.vrings[0]
    assert os.eventfd_read(ring.kick) == 1  # the notification that start() owes
    assert bench.transport.notify_address(0) == 0
    bench.transport.notify(1)
    assert os.eventfd_read(bench.back_end.vrings[1].kick) == 1
    for index, rings_fd in enumerate((bench.net.rx.irq_fd, bench.net.tx.irq_fd)):
        os.eventfd_write(bench.back_end.vrings[index].call, 1)
        assert os.eventfd_read(rings_fd) == 1


def test_packed_ring_begins_with_both_wrap_counters_set(make: Make) -> None:
    assert messages.first_base(packed=True) == 0x80008000
    assert messages.first_base(packed=False) == 0


def test_reset_stops_every_ring(make: Make) -> None:
    bench = make(FakeBackEnd(protocol=spec.PROTOCOL | spec.P_RESET_DEVICE))
    bench.start()
    bench.net.reset()
    assert bench.back_end.vrings == {}
    assert bench.back_end.names().count(spec.GET_VRING_BASE) == 2
    assert spec.RESET_DEVICE in bench.back_end.names()
    assert bench.back_end.status == 0
    bench.net.configure()
    bench.net.start()
    assert bench.net.state is State.LIVE


def test_back_end_without_protocol_features(make: Make) -> None:
    bench = make(FakeBackEnd(offered=spec.F_VERSION_1))
    bench.start()
    # Nobody answered these, so the last answer must be waited for.
    bench.net.reset()
    assert spec.SET_VRING_ENABLE not in bench.back_end.names()
    assert bench.transport.num_queues == 2


def test_mac_of_the_back_ends_own_configuration(make: Make) -> None:
    config = MAC + struct.pack("<HHH", 0, 4, 9000)
    offered = spec.OFFERED | spec.F_MAC | spec.F_STATUS
    bench = make(FakeBackEnd(offered=offered, protocol=spec.PROTOCOL | spec.P_CONFIG, config=config))
    bench.attach()
    bench.net.configure()
    assert (bench.net.facts.mac, bench.net.facts.mtu, bench.net.facts.link.up) == (MAC, 9000, False)


def test_mtu_is_told(make: Make) -> None:
    bench = make(mtu=1400)
    bench.start()
    assert bench.net.facts.mtu == 1400
    assert bench.back_end.mtu == 1400


def test_what_needs_what_is_not_there_is_never_taken(make: Make) -> None:
    bench = make(FakeBackEnd(offered=spec.OFFERED | spec.F_ACCESS_PLATFORM | 1 << 26 | 1 << 38 | 1 << 40))
    bench.attach()
    offered = bench.transport.read_device_features()
    assert offered & (spec.F_ACCESS_PLATFORM | spec.F_CTRL_VQ | spec.F_PROTOCOL_FEATURES) == 0
    assert offered & (1 << 26 | 1 << 38 | 1 << 40) == 0


def test_legacy_back_end_is_refused(make: Make) -> None:
    bench = make(FakeBackEnd(offered=spec.F_MRG_RXBUF))
    bench.attach()
    with pytest.raises(FeatureMissing, match=NAME):
        bench.net.configure()


def test_line_interrupt_is_refused() -> None:
    memory = VhostMemory()
    transport = VhostUser(NAME, memory)
    back_end = FakeBackEnd()
    transport.attach(back_end.connect())
    with NetDevice(transport, VhostDma(memory), required=(features.VERSION_1,), interrupts=InterruptMode.INTX) as net:
        with pytest.raises(VectorRefused, match="no line interrupt"):
            net.configure()
    back_end.join()


def test_features_that_the_back_end_takes_back(make: Make) -> None:
    bench = make(FakeBackEnd(keeps_features_ok=False))
    bench.attach()
    with pytest.raises(FeaturesRefused):
        bench.net.configure()


# ---- Memory


def test_memory_is_handed_over_and_taken_back_at_once(make: Make) -> None:
    bench = make()
    bench.attach()
    bench.net.configure()
    memory = vfio.Memory.memfd(8192)
    with memory:
        mapping = bench.memory.map(memory)
        assert (mapping.iova, 8192) in bench.back_end.tables[-1]
        memory.view[:5] = b"frame"
        assert bytes(bench.back_end.at(mapping.iova, 5)) == b"frame"
        mapping.close()
        assert len(bench.back_end.tables[-1]) == 1


def test_an_address_is_never_used_twice(make: Make) -> None:
    bench = make()
    seen = set()
    for _ in range(20):
        with vfio.Memory.memfd(4096) as memory, bench.memory.map(memory) as mapping:
            assert mapping.iova not in seen
            assert mapping.iova % 4096 == 0
            seen.add(mapping.iova)


def test_memory_does_not_change_in_service(make: Make) -> None:
    bench = make()
    bench.start()
    with vfio.Memory.memfd(4096) as memory:
        with pytest.raises(WrongState, match="out of service"):
            bench.memory.map(memory)
    assert len(bench.memory.regions) == 1


def test_memory_without_a_file_is_refused(make: Make) -> None:
    bench = make()
    with vfio.Memory.anonymous(4096) as memory:
        with pytest.raises(vfio.VfioError, match="no file descriptor"):
            bench.memory.map(memory)


def test_ninth_region_is_refused(make: Make) -> None:
    bench = make()
    memories = [vfio.Memory.memfd(4096) for _ in range(9)]
    mappings = [bench.memory.map(memory) for memory in memories[:8]]
    with pytest.raises(vfio.VfioError, match="8 regions"):
        bench.memory.map(memories[8])
    for mapping in mappings:
        mapping.close()
        mapping.close()
    for memory in memories:
        memory.close()


def test_refused_memory_is_not_mapped(make: Make) -> None:
    bench = make(FakeBackEnd(refuses=(spec.SET_MEM_TABLE,)))
    bench.attach()
    with vfio.Memory.memfd(4096) as memory:
        with pytest.raises(Refused, match=f"{NAME}: the back-end refused SET_MEM_TABLE"):
            bench.memory.map(memory)
    assert bench.memory.regions == ()


# ---- Several queue pairs


@pytest.mark.parametrize(("most", "used"), [(1, 1), (2, 2), (3, 3), (8, 4)])
def test_as_many_pairs_as_both_have(make: Make, most: int, used: int) -> None:
    bench = make(FakeBackEnd(pairs=4), most_pairs=most)
    bench.start()
    assert len(bench.net.pairs) == used
    rings = bench.back_end.vrings
    assert sorted(rings) == list(range(2 * used)), "the others are left alone"
    assert all(ring.enabled for ring in rings.values())
    assert len({ring.kick for ring in rings.values()}) == len({ring.call for ring in rings.values()}) == 2 * used
    assert bool(bench.back_end.features & spec.F_MQ) == (most > 1)
    assert not bench.back_end.features & spec.F_CTRL_VQ, "the control queue is the front-end's"
    bench.net.reset()
    assert not rings


def test_fewer_pairs_for_a_while(make: Make) -> None:
    """The one command that there is."""
    bench = make(FakeBackEnd(pairs=4), most_pairs=3)
    bench.start()
    rings = bench.back_end.vrings
    for pairs in (1, 3, 2, 2):
        bench.net.command(commands.queue_pairs(pairs))
        assert [rings[index].enabled for index in range(6)] == [index < 2 * pairs for index in range(6)]
    for pairs in (0, 4, 0xFFFF):
        with pytest.raises(ControlRefused, match=f"the device refuses {pairs} queue pairs"):
            bench.net.command(commands.queue_pairs(pairs))
    with pytest.raises(NotOffered, match="CTRL_RX"):
        bench.net.command(commands.receive_mode("promiscuous", True))


def test_pairs_need_the_protocols_own_feature(make: Make) -> None:
    bench = make(FakeBackEnd(pairs=4, protocol=spec.PROTOCOL & ~spec.P_MQ), most_pairs=4)
    bench.start()
    assert len(bench.net.pairs) == 1
    assert not bench.back_end.features & spec.F_MQ


def test_what_needs_a_command_is_never_taken(make: Make) -> None:
    needy = [item for item in features.FEATURES if ("CTRL_VQ",) in item.requires and item.name != "MQ"]
    config = MAC + struct.pack("<HHHIBBHI", 1, 4, 1500, 0xFFFFFFFF, 0xFF, 40, 128, 0x3F)
    offered = spec.OFFERED | spec.F_MAC | features.mask_of(needy)
    back_end = FakeBackEnd(offered=offered, protocol=spec.PROTOCOL | spec.P_CONFIG, config=config, pairs=4)
    bench = make(back_end, most_pairs=2)
    bench.start()
    assert len(bench.net.pairs) == 2
    assert not bench.back_end.features & features.mask_of(needy)


# ---- Lies


def header(**changes: int) -> Callable[[bytes], tuple[bytes, list[int]]]:
    """An answer with another header: request, flags or size."""

    def lie(message: bytes) -> tuple[bytes, list[int]]:
        request, flags, size = struct.unpack_from("=III", message)
        words = {"request": request, "flags": flags, "size": size} | changes
        return struct.pack("=III", *words.values()) + message[12:], []

    return lie


def payload(data: bytes) -> Callable[[bytes], tuple[bytes, list[int]]]:
    return lambda message: (message[:12] + data, [])


U64_OF_2000_PAIRS = struct.pack("=Q", 2000)
LIES = [
    (spec.GET_FEATURES, header(request=15), "answered request GET_PROTOCOL_FEATURES, which nobody made"),
    (spec.GET_FEATURES, header(request=77), "answered request 77"),
    (spec.GET_FEATURES, header(flags=1), "not marked as a reply"),
    (spec.GET_FEATURES, header(flags=4 | 2), "version 2"),
    (spec.GET_FEATURES, header(size=0), "0 bytes where there are 8"),
    (spec.GET_FEATURES, header(size=0xFFFFFFFF), "4294967295 bytes where there are 8"),
    (spec.GET_PROTOCOL_FEATURES, header(size=9), "9 bytes where there are 8"),
    (spec.GET_QUEUE_NUM, payload(bytes(8)), "0 queue pairs, not from 1 to 128"),
    (spec.GET_QUEUE_NUM, payload(U64_OF_2000_PAIRS), "2000 queue pairs"),
    (spec.SET_OWNER, header(size=4), "SET_OWNER: its answer brings 4 bytes"),
]


@pytest.mark.parametrize(("request_", "lie", "words"), LIES)
def test_lie_in_the_handshake(
    make: Make, request_: int, lie: Callable[[bytes], tuple[bytes, list[int]]], words: str
) -> None:
    bench = make(FakeBackEnd(lies={request_: lie}))
    with pytest.raises(Misbehaved, match=words) as caught:
        bench.attach()
    assert NAME in str(caught.value)
    assert not bench.transport.connected


def test_files_nobody_asked_for_are_closed(make: Make) -> None:
    read_end, write_end = os.pipe()
    bench = make(FakeBackEnd(lies={spec.GET_FEATURES: lambda message: (message, [write_end] * 3)}))
    with pytest.raises(Misbehaved, match="GET_FEATURES: its answer brings files"):
        bench.attach()
    bench.back_end.join()
    os.close(write_end)
    # The pipe has no other writer left, so the copies are gone.
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_too_many_files_are_closed(make: Make) -> None:
    read_end, write_end = os.pipe()
    bench = make(FakeBackEnd(lies={spec.GET_FEATURES: lambda message: (message, [write_end] * 64)}))
    with pytest.raises(Misbehaved, match="its answer brings files"):
        bench.attach()
    bench.back_end.join()
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_chatter_ends_the_connection(make: Make) -> None:
    bench = make(FakeBackEnd(unasked=b"and another thing"))
    with pytest.raises(Misbehaved, match="said something that nobody asked for"):
        bench.attach()
    assert not bench.transport.connected


def test_chatter_between_requests(make: Make) -> None:
    bench = make()
    bench.start()
    bench.back_end.stream.send(b"?")
    with pytest.raises(Misbehaved, match="nobody asked for"):
        bench.transport.look()
    assert not bench.transport.connected


def test_status_that_is_none(make: Make) -> None:
    lie = payload(struct.pack("=Q", 0x1FF))
    bench = make(FakeBackEnd(lies={spec.GET_STATUS: lie}))
    bench.attach()
    with pytest.raises(Misbehaved, match="GET_STATUS: 0x1ff is no device status"):
        bench.net.configure()


def test_base_of_another_ring(make: Make) -> None:
    lie = payload(struct.pack("=II", 7, 0))
    bench = make(FakeBackEnd(lies={spec.GET_VRING_BASE: lie}))
    bench.start()
    with pytest.raises(Misbehaved, match="GET_VRING_BASE: it tells of ring 7, not 0"):
        bench.net.reset()
    assert not bench.transport.connected, "a ring that may still run is cut off as far as it can be"


def test_base_beyond_the_ring(make: Make) -> None:
    lie = payload(struct.pack("=II", 0, 1 << 16))
    bench = make(FakeBackEnd(lies={spec.GET_VRING_BASE: lie}))
    bench.start()
    with pytest.raises(Misbehaved, match="beyond 16 bits"):
        bench.net.reset()


def test_configuration_of_another_place(make: Make) -> None:
    def lie(message: bytes) -> tuple[bytes, list[int]]:
        return message[:12] + struct.pack("=III", 99, 1, 0) + message[24:], []

    protocol = spec.PROTOCOL | spec.P_CONFIG
    bench = make(
        FakeBackEnd(offered=spec.OFFERED | spec.F_MAC, protocol=protocol, config=MAC, lies={spec.GET_CONFIG: lie})
    )
    bench.attach()
    with pytest.raises(Misbehaved, match="GET_CONFIG: it tells 1 bytes of configuration from 99"):
        bench.net.configure()


@pytest.mark.parametrize(
    "request_", [spec.SET_FEATURES, spec.SET_VRING_NUM, spec.SET_VRING_ADDR, spec.SET_VRING_KICK, spec.SET_VRING_ENABLE]
)
def test_refusal_names_the_request(make: Make, request_: int) -> None:
    bench = make(FakeBackEnd(refuses=(request_,)))
    with pytest.raises(Refused, match=messages.Request(request_).name):
        bench.start()
    assert bench.net.state is State.FAILED


# ---- Gone


@pytest.mark.parametrize("request_", [spec.GET_FEATURES, spec.GET_QUEUE_NUM, spec.SET_OWNER])
def test_hangs_up_in_the_handshake(make: Make, request_: int) -> None:
    bench = make(FakeBackEnd(hangs_up_on=(request_,)))
    with pytest.raises(Gone, match=messages.Request(request_).name):
        bench.attach()


@pytest.mark.parametrize("request_", [spec.SET_FEATURES, spec.SET_MEM_TABLE, spec.SET_VRING_CALL, spec.SET_STATUS])
def test_hangs_up_on_the_way(make: Make, request_: int) -> None:
    lost = []
    bench = make(FakeBackEnd(hangs_up_on=(request_,)))
    bench.transport.on_hang_up = lambda: lost.append(True)
    with pytest.raises(Gone):
        bench.start()
    assert lost == [True]
    # Whatever comes next says the same, but a reset, for which there is nothing to do.
    bench.net.reset()
    with pytest.raises(Gone):
        bench.net.configure()


def test_says_what_was_not_answered(make: Make) -> None:
    bench = make(FakeBackEnd(silent_on=(spec.GET_FEATURES,)))
    with pytest.raises(Gone, match=f"{NAME}: GET_FEATURES: the back-end did not answer within 0.5 s"):
        bench.attach()


def test_dies_while_in_service_and_another_takes_over(make: Make) -> None:
    bench = make(mac=MAC)
    bench.start()
    poller = select.poll()
    poller.register(bench.transport.fileno(), select.POLLIN)
    bench.back_end.die()
    assert poller.poll(5000)
    assert not bench.transport.look()
    with pytest.raises(Gone):
        bench.net.needs_reset()
    bench.net.reset()
    second = bench.back_end = FakeBackEnd()
    bench.start()
    assert sorted(second.vrings) == [0, 1]
    assert second.tables[-1], "it has the memory as well"


def test_broken_ring_asks_for_a_reset(make: Make) -> None:
    bench = make()
    bench.start()
    assert not bench.net.needs_reset()
    os.eventfd_write(bench.back_end.vrings[1].error, 1)
    assert bench.transport.look()
    assert bench.net.needs_reset()
    bench.net.reset()
    bench.net.configure()
    bench.net.start()
    assert not bench.net.needs_reset()


def test_connection_that_cannot_be_used_is_closed(make: Make) -> None:
    bench = make()
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(DeviceError):
        bench.transport.attach(ours)
    assert ours.fileno() == -1
