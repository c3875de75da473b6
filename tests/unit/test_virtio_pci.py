"""Virtio over PCI: ids, the capability walk, and registers accessed with their exact width."""

from collections.abc import Callable, Iterator

import pytest

from netbridge.virtio.errors import Gone, Misbehaved, NotVirtioNet, ResetTimeout
from netbridge.virtio.identity import require_virtio_net
from netbridge.virtio.pci import Kind, VirtioPci
from netbridge.virtio.transport import NO_VECTOR, QueueSetup, Status
from tests.unit.virtio_fakes import (
    BAR_BYTES,
    CONFIG_AT,
    ISR_AT,
    NOTIFY_AT,
    FakePciFunction,
    NetModel,
    VendorCapability,
    usual_capabilities,
)
from vfio import Malformed

Make = Callable[..., FakePciFunction]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes PCI functions, and sees to it that none of their BARs stays mapped."""
    made: list[tuple[FakePciFunction, list[VirtioPci]]] = []

    def make_one(model: NetModel | None = None, **options: object) -> FakePciFunction:
        function = FakePciFunction(model or NetModel(), **options)  # type: ignore[arg-type]
        made.append((function, []))
        return function

    yield make_one
    for function, _ in made:
        assert not function.open_bars, "a BAR stayed mapped"
        function.close()


@pytest.fixture
def reach(make: Make) -> Iterator[Callable[..., tuple[VirtioPci, FakePciFunction]]]:
    """Makes a function and the transport on it; closes the transport."""
    opened: list[VirtioPci] = []

    def reach_one(model: NetModel | None = None, **options: object) -> tuple[VirtioPci, FakePciFunction]:
        function = make(model, **options)
        transport = VirtioPci(function)
        opened.append(transport)
        return transport, function

    yield reach_one
    for transport in opened:
        transport.close()


Reach = Callable[..., tuple[VirtioPci, FakePciFunction]]


# ---- Which device it is


def test_the_modern_network_device_is_accepted() -> None:
    require_virtio_net("0000:01:00.0", 0x1AF4, 0x1041, 0x020000)


@pytest.mark.parametrize(
    ("vendor", "device", "class_code", "words"),
    [
        (0x1AF4, 0x1000, 0x020000, "transitional virtio network device (1af4:1000)"),
        (0x1AF4, 0x1042, 0x010000, "virtio device of another kind (block, 1af4:1042)"),
        (0x1AF4, 0x1001, 0x010000, "transitional virtio device of another kind (block, 1af4:1001)"),
        (0x1AF4, 0x1079, 0x020000, "another kind (type 57, 1af4:1079)"),
        (0x8086, 0x100E, 0x020000, "not a virtio device but 8086:100e, class 020000 (network)"),
        (0x144D, 0xA80A, 0x010802, "not a virtio device but 144d:a80a, class 010802 (mass storage)"),
        (0x1AF4, 0x1100, 0x050000, "not a virtio device but 1af4:1100"),
        (0x1041, 0x1AF4, 0x020000, "not a virtio device"),
    ],
)
def test_any_other_device_is_refused_by_what_it_is(vendor: int, device: int, class_code: int, words: str) -> None:
    with pytest.raises(NotVirtioNet) as caught:
        require_virtio_net("0000:01:00.0", vendor, device, class_code)
    assert words in str(caught.value)
    assert str(caught.value).startswith("0000:01:00.0 is ")


def test_a_transitional_device_is_refused_with_the_flag_that_helps() -> None:
    with pytest.raises(NotVirtioNet, match="disable-legacy=on"):
        require_virtio_net("0000:01:00.0", 0x1AF4, 0x1000, 0x020000)


def test_a_wrong_device_is_refused_before_a_bar_is_touched(make: Make) -> None:
    function = make(device=0x1042)
    with pytest.raises(NotVirtioNet):
        VirtioPci(function)
    assert not function.bars


# ---- The capability walk


def test_the_structures_are_found_where_the_device_says(reach: Reach) -> None:
    transport, _ = reach()
    places = {structure.kind: (structure.bar_index, structure.offset) for structure in transport.structures}
    assert places == {
        Kind.COMMON: (4, 0),
        Kind.NOTIFY: (4, NOTIFY_AT),
        Kind.ISR: (4, ISR_AT),
        Kind.DEVICE: (4, CONFIG_AT),
    }
    assert transport.vectors == 4


def test_a_list_that_loops_is_refused(make: Make) -> None:
    with pytest.raises((Misbehaved, Malformed)):
        VirtioPci(make(loop_to=0x40))


class Circle:
    """A configuration space whose list of capabilities comes round again without anybody noticing."""

    def __init__(self, function: FakePciFunction) -> None:
        self._real = function.config
        self.read8, self.read16, self.read32 = self._real.read8, self._real.read16, self._real.read32

    def capabilities(self) -> list[object]:
        return [*self._real.capabilities(), self._real.capabilities()[1]]


def test_a_loop_that_the_walk_below_let_through_is_refused_too(make: Make) -> None:
    function = make()
    function.config = Circle(function)  # type: ignore[assignment]
    with pytest.raises(Misbehaved, match="runs in a circle through 0x4c"):
        VirtioPci(function)


def replaced(kind: int, **changes: object) -> list[VendorCapability]:
    """The usual capabilities, one of them different."""
    capabilities = usual_capabilities()
    for capability in capabilities:
        if capability.cfg_type == kind:
            for name, value in changes.items():
                setattr(capability, name, value)
    return capabilities


BAD_CAPABILITIES = [
    pytest.param(Kind.COMMON, {"offset": 0xFFFFF000, "length": 0x2000}, "ends beyond BAR 4", id="overflow"),
    pytest.param(Kind.COMMON, {"offset": 0xFFFFFFFC, "length": 0xFFFFFFFF}, "ends beyond BAR 4", id="both-huge"),
    pytest.param(Kind.DEVICE, {"offset": BAR_BYTES, "length": 64}, "ends beyond BAR 4", id="just-outside"),
    pytest.param(Kind.DEVICE, {"offset": BAR_BYTES - 4, "length": 8}, "ends beyond BAR 4", id="half-outside"),
    pytest.param(Kind.COMMON, {"length": 0x37}, "at least 56", id="common-too-short"),
    pytest.param(Kind.NOTIFY, {"length": 1}, "at least 2", id="notify-too-short"),
    pytest.param(Kind.ISR, {"length": 0}, "at least 1", id="isr-empty"),
    pytest.param(Kind.COMMON, {"offset": 2}, "no multiple of 4", id="common-misaligned"),
    pytest.param(Kind.NOTIFY, {"offset": NOTIFY_AT + 1, "length": 64}, "no multiple of 2", id="notify-misaligned"),
    pytest.param(Kind.COMMON, {"cap_len": 15}, "15 bytes long", id="capability-too-short"),
    pytest.param(Kind.NOTIFY, {"cap_len": 16}, "16 bytes long", id="no-multiplier"),
    pytest.param(Kind.COMMON, {"cap_len": 255}, "255 bytes long", id="capability-beyond-the-space"),
    pytest.param(Kind.COMMON, {"bar": 2}, "BAR 2 is not implemented", id="bar-absent"),
    pytest.param(Kind.NOTIFY, {"multiplier": 3}, "notify_off_multiplier is 3", id="odd-multiplier"),
    pytest.param(Kind.NOTIFY, {"multiplier": 6}, "notify_off_multiplier is 6", id="multiplier-no-power"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), BAD_CAPABILITIES)
def test_a_capability_that_does_not_hold_together_is_refused(
    make: Make, kind: Kind, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(Misbehaved, match=r"no usable .* structure") as caught:
        VirtioPci(make(capabilities=replaced(kind, **changes)))
    assert words in str(caught.value)


@pytest.mark.parametrize(("kind", "changes", "words"), BAD_CAPABILITIES)
def test_the_first_good_capability_of_a_kind_is_taken(
    reach: Reach, kind: Kind, changes: dict[str, object], words: str
) -> None:
    good = next(capability for capability in usual_capabilities() if capability.cfg_type == kind)
    transport, _ = reach(capabilities=[*replaced(kind, **changes), good])
    found = next(structure for structure in transport.structures if structure.kind is kind)
    assert found.offset == good.offset


def test_of_two_good_capabilities_the_first_is_taken(reach: Reach) -> None:
    later = VendorCapability(Kind.DEVICE, CONFIG_AT + 0x100, 64)
    transport, _ = reach(capabilities=[*usual_capabilities(), later])
    assert next(s.offset for s in transport.structures if s.kind is Kind.DEVICE) == CONFIG_AT


@pytest.mark.parametrize("cfg_type", [0, 5, 8, 9, 10, 255])
def test_kinds_it_has_no_use_for_are_passed_over(reach: Reach, cfg_type: int) -> None:
    reach(capabilities=[VendorCapability(cfg_type, 0xFFFFFFFF, 0xFFFFFFFF), *usual_capabilities()])


@pytest.mark.parametrize("bar", [6, 255])
def test_reserved_bars_are_passed_over(reach: Reach, bar: int) -> None:
    # VFIO has a region 6 too, but it is the expansion ROM.
    sizes = {4: BAR_BYTES, bar: BAR_BYTES}
    reserved = VendorCapability(Kind.COMMON, 0, 0x1000, bar=bar)
    transport, _ = reach(capabilities=[reserved, *usual_capabilities()], bar_sizes=sizes)
    assert {structure.bar_index for structure in transport.structures} == {4}


@pytest.mark.parametrize("kind", list(Kind))
def test_a_missing_structure_is_named(make: Make, kind: Kind) -> None:
    rest = [capability for capability in usual_capabilities() if capability.cfg_type != kind]
    title = {1: "common configuration", 2: "notification", 3: "ISR status", 4: "device configuration"}[kind]
    with pytest.raises(Misbehaved, match=f"no usable {title} structure"):
        VirtioPci(make(capabilities=rest))


def test_a_longer_capability_and_structure_than_needed_is_accepted(reach: Reach) -> None:
    capabilities = usual_capabilities()
    capabilities[0].cap_len = 24
    capabilities[0].length = BAR_BYTES
    reach(capabilities=capabilities)


def test_a_notification_bar_that_cannot_be_mapped_is_refused(make: Make) -> None:
    with pytest.raises(Misbehaved, match="cannot be mapped"):
        VirtioPci(make(mapped=False))


def test_a_function_without_msix_has_no_vectors(reach: Reach) -> None:
    transport, _ = reach(msix_vectors=0)
    assert transport.vectors == 0


# ---- Registers


def test_addresses_are_written_as_two_halves_low_first(reach: Reach) -> None:
    transport, function = reach()
    setup = QueueSetup(64, 0x1_2345_6000, 0x2_3456_7000, 0x3_4567_8000, 1)
    assert transport.set_up_queue(1, setup) == 1
    queue = function.model.queues[1]
    assert (queue.size, queue.descriptors, queue.driver_area, queue.device_area, queue.vector) == (
        64,
        0x1_2345_6000,
        0x2_3456_7000,
        0x3_4567_8000,
        1,
    )
    writes = [(name, value) for what, name, value in function.bars[0].accesses if what == "write"]
    assert writes == [
        ("queue_select", 1),
        ("queue_size", 64),
        ("queue_desc_low", 0x2345_6000),
        ("queue_desc_high", 1),
        ("queue_driver_low", 0x3456_7000),
        ("queue_driver_high", 2),
        ("queue_device_low", 0x4567_8000),
        ("queue_device_high", 3),
        ("queue_msix_vector", 1),
    ]


def test_features_are_read_and_written_in_halves(reach: Reach) -> None:
    offered = 0x8000_0003_0001_8028
    transport, function = reach(NetModel(offered=offered))
    assert transport.read_device_features() == offered
    transport.write_driver_features(0x3_0000_8020)
    assert function.model.accepted == 0x3_0000_8020


def test_status_and_generation_are_single_bytes(reach: Reach) -> None:
    transport, function = reach()
    transport.write_status(Status.ACKNOWLEDGE)
    assert transport.read_status() == Status.ACKNOWLEDGE
    assert transport.config_generation() == 7
    assert ("write", "device_status", 1) in function.bars[0].accesses


def test_a_vector_the_device_refuses_reads_back_as_none(reach: Reach) -> None:
    transport, _ = reach(NetModel(refused_vectors=(0,)))
    assert transport.set_config_vector(0) == NO_VECTOR


def test_notify_addresses_follow_offset_and_multiplier(reach: Reach) -> None:
    transport, function = reach()
    base = function.bars[0].address(0)
    assert [transport.notify_address(index) - base for index in (0, 1, 2)] == [NOTIFY_AT, NOTIFY_AT + 4, NOTIFY_AT + 8]


def test_a_multiplier_of_zero_gives_all_queues_one_address(reach: Reach) -> None:
    transport, function = reach(capabilities=usual_capabilities(multiplier=0))
    base = function.bars[0].address(0)
    assert {transport.notify_address(index) - base for index in (0, 1, 2)} == {NOTIFY_AT}


@pytest.mark.parametrize("notify_off", [0x400, 0xFFFF])
def test_a_notification_beyond_its_structure_is_refused(reach: Reach, notify_off: int) -> None:
    model = NetModel()
    transport, _ = reach(model)
    model.queues[1].notify_off = notify_off
    with pytest.raises(Misbehaved, match="queue 1 is notified at byte"):
        transport.notify_address(1)


def test_the_last_notification_that_fits_is_accepted(reach: Reach) -> None:
    model = NetModel()
    transport, _ = reach(model)
    model.queues[1].notify_off = (0x1000 - 4) // 4
    transport.notify_address(1)


def test_a_notification_that_would_lie_across_registers_is_refused(reach: Reach) -> None:
    """With NOTIFICATION_DATA it has 32 bits, and a multiplier of 2 puts every other queue's in the middle of one."""
    transport, _ = reach(capabilities=usual_capabilities(multiplier=2))
    assert transport.notify_address(1, 2)
    assert transport.notify_address(2, 4)
    with pytest.raises(Misbehaved, match=r"queue 1 is notified at byte .* no multiple of the 4 bytes"):
        transport.notify_address(1, 4)


@pytest.mark.parametrize("length", [8, 10, 11])
def test_a_field_beyond_the_configuration_is_refused(reach: Reach, length: int) -> None:
    transport, _ = reach(capabilities=replaced(Kind.DEVICE, length=length))
    assert transport.read_config(6, 2) == 1
    with pytest.raises(Misbehaved, match=rf"{length} bytes, .* field at 10 to 11"):
        transport.read_config(10, 2)


def test_a_queue_size_that_does_not_stick_is_refused(reach: Reach) -> None:
    transport, _ = reach(NetModel(queue_sizes=(256,)))
    with pytest.raises(Misbehaved, match="queue 5 was given 64 entries and reads back 0"):
        transport.set_up_queue(5, QueueSetup(64, 0, 0, 0, NO_VECTOR))


# ---- Reset, interrupts, the end


def test_reset_waits_until_the_status_reads_zero(reach: Reach) -> None:
    transport, function = reach(NetModel(status=0x0F, reset_reads=3))
    transport.reset()
    reads = [value for what, name, value in function.bars[0].accesses if (what, name) == ("read", "device_status")]
    assert reads == [0x0F, 0x0F, 0x0F, 0]


def test_a_reset_that_never_completes_ends_at_its_deadline(reach: Reach) -> None:
    transport, _ = reach(NetModel(status=0x0F, reset_reads=-1))
    with pytest.raises(
        ResetTimeout, match=r"after 0\.01 s its status still reads 0x0f \(ACKNOWLEDGE, DRIVER, DRIVER_OK"
    ):
        transport.reset(deadline_s=0.01)


def test_a_device_that_is_gone_is_told_from_one_that_is_slow(reach: Reach) -> None:
    transport, _ = reach(NetModel(gone=True))
    with pytest.raises(Gone, match="unplugged"):
        transport.reset(deadline_s=0.01)


def test_interrupts_are_undone_the_way_they_were_made(reach: Reach) -> None:
    transport, function = reach()
    transport.enable_vectors((10, 11, 12))
    assert function.irqs.msix == [10, 11, 12]
    transport.disable_interrupts()
    assert function.irqs.msix == []
    transport.enable_intx(20, 21)
    assert (function.irqs.intx, function.irqs.unmask, function.intx_disabled) == (20, 21, False)
    transport.disable_interrupts()
    assert (function.irqs.intx, function.irqs.unmask) == (None, None)


def test_dma_is_the_bus_master_bit(reach: Reach) -> None:
    transport, function = reach()
    transport.allow_dma(True)
    assert function.bus_master
    transport.allow_dma(False)
    assert not function.bus_master


def test_closing_twice_is_harmless(reach: Reach) -> None:
    transport, function = reach()
    transport.close()
    transport.close()
    assert not function.open_bars
