"""Commands to the device and its answers, over a real queue of the core's; the device may misbehave."""

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from netbridge.errors import DeviceError
from netbridge.virtio import commands, features
from netbridge.virtio.commands import Command
from netbridge.virtio.errors import (
    ControlRefused,
    ControlTimeout,
    Misbehaved,
    NotOffered,
    QueueUnusable,
    WrongState,
)
from netbridge.virtio.facts import LinkState
from netbridge.virtio.interrupts import InterruptMode
from netbridge.virtio.net import NetDevice
from netbridge.virtio.states import State
from tests.unit.control_fakes import CONTROL, ERR, Bench
from tests.unit.virtio_fakes import FakeDma, FakeTransport, NetModel, mask_of

FIRST, SECOND = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
GROUP = bytes.fromhex("01005e000001")


Make = Callable[..., Bench]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    benches: list[Bench] = []

    def make_one(*arguments: object, **options: object) -> Bench:
        benches.append(Bench(monkeypatch, *arguments, **options))  # type: ignore[arg-type]
        return benches[-1]

    yield make_one
    for bench in benches:
        bench.device.join()
        bench.net.close()


@pytest.fixture
def live(make: Make) -> Bench:
    bench = make()
    bench.start()
    return bench


# ---- What the device reads: bytes written down from virtio 1.3 §5.1.6.5, not from the driver

WIRE = [
    (commands.receive_mode("promiscuous", True), "00 00 01"),
    (commands.receive_mode("promiscuous", False), "00 00 00"),
    (commands.receive_mode("all multicast", True), "00 01 01"),
    (commands.receive_mode("all unicast", True), "00 02 01"),
    (commands.receive_mode("no multicast", True), "00 03 01"),
    (commands.receive_mode("no unicast", True), "00 04 01"),
    (commands.receive_mode("no broadcast", True), "00 05 01"),
    (commands.mac_table([], []), "01 00 00000000 00000000"),
    (commands.mac_table([FIRST, SECOND], [GROUP]), "01 00 02000000 525400000001 525400000002 01000000 01005e000001"),
    (commands.mac_address(FIRST), "01 01 525400000001"),
    (commands.vlan(5, True), "02 00 0500"),
    (commands.vlan(4094, False), "02 01 fe0f"),
    (commands.announced(), "03 00"),
    (commands.guest_offloads(1 << 1 | 1 << 7), "05 00 8200000000000000"),
]


@pytest.mark.parametrize(("command", "wire"), WIRE, ids=lambda value: value.name if isinstance(value, Command) else "")
def test_each_command_is_what_the_specification_says(live: Bench, command: Command, wire: str) -> None:
    live.net.command(command)
    assert live.device.received == [bytes.fromhex(wire)]


def test_rss_and_pairs_on_the_wire() -> None:
    assert commands.queue_pairs(4).pack() == bytes.fromhex("04 00 0400")
    command = commands.rss(2, 0x3F, bytes(range(40)), [0, 1, 0, 1])
    expected = bytes.fromhex("04 01 3f000000 0300 0000 0000 0100 0000 0100 0200 28") + bytes(range(40))
    assert command.pack() == expected


def test_many_commands_one_after_the_other(live: Bench) -> None:
    for number in range(1000):
        live.net.command(commands.vlan(number, True))
    assert len(live.device.received) == 1000


# ---- How the device answers


def test_an_answer_that_takes_a_while_is_waited_for(make: Make) -> None:
    bench = make(deadline_s=30.0)
    bench.start()
    bench.device.delay_s = 0.02
    bench.net.command(commands.announced())
    assert bench.device.received == [b"\x03\x00"]


def test_a_refusal_names_the_command_and_the_device_goes_on(live: Bench) -> None:
    live.device.answer = ERR
    with pytest.raises(ControlRefused, match=r"fake: the device refuses VLAN 7 on"):
        live.net.command(commands.vlan(7, True))
    live.device.answer = 0
    live.net.command(commands.vlan(8, True))
    assert live.net.state is State.LIVE


def test_no_answer_is_a_fault_and_nothing_more_is_sent_before_a_reset(live: Bench) -> None:
    live.device.silent = True
    with pytest.raises(ControlTimeout, match=r"promiscuous on: the device did not answer .* within 1 s"):
        live.net.command(commands.receive_mode("promiscuous", True))
    with pytest.raises(ControlTimeout, match="still waiting for an earlier answer"):
        live.net.command(commands.receive_mode("promiscuous", True))
    live.device.silent = False
    live.net.reset()
    live.start()
    live.net.command(commands.receive_mode("promiscuous", True))


@pytest.mark.parametrize("answer", [2, 0x7F, 0xFF])
def test_an_answer_that_is_none_is_a_lie(live: Bench, answer: int) -> None:
    live.device.answer = answer
    with pytest.raises(
        Misbehaved, match=rf"announcement seen: the device answered with 1 bytes, the first of them {answer}"
    ):
        live.net.command(commands.announced())


def test_an_answer_of_no_bytes_is_none(live: Bench) -> None:
    live.device.written = 0
    with pytest.raises(Misbehaved, match="answered with 0 bytes"):
        live.net.command(commands.announced())


@pytest.mark.parametrize(("switch", "value"), [("written", 2), ("written", 0xFFFFFFFF), ("head", 9), ("head", 1 << 16)])
def test_a_used_ring_that_lies_is_found_out(live: Bench, switch: str, value: int) -> None:
    setattr(live.device, switch, value)
    with pytest.raises(Misbehaved, match="broke its control queue's used ring"):
        live.net.command(commands.announced())


def test_the_last_answer_is_not_taken_for_the_next(live: Bench) -> None:
    live.net.command(commands.announced())
    live.device.written, live.device.answer = 1, 0xFF  # it writes nothing, and says that it has
    with pytest.raises(Misbehaved):
        live.net.command(commands.announced())


# ---- The vector is also that of configuration changes


@pytest.mark.parametrize("changes", [1, 3])
def test_a_configuration_change_meanwhile_is_not_lost(live: Bench, changes: int) -> None:
    live.device.config_changes = changes
    live.device.delay_s = 0.01
    live.net.command(commands.announced())
    assert os.eventfd_read(live.net.interrupts.config_fd) == changes + 1, "as many rings as there were"


def test_with_intx_the_isr_says_what_for(make: Make) -> None:
    bench = make(model=NetModel(vectors=0), interrupts=InterruptMode.INTX)
    bench.start()
    fds = bench.net.interrupts
    isr = bench.transport.isr

    def ring_with(bits: int) -> Callable[[], None]:
        def ring() -> None:
            isr[0] = bits
            os.eventfd_write(fds.intx_fd, 1)

        return ring

    for bits in (1, 3):
        bench.device.ring = ring_with(bits)
        bench.device.delay_s = 0.01
        bench.net.command(commands.announced())
        bench.device.join()
        bench.net._await_answer(0)  # where the answer was seen before its interrupt, that is for whoever waits next
        assert os.eventfd_read(fds.intx_unmask_fd) >= 1, "VFIO was told to unmask the line"
        if bits & 2:
            assert os.eventfd_read(fds.config_fd) == 1, "and the change is there for whoever looks after them"
        else:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(fds.config_fd)


# ---- What it needs


@pytest.mark.parametrize("command", [command for command, _ in WIRE], ids=lambda command: command.name)
def test_without_its_feature_a_command_is_refused_here(make: Make, command: Command) -> None:
    bench = make(CONTROL & ~command.needs.mask)
    bench.start()
    with pytest.raises(NotOffered, match=f"{command.needs.name}, which is not agreed"):
        bench.net.command(command)
    assert bench.device.received == []


def test_without_a_control_queue_there_are_no_commands(make: Make) -> None:
    bench = make(CONTROL & ~features.CTRL_VQ.mask)
    bench.start()
    assert not bench.net.negotiation.has(features.CTRL_RX)
    assert not bench.model.queues[2].enabled
    with pytest.raises(NotOffered):
        bench.net.command(commands.receive_mode("promiscuous", True))


def test_commands_are_for_a_device_in_service(make: Make) -> None:
    bench = make()
    with pytest.raises(WrongState):
        bench.net.command(commands.announced())
    bench.net.configure()
    with pytest.raises(WrongState):
        bench.net.command(commands.announced())


def test_a_control_queue_that_is_promised_and_absent(make: Make) -> None:
    bench = make(model=NetModel(queue_sizes=(256, 256)))
    with pytest.raises(QueueUnusable, match="there is no queue 2"):
        bench.net.configure()


# ---- Several queue pairs

SEVERAL = CONTROL | mask_of("MQ")
SIZES = (64,) * 8 + (16,)


def test_all_pairs_are_set_up_then_the_device_is_told_to_use_them(make: Make) -> None:
    bench = make(SEVERAL, model=NetModel(queue_sizes=SIZES, pairs=4, vectors=10), control_number=8, most_pairs=4)
    bench.start()
    assert [(pair.rx.index, pair.tx.index) for pair in bench.net.pairs] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert all(queue.enabled for queue in bench.model.queues)
    assert [queue.vector for queue in bench.model.queues] == [1, 2, 3, 4, 5, 6, 7, 8, 0], "one for each, one to share"
    assert len({queue.irq_fd for pair in bench.net.pairs for queue in pair}) == 8
    assert bench.device.received == [bytes.fromhex("04 00 0400")]
    assert bench.model.notified == [0, 2, 4, 6]


def test_fewer_pairs_than_there_are(make: Make) -> None:
    """The control queue is after all the device has, whatever is used of it (§5.1.2)."""
    bench = make(SEVERAL, model=NetModel(queue_sizes=SIZES, pairs=4, vectors=10), control_number=8, most_pairs=2)
    bench.start()
    assert len(bench.net.pairs) == 2
    assert [queue.enabled for queue in bench.model.queues] == [True] * 4 + [False] * 4 + [True]
    assert bench.device.received == [bytes.fromhex("04 00 0200")]


def test_more_pairs_than_there_are(make: Make) -> None:
    bench = make(SEVERAL, model=NetModel(queue_sizes=(64,) * 5, pairs=2), control_number=4, most_pairs=8)
    bench.start()
    assert len(bench.net.pairs) == 2
    assert bench.device.received == [bytes.fromhex("04 00 0200")]


def test_one_pair_leaves_steering_alone(make: Make) -> None:
    bench = make(SEVERAL | mask_of("RSS"), model=NetModel(queue_sizes=SIZES, pairs=4))
    bench.start()
    assert not bench.net.negotiation.has(features.MQ)
    assert not bench.net.negotiation.has(features.RSS)
    assert bench.net.facts.max_queue_pairs == 4
    assert bench.model.queues[2].enabled, "without MQ the control queue is number 2"
    assert bench.device.received == []


def test_rss_spreads_over_a_table(make: Make) -> None:
    model = NetModel(queue_sizes=SIZES, pairs=4, vectors=10, hash_types=0xFFFF)
    bench = make(SEVERAL | mask_of("RSS"), model=model, control_number=8, most_pairs=4)
    bench.start()
    (command,) = bench.device.received
    hash_types, mask, unclassified = struct.unpack_from("<IHH", command, 2)
    assert (command[:2], hash_types, mask, unclassified) == (b"\x04\x01", 0x3F, 127, 0)
    assert struct.unpack_from("<128H", command, 10) == (0, 1, 2, 3) * 32
    assert struct.unpack_from("<HB", command, 10 + 256) == (4, 40)
    assert len(command) == 10 + 256 + 3 + 40
    assert any(command[-40:]), "the key is random"


@pytest.mark.parametrize(
    ("limits", "words"), [({"key_bytes": 39}, "39 bytes"), ({"table_entries": 127}, "127 entries")]
)
def test_rss_limits_below_the_least_are_refused(make: Make, limits: dict[str, Any], words: str) -> None:
    bench = make(SEVERAL | mask_of("RSS"), model=NetModel(queue_sizes=SIZES, pairs=4, **limits), most_pairs=4)
    with pytest.raises(Misbehaved, match=words):
        bench.net.configure()


def test_a_device_that_refuses_its_own_pairs_is_given_up_on(make: Make) -> None:
    bench = make(SEVERAL, model=NetModel(queue_sizes=SIZES, pairs=4), control_number=8, most_pairs=4)
    bench.device.answer = ERR
    bench.net.configure()
    with pytest.raises(DeviceError, match="refuses 4 queue pairs"):
        bench.net.start()
    assert bench.net.state is State.FAILED


@pytest.mark.parametrize("pairs", [0, 0x8001])
def test_an_impossible_number_of_pairs_is_refused(pairs: int) -> None:
    transport = FakeTransport(NetModel())
    with pytest.raises(ValueError, match=f"{pairs} queue pairs"):
        NetDevice(transport, FakeDma(), most_pairs=pairs)
    assert transport.closed


# ---- Speed


@pytest.mark.parametrize(("speed", "told"), [(0, 0), (10_000, 10_000), (0x7FFFFFFF, 0x7FFFFFFF), (0xFFFFFFFF, 0)])
def test_the_speed_is_told_where_it_is_known(make: Make, speed: int, told: int) -> None:
    bench = make(CONTROL | mask_of("SPEED_DUPLEX"), model=NetModel(speed=speed))
    bench.net.configure()
    assert bench.net.facts.link.speed_mbps == told


@pytest.mark.parametrize("duplex", [0, 1, 2, 0xFF])
def test_the_duplex_mode_is_as_the_device_says(make: Make, duplex: int) -> None:
    """Every value but 0 (half) and 1 (full) means that it is not known (virtio 1.3 §5.1.4.1), so none is wrong."""
    bench = make(CONTROL | mask_of("SPEED_DUPLEX"), model=NetModel(duplex=duplex))
    bench.net.configure()
    assert bench.net.facts.link.duplex == duplex
    without = make(CONTROL, model=NetModel(duplex=duplex))
    without.net.configure()
    assert without.net.facts.link.duplex == 0xFF


def test_an_impossible_speed_is_refused(make: Make) -> None:
    bench = make(CONTROL | mask_of("SPEED_DUPLEX"), model=NetModel(speed=0x80000000))
    with pytest.raises(Misbehaved, match="its speed is 0x80000000"):
        bench.net.configure()


def test_a_wish_for_an_announcement_that_was_never_agreed_on_is_none(make: Make) -> None:
    """Or the driver would answer it with a command that the device does not have."""
    bench = make(CONTROL & ~mask_of("GUEST_ANNOUNCE"), model=NetModel(link=3))
    bench.start()
    assert bench.net.facts.link == LinkState(up=True)
    assert bench.net.link() == LinkState(up=True)


def test_the_wish_for_an_announcement_is_seen(make: Make) -> None:
    bench = make()
    bench.start()
    assert not bench.net.link().announce
    bench.model.link = 3
    assert bench.net.link().announce
    assert bench.net.link().up
