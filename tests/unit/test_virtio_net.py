"""The network device brought into service and out of it again, against a device that may misbehave."""

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from netbridge.datapath._core import ffi, lib
from netbridge.errors import DeviceError
from netbridge.virtio import features
from netbridge.virtio.errors import (
    ConfigUnstable,
    FeatureMissing,
    FeaturesRefused,
    Gone,
    Misbehaved,
    NeedsReset,
    NotOffered,
    QueueUnusable,
    ResetTimeout,
    VectorRefused,
    WrongState,
)
from netbridge.virtio.interrupts import share_out
from netbridge.virtio.net import InterruptMode, NetDevice
from netbridge.virtio.pci import VirtioPci
from netbridge.virtio.states import State
from netbridge.virtio.transport import CONFIG_ATTEMPTS, NO_VECTOR, Status
from tests.descriptors import count_open_fds
from tests.unit.virtio_fakes import (
    ALL_SUPPORTED,
    IOVA,
    MAC,
    USUAL,
    FakeDma,
    FakePciFunction,
    FakeTransport,
    NetModel,
    mask_of,
)

A, D, OK, FOK, NEEDS, FAILED = (
    Status.ACKNOWLEDGE,
    Status.DRIVER,
    Status.DRIVER_OK,
    Status.FEATURES_OK,
    Status.NEEDS_RESET,
    Status.FAILED,
)


# What comes of it all while one queue pair is wanted.
ONE_PAIR = USUAL & ~mask_of("MQ", "RSS") & ~features.OFFLOAD_MASK


class Bench:
    """A network device on a fake transport, and whatever is needed to see what became of it."""

    def __init__(self, model: NetModel, **options: object) -> None:
        self.model = model
        self.transport = FakeTransport(model)
        self.dma = FakeDma()
        options.setdefault("reset_deadline_s", 0.02)
        self.net = NetDevice(self.transport, self.dma, **options)  # type: ignore[arg-type]


Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes benches; afterwards every device is closed, and nothing of it may be left."""
    before = count_open_fds()
    benches: list[Bench] = []

    def make_one(model: NetModel | None = None, **options: object) -> Bench:
        benches.append(Bench(model or NetModel(), **options))
        return benches[-1]

    yield make_one
    for bench in benches:
        try:
            bench.net.close()
        except DeviceError:
            pass  # a device that does not reset says so to the last
        assert bench.net.state is State.CLOSED
        assert not bench.dma.open, "DMA memory was left"
        assert bench.transport.closed
        assert not bench.transport.dma, "the device was left with access to memory"
        assert not bench.transport.eventfds
        assert bench.transport.intx is None
    assert count_open_fds() <= before, "file descriptors were left"


# ---- The sequence


def test_the_sequence_is_that_of_the_specification(make: Make) -> None:
    bench = make()
    bench.net.configure()
    bench.net.start()
    assert bench.model.log == [
        ("status", 0),  # 1: reset
        ("status", A),  # 2
        ("status", A | D),  # 3
        ("features", ONE_PAIR),  # 4
        ("status", A | D | FOK),  # 5 and 6
        ("config", 6, 2),  # 7: configuration,
        ("config", 12, 4),
        ("config", 16, 1),
        *[("config", offset, 1) for offset in range(6)],
        ("config", 8, 2),
        ("config", 10, 2),
        ("dma", True),  # interrupts,
        ("vectors", 3),
        ("config vector", 0),
        ("queue", 0, 256),  # queues
        ("queue", 1, 256),
        ("queue", 2, 16),
        ("enable", 0),
        ("enable", 1),
        ("enable", 2),
        ("status", A | D | FOK | OK),  # 8
        ("notify", 0),
    ]
    assert bench.net.state is State.LIVE


def test_the_same_over_registers(make: Make) -> None:
    model = NetModel()
    function = FakePciFunction(model)
    dma = FakeDma()
    with NetDevice(VirtioPci(function), dma) as net:
        net.configure()
        assert net.state is State.CONFIGURED
        net.start()
        assert function.bus_master
        assert function.irqs.msix == [net.interrupts.config_fd, net.rx.irq_fd, net.tx.irq_fd]
        assert (model.config_vector, model.queues[0].vector, model.queues[1].vector) == (0, 1, 2)
        assert model.notified == [0]
        assert model.status == A | D | FOK | OK
    assert model.status == 0
    assert not function.open_bars
    assert not function.bus_master
    assert not dma.open
    function.close()


def test_what_the_device_is_told_of_its_queues(make: Make) -> None:
    bench = make(NetModel(queue_sizes=(1024, 64, 64)), rx_size=512, tx_size=256)
    bench.net.configure()
    rx, tx, control = bench.model.queues
    assert (control.size, control.vector) == (16, 0)
    assert (rx.size, tx.size) == (512, 64)
    assert (bench.net.rx.size, bench.net.tx.size) == (512, 64)
    assert (bench.net.rx.vector, bench.net.tx.vector) == (1, 2)
    places = sorted(
        [
            (rx.descriptors, 16 * rx.size),
            (rx.driver_area, 6 + 2 * rx.size),
            (rx.device_area, 6 + 8 * rx.size),
            (tx.descriptors, 16 * tx.size),
            (tx.driver_area, 6 + 2 * tx.size),
            (tx.device_area, 6 + 8 * tx.size),
            (control.descriptors, 16 * control.size),
            (control.driver_area, 6 + 2 * control.size),
            (control.device_area, 6 + 8 * control.size),
            (bench.net.tx_slots.iova, bench.net.tx_slots.size),
        ]
    )
    (block,) = bench.dma.open
    assert places[0][0] >= IOVA
    assert places[-1][0] + places[-1][1] <= IOVA + block.size
    for (start, length), (following, _) in pairwise(places):
        assert start + length <= following, "two parts overlap"
    assert all(start % 64 == 0 for start, _ in places)


def test_what_the_device_is_told_of_packed_queues_of_any_size(make: Make) -> None:
    bench = make(NetModel(offered=ALL_SUPPORTED, queue_sizes=(100, 77, 64)))
    bench.net.configure()
    assert bench.net.negotiation.has(features.RING_PACKED)
    (block,) = bench.dma.open
    for queue, size in zip(bench.model.queues[:2], (100, 77), strict=True):
        assert queue.size == size
        assert queue.descriptors % 16 == 0
        assert queue.driver_area % 4 == 0
        assert queue.device_area % 4 == 0
        assert queue.driver_area >= queue.descriptors + 16 * size
        assert queue.device_area >= queue.driver_area + 4
        assert queue.device_area + 4 <= IOVA + block.size


@pytest.mark.parametrize("packed", [False, True])
def test_each_ring_feature_can_be_turned_off(make: Make, packed: bool) -> None:
    for name in ("EVENT_IDX", "INDIRECT_DESC", "IN_ORDER", "NOTIFICATION_DATA", "RING_RESET"):
        off = [name] if packed else [name, "RING_PACKED"]
        bench = make(NetModel(offered=ALL_SUPPORTED), wanted=features.select(off=off))
        bench.net.configure()
        bench.net.start()
        assert not bench.net.negotiation.has(features.feature(name))
        assert bench.net.negotiation.has(features.RING_PACKED) == packed


def emptied(handle: Any) -> int:
    return int(lib.nb_virtqueue_reset(handle, ffi.new("uint32_t[]", 256)))


def test_a_queue_is_reset_alone_and_set_up_as_before(make: Make) -> None:
    bench = make()
    bench.net.configure()
    with pytest.raises(WrongState):
        bench.net.reset_queue(bench.net.tx, emptied)
    bench.net.start()
    before = bench.model.queues[1]
    assert bench.net.reset_queue(bench.net.tx, emptied) == 0
    after = bench.model.queues[1]
    assert after is not before
    assert after == before
    assert after.enabled
    assert bench.model.log[-3:] == [("reset queue", 1), ("queue", 1, 256), ("enable", 1)]


def test_without_ring_reset_no_queue_is_reset_alone(make: Make) -> None:
    bench = make(NetModel(offered=USUAL & ~features.RING_RESET.mask))
    bench.net.configure()
    bench.net.start()
    with pytest.raises(NotOffered, match="RING_RESET"):
        bench.net.reset_queue(bench.net.tx, emptied)


@pytest.mark.parametrize(
    ("switch", "error"), [("never_resets_queues", ResetTimeout), ("stays_enabled_alone", Misbehaved)]
)
def test_a_queue_that_is_not_reset_is_told(switch: str, error: type[Exception]) -> None:
    model = NetModel()
    function = FakePciFunction(model)
    with NetDevice(VirtioPci(function), FakeDma(), reset_deadline_s=0.01) as net:
        net.configure()
        net.start()
        setattr(model, switch, True)
        with pytest.raises(error, match="queue 1"):
            net.reset_queue(net.tx, emptied)
    function.close()


def test_queues_are_made_in_the_core_on_zeroed_memory(make: Make) -> None:
    bench = make()
    bench.net.configure()
    (block,) = bench.dma.open
    assert not any(block.view)
    assert lib.nb_virtqueue_in_flight(bench.net.rx.handle) == 0
    assert lib.nb_virtqueue_in_flight(bench.net.tx.handle) == 0
    assert bench.net.rx.handle != ffi.NULL


def test_every_queue_of_the_core_is_freed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[object] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def nb_virtqueue_new(self, config: object) -> object:
            alive.append(lib.nb_virtqueue_new(config))
            return alive[-1]

        def nb_virtqueue_free(self, queue: object) -> None:
            alive.remove(queue)
            lib.nb_virtqueue_free(queue)

    monkeypatch.setattr("netbridge.virtio.queues.lib", Counting())
    bench = make()
    bench.net.configure()
    assert alive[:2] == [bench.net.rx.handle, bench.net.tx.handle]
    assert len(alive) == 3
    bench.net.reset()
    assert alive == []
    bench.model.refused_vectors = (2,)
    with pytest.raises(VectorRefused):
        bench.net.configure()
    bench.net.close()
    assert alive == []


def test_configured_again_it_uses_the_same_memory_cleared(make: Make) -> None:
    bench = make()
    bench.net.configure()
    (block,) = bench.dma.open
    block.view[:] = b"\xaa" * block.size
    bench.net.reset()
    bench.net.configure()
    assert bench.dma.open == [block]
    assert bench.dma.allocations == 1
    assert not any(block.view)


def test_larger_queues_than_before_get_new_memory(make: Make) -> None:
    bench = make(NetModel(queue_sizes=(64, 64, 64)), rx_size=512, tx_size=512)
    bench.net.configure()
    bench.model.queue_sizes = (512, 512, 64)
    bench.net.reset()
    bench.net.configure()
    assert bench.dma.allocations == 2
    assert len(bench.dma.open) == 1


def test_the_eventfds_stay_the_same_and_are_empty_after_a_reset(make: Make) -> None:
    bench = make()
    bench.net.configure()
    before = bench.net.interrupts
    os.eventfd_write(before.queue_fds[0], 3)
    bench.net.reset()
    assert bench.transport.eventfds == ()
    bench.net.configure()
    assert bench.net.interrupts == before
    with pytest.raises(BlockingIOError):
        os.eventfd_read(before.queue_fds[0])


def test_intx_leaves_the_vectors_alone(make: Make) -> None:
    bench = make(NetModel(vectors=0), interrupts=InterruptMode.INTX)
    bench.net.configure()
    fds = bench.net.interrupts
    assert bench.transport.intx == (fds.intx_fd, fds.intx_unmask_fd)
    assert (bench.net.rx.irq_fd, bench.net.tx.irq_fd) == (-1, -1)
    assert bench.model.config_vector == NO_VECTOR
    assert {queue.vector for queue in bench.model.queues} == {NO_VECTOR}


@pytest.mark.parametrize(
    ("available", "vectors"),
    [(5, [1, 2, 3, 4]), (4, [1, 2, 3, 4]), (3, [1, 1, 2, 2]), (2, [1, 1, 2, 2]), (1, [1, 1, 1, 1]), (0, [])],
)
def test_two_pairs_share_what_vectors_there_are(available: int, vectors: list[int]) -> None:
    assert share_out(available, 4) == vectors


def test_with_two_vectors_both_queues_ring_the_same_bell(make: Make) -> None:
    bench = make(NetModel(vectors=2))
    bench.net.configure()
    assert bench.transport.eventfds == (bench.net.interrupts.config_fd, bench.net.rx.irq_fd)
    assert bench.net.tx.irq_fd == bench.net.rx.irq_fd
    assert [queue.vector for queue in bench.model.queues[:2]] == [1, 1]


# ---- Facts


def test_facts_are_what_the_device_says(make: Make) -> None:
    bench = make(NetModel(mtu=9000, link=0, pairs=4, offered=ALL_SUPPORTED | mask_of("MQ")))
    bench.net.configure()
    facts = bench.net.facts
    assert facts.mac == MAC
    assert facts.mac_text == "52:54:00:12:34:56"
    assert not facts.mac_is_local
    assert (facts.mtu, facts.largest_frame, facts.max_queue_pairs, facts.header_bytes) == (9000, 9014, 4, 12)
    assert not facts.link.up
    assert not bench.net.link().up
    bench.model.link = 1
    assert bench.net.link().up


def test_without_the_features_there_are_defaults_and_nothing_is_read(make: Make) -> None:
    bench = make(NetModel(offered=mask_of("VERSION_1", "ACCESS_PLATFORM"), link=0, mtu=0))
    bench.net.configure()
    facts = bench.net.facts
    assert facts.mac_is_local
    assert facts.mac[0] & 3 == 2, "locally administered, and of one station"
    assert (facts.mtu, facts.link.up, facts.max_queue_pairs) == (1500, True, 1)
    assert bench.net.link().up
    assert not [entry for entry in bench.model.log if entry[0] == "config"]
    bench.net.reset()
    bench.net.configure()
    assert bench.net.facts.mac == facts.mac, "a made-up address stays"


def test_turned_off_features_are_not_read(make: Make) -> None:
    bench = make(wanted=features.select(off=["MAC", "STATUS", "MTU", "SPEED_DUPLEX", "MQ", "RSS"]))
    bench.net.configure()
    assert bench.net.facts.mac_is_local
    assert [entry for entry in bench.model.log if entry[0] == "config"] == [("config", 8, 2)], "the pairs are told"


@pytest.mark.parametrize(("offered", "smallest"), [(ALL_SUPPORTED, 12), (ALL_SUPPORTED & ~mask_of("MRG_RXBUF"), 9026)])
def test_receive_buffers_hold_a_whole_frame_unless_it_may_span_several(make: Make, offered: int, smallest: int) -> None:
    bench = make(NetModel(offered=offered, mtu=9000))
    bench.net.configure()
    assert bench.net.facts.smallest_rx_buffer == smallest


@pytest.mark.parametrize("mac", [bytes(6), b"\xff" * 6, bytes.fromhex("010203040506")])
def test_a_mac_address_of_no_station_is_refused(make: Make, mac: bytes) -> None:
    bench = make(NetModel(mac=mac))
    with pytest.raises(Misbehaved, match="MAC address"):
        bench.net.configure()


def test_an_mtu_below_the_least_is_refused(make: Make) -> None:
    bench = make(NetModel(mtu=67))
    with pytest.raises(Misbehaved, match="MTU is 67"):
        bench.net.configure()


@pytest.mark.parametrize("pairs", [0, 0x8001])
def test_an_impossible_number_of_queue_pairs_is_refused(make: Make, pairs: int) -> None:
    bench = make(NetModel(pairs=pairs, offered=ALL_SUPPORTED | mask_of("MQ")))
    with pytest.raises(Misbehaved, match=f"max_virtqueue_pairs is {pairs}"):
        bench.net.configure()


def test_a_configuration_that_changes_once_is_read_again(make: Make) -> None:
    bench = make(NetModel(generation_changes=1))
    bench.net.configure()
    assert bench.net.facts.mac == MAC
    assert [entry for entry in bench.model.log if entry[0] == "config"].count(("config", 10, 2)) == 2


def test_a_configuration_that_never_stops_changing_is_given_up_on(make: Make) -> None:
    bench = make(NetModel(generation_changes=-1))
    with pytest.raises(ConfigUnstable, match="changed during each of"):
        bench.net.configure()
    assert [entry for entry in bench.model.log if entry[0] == "config"].count(("config", 10, 2)) == CONFIG_ATTEMPTS


# ---- Failure: FAILED is set, the device is reset, nothing is left (see the fixture)

FAILURES = [
    pytest.param({"offered": 0}, FeatureMissing, id="no-features"),
    pytest.param({"refuses_features": True}, FeaturesRefused, id="features-refused"),
    pytest.param({"generation_changes": -1}, ConfigUnstable, id="configuration-unstable"),
    pytest.param({"mac": bytes(6)}, Misbehaved, id="no-mac"),
    pytest.param({"vectors": 1}, VectorRefused, id="too-few-vectors"),
    pytest.param({"refused_vectors": (0,)}, VectorRefused, id="config-vector"),
    pytest.param({"refused_vectors": (1,)}, VectorRefused, id="rx-vector"),
    pytest.param({"refused_vectors": (2,)}, VectorRefused, id="tx-vector"),
    pytest.param({"queue_sizes": (256,)}, QueueUnusable, id="one-queue"),
    pytest.param({"queue_sizes": ()}, QueueUnusable, id="no-queues"),
    pytest.param({"queue_sizes": (0, 256)}, QueueUnusable, id="no-rx-queue"),
    pytest.param({"queue_sizes": (256, 0)}, QueueUnusable, id="no-tx-queue"),
    pytest.param({"queue_sizes": (256, 100)}, QueueUnusable, id="no-power-of-two"),
    pytest.param({"queue_sizes": (65535, 256)}, QueueUnusable, id="queue-too-large"),
    pytest.param({"stays_enabled": True}, Misbehaved, id="enabled-after-reset"),
    pytest.param({"needs_reset_on": D}, NeedsReset, id="needs-reset-early"),
]


@pytest.mark.parametrize(("switches", "error"), FAILURES)
def test_a_failure_sets_failed_and_resets(make: Make, switches: dict[str, Any], error: type[DeviceError]) -> None:
    bench = make(NetModel(**switches))
    with pytest.raises(error, match=r"^fake"):
        bench.net.configure()
    assert bench.net.state is State.FAILED
    statuses = [int(entry[1]) for entry in bench.model.log if entry[0] == "status"]  # type: ignore[call-overload]
    assert statuses[-2] & FAILED, "FAILED was set"
    assert statuses[-1] == 0, "and the device reset"
    assert not bench.transport.eventfds


@pytest.mark.parametrize(("switches", "error"), FAILURES)
def test_a_device_that_comes_to_its_senses_can_be_configured(
    make: Make, switches: dict[str, Any], error: type[DeviceError]
) -> None:
    bench = make(NetModel(**switches))
    with pytest.raises(error):
        bench.net.configure()
    for name in switches:
        setattr(bench.model, name, getattr(NetModel(), name))
    bench.net.configure()
    bench.net.start()
    assert bench.net.state is State.LIVE


@pytest.mark.parametrize("method", ["enable_vectors", "set_up_queue"])
def test_an_error_from_below_is_no_different(make: Make, method: str) -> None:
    bench = make()
    bench.transport.fail_on = method
    with pytest.raises(RuntimeError, match=method):
        bench.net.configure()
    assert bench.net.state is State.FAILED
    assert bench.model.status == 0


def test_memory_that_is_not_to_be_had_is_no_different(make: Make) -> None:
    bench = make()

    def refuse(size: int) -> object:
        raise MemoryError("none left")

    bench.dma.allocate = refuse  # type: ignore[method-assign, assignment]
    with pytest.raises(MemoryError):
        bench.net.configure()
    assert bench.net.state is State.FAILED
    assert bench.model.status == 0


def test_ctrl_c_in_the_middle_leaves_the_device_reset(make: Make) -> None:
    bench = make()

    def interrupted(offset: int, width: int) -> int:
        raise KeyboardInterrupt

    bench.transport.read_config = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        bench.net.configure()
    assert bench.net.state is State.FAILED
    assert bench.model.status == 0


def test_a_reset_that_never_completes_cuts_the_device_off(make: Make) -> None:
    bench = make(NetModel(status=A | D | OK))
    bench.net.configure()
    bench.model.reset_reads = -1
    with pytest.raises(ResetTimeout):
        bench.net.reset()
    assert bench.net.state is State.FAILED
    assert not bench.transport.dma
    assert bench.dma.open, "its memory stays until it is let go of: the device may still be reading it"


def test_a_device_that_never_resets_is_never_configured(make: Make) -> None:
    bench = make(NetModel(reset_reads=-1))
    with pytest.raises(ResetTimeout):
        bench.net.configure()
    assert bench.net.state is State.FAILED
    assert [entry for entry in bench.model.log if entry[0] == "status"] == [("status", 0)]


def test_the_first_error_is_told_and_a_second_one_noted(make: Make) -> None:
    bench = make(NetModel(refused_vectors=(1,)))
    resets: list[float] = []
    real = bench.transport.reset

    def reset_once(deadline_s: float = 0) -> None:
        resets.append(deadline_s)
        if len(resets) == 2:
            raise RuntimeError("stuck")
        real(deadline_s)

    bench.transport.reset = reset_once  # type: ignore[method-assign]
    with pytest.raises(VectorRefused) as caught:
        bench.net.configure()
    assert caught.value.__notes__ == ["resetting it failed as well: stuck"]
    assert not bench.transport.dma


def test_an_unplugged_device_is_not_written_to_any_more(make: Make) -> None:
    bench = make()
    bench.net.configure()
    bench.model.gone = True
    done = len(bench.model.log)
    with pytest.raises(Gone, match="unplugged"):
        bench.net.start()
    assert bench.net.state is State.FAILED
    assert bench.model.log[done:] == [("dma", False)]


# ---- In service


def test_driver_ok_that_does_not_stick_is_refused(make: Make) -> None:
    bench = make(NetModel(ignores_driver_ok=True))
    bench.net.configure()
    with pytest.raises(Misbehaved, match="DRIVER_OK was set, but the status reads 0x0b"):
        bench.net.start()
    assert bench.net.state is State.FAILED
    assert bench.model.notified == []


def test_needs_reset_is_seen_and_a_reset_leads_out_of_it(make: Make) -> None:
    bench = make()
    bench.net.configure()
    bench.net.start()
    assert not bench.net.needs_reset()
    bench.model.status |= NEEDS
    assert bench.net.needs_reset()
    assert bench.net.needs_reset()
    assert bench.net.state is State.NEEDS_RESET
    with pytest.raises(WrongState, match="only a reset leads out of it"):
        bench.net.start()
    with pytest.raises(WrongState, match="only a reset leads out of it"):
        bench.net.configure()
    bench.net.reset()
    bench.net.configure()
    bench.net.start()
    assert not bench.net.needs_reset()


def test_a_device_in_service_is_not_configured_again(make: Make) -> None:
    bench = make()
    bench.net.configure()
    for act in (bench.net.start, lambda: None):
        done = len(bench.model.log)
        with pytest.raises(WrongState, match="once"):
            bench.net.configure()
        assert len(bench.model.log) == done, "the device was left alone"
        act()
    with pytest.raises(WrongState, match="in service already"):
        bench.net.start()


def test_a_device_is_not_started_before_it_is_configured(make: Make) -> None:
    bench = make()
    with pytest.raises(WrongState):
        bench.net.start()
    bench.net.reset()
    with pytest.raises(WrongState, match="queues at once, so they are set up first"):
        bench.net.start()
    assert bench.model.notified == []


@pytest.mark.parametrize("what", ["facts", "negotiation", "rx", "tx", "tx_slots"])
def test_what_configure_finds_out_is_not_there_before_or_after(make: Make, what: str) -> None:
    bench = make()
    with pytest.raises(WrongState, match=r"FOUND .*; configure it first"):
        getattr(bench.net, what)
    bench.net.configure()
    getattr(bench.net, what)
    bench.net.reset()
    with pytest.raises(WrongState, match=r"RESET .*; configure it first"):
        getattr(bench.net, what)


# ---- The end


def test_closing_resets_and_cuts_off(make: Make) -> None:
    bench = make()
    bench.net.configure()
    bench.net.start()
    done = len(bench.model.log)
    bench.net.close()
    assert bench.model.log[done:] == [("status", 0), ("dma", False)]
    bench.net.close()


def test_a_device_that_was_never_touched_is_not_reset(make: Make) -> None:
    bench = make()
    bench.net.close()
    assert ("status", 0) not in bench.model.log


def test_closing_lets_go_of_everything_although_the_reset_fails(make: Make) -> None:
    bench = make()
    bench.net.configure()
    bench.model.reset_reads = -1
    with pytest.raises(ResetTimeout):
        bench.net.close()
    assert bench.net.state is State.CLOSED
    assert not bench.dma.open
    assert bench.transport.closed


def test_a_closed_device_stays_closed(make: Make) -> None:
    bench = make()
    bench.net.close()
    with pytest.raises(WrongState, match="let go of"):
        bench.net.configure()
    with pytest.raises(WrongState, match="let go of"):
        bench.net.reset()


@pytest.mark.parametrize("size", [0, 3, 65536])
def test_an_impossible_queue_size_is_refused_and_the_transport_closed(size: int) -> None:
    transport = FakeTransport(NetModel())
    with pytest.raises(ValueError, match=f"a queue of {size} entries"):
        NetDevice(transport, FakeDma(), rx_size=size)
    assert transport.closed
