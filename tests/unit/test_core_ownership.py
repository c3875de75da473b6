"""Who owns which buffer: the core against a model, moved at random by hypothesis.

The model is exact. After every run of the pump it knows each owner's count, every handle that the client was given,
every frame at the device, and every counter; a lie must be answered with the fault that names it, and ends the session.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from netbridge.datapath._core import lib
from tests.unit.core.ownership import (
    HEADER,
    HEADER_IOVA,
    HEADROOM,
    KIND_ACK,
    KIND_RX,
    KIND_TX,
    ROOM,
    RX,
    RX_IOVA,
    STRIDE,
    TX,
    TX_IOVA,
    Chain,
    Entry,
    World,
    handle,
)

pytestmark = pytest.mark.thorough

Shape = dict[str, Any]
SHAPES = st.fixed_dictionaries(
    {
        "rx_size": st.sampled_from([1, 2, 4, 8, 16]),
        "tx_size": st.sampled_from([2, 4, 8, 16]),
        "rx_count": st.integers(1, 24),
        "tx_count": st.integers(1, 12),
        "limit": st.integers(0, 24),
        "burst": st.integers(1, 8),
        "packed": st.booleans(),
        "indirect": st.booleans(),
    }
)

DEVICE_WRITES = 2  # a descriptor's flag (virtio 1.3 §2.7.5)


def whose(address: int) -> tuple[int, int, int]:
    """The region, buffer and offset that the device was given."""
    region, start = (RX, RX_IOVA) if RX_IOVA <= address < TX_IOVA else (TX, TX_IOVA)
    return region, *divmod(address - start, STRIDE)


class Ownership(RuleBasedStateMachine):
    """The verbs of a device and a client, and what must be true after each turn of the pump."""

    world: World | None = None

    @initialize(shape=SHAPES)
    def first_session(self, shape: Shape) -> None:
        self.begin(shape)

    @precondition(lambda self: self.over)
    @rule(shape=SHAPES)
    def next_session(self, shape: Shape) -> None:
        self.begin(shape)

    def begin(self, shape: Shape) -> None:
        self.teardown()
        self.limit, self.burst = shape["limit"], shape["burst"]
        self.world = World(**shape)
        rx_count, tx_count = shape["rx_count"], shape["tx_count"]
        self.over = False
        self.rx_lease = [0] * rx_count
        self.tx_lease = [1] * tx_count
        # The client's, what it forwards and the device has not sent, and what it has given back or sent that the pump
        # has not seen yet.
        self.held: list[Entry] = []
        self.forwarded: set[int] = set()
        self.returned = 0
        self.spare = [Entry(handle(TX, i, 1), ROOM, KIND_ACK) for i in range(tx_count)]
        assert self.world.tx_done.take_all() == self.spare
        self.waiting: deque[bytes] = deque()
        # The device's, and what it has completed that the pump has not seen yet.
        self.posted: list[Chain] = []
        self.sending: list[Chain] = []
        self.delivered: list[tuple[int, bytes]] = []
        self.completed: list[tuple[int, int]] = []  # region and index
        self.received = self.dropped = self.short = self.sent = 0
        self.run_pump()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.close()
            self.world = None

    # ---- The device -----------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.over and self.posted)
    @rule(data=st.data(), length=st.one_of(st.integers(0, 16), st.integers(0, ROOM)), fill=st.integers(0, 255))
    def deliver(self, data: st.DataObject, length: int, fill: int) -> None:
        assert self.world is not None
        chain = self.posted.pop(data.draw(st.integers(0, len(self.posted) - 1), label="which buffer"))
        ((address, room, flags),) = chain.descriptors
        assert flags == DEVICE_WRITES
        assert room == HEADER + ROOM
        index, offset = divmod(address - RX_IOVA, STRIDE)
        assert offset == HEADROOM - HEADER
        frame = bytes([fill]) * length
        start = index * STRIDE + offset
        self.world.rx_bytes[start : start + HEADER + length] = bytes(HEADER) + frame
        self.world.rx_queue.push(chain.head, HEADER + length)
        self.delivered.append((index, frame))

    @precondition(lambda self: not self.over and self.sending)
    @rule(data=st.data(), length=st.integers(0, 2**32 - 1))
    def complete(self, data: st.DataObject, length: int) -> None:
        """The used length of a sent frame means nothing."""
        assert self.world is not None
        chain = self.sending.pop(data.draw(st.integers(0, len(self.sending) - 1), label="which frame"))
        (_, (address, _, _)) = chain.descriptors
        self.world.tx_queue.push(chain.head, length)
        self.completed.append(whose(address)[:2])

    # ---- The client -----------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.over and self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        assert self.world is not None
        entry = self.held.pop(data.draw(st.integers(0, len(self.held) - 1), label="which buffer"))
        self.world.rx_free.put(Entry(entry.handle, 0, KIND_RX))
        self.returned += 1

    @precondition(lambda self: not self.over and self.spare)
    @rule(data=st.data(), length=st.integers(14, ROOM), fill=st.integers(0, 255))
    def send(self, data: st.DataObject, length: int, fill: int) -> None:
        assert self.world is not None
        entry = self.spare.pop(data.draw(st.integers(0, len(self.spare) - 1), label="which buffer"))
        frame = bytes([fill]) * length
        start = entry.index * STRIDE + HEADROOM
        self.world.tx_bytes[start : start + length] = frame
        self.world.tx_active.put(Entry(entry.handle, length, KIND_TX))
        self.waiting.append(frame)

    @precondition(lambda self: not self.over and self.held)
    @rule(data=st.data(), length=st.integers(14, ROOM))
    def forward(self, data: st.DataObject, length: int) -> None:
        assert self.world is not None
        entry = self.held.pop(data.draw(st.integers(0, len(self.held) - 1), label="which buffer"))
        self.world.tx_active.put(Entry(entry.handle, length, KIND_TX))
        start = entry.index * STRIDE + HEADROOM
        self.waiting.append(bytes(self.world.rx_bytes[start : start + length]))
        self.forwarded.add(entry.index)

    # ---- The pump -------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.over)
    @rule()
    def run_pump(self) -> None:
        assert self.world is not None
        assert self.world.pump() == (lib.NB_EVENT_CONTROL, 0)
        self.check_received()
        self.check_acknowledged()
        self.check_device()
        counters = self.world.counters
        assert counters.packets_rx == self.received
        assert counters.packets_tx == self.sent
        assert counters.drops[lib.NB_DROP_CLIENT_SLOW] == self.dropped
        assert counters.drops[lib.NB_DROP_TOO_SHORT] == self.short

    def check_received(self) -> None:
        assert self.world is not None
        self.returned = 0
        lent: list[Entry] = []
        for number, (index, frame) in enumerate(self.delivered):
            self.received += 1
            if number == self.burst:
                self.forget_sent()
            if len(frame) < 14:
                self.short += 1
            elif len(self.held) + len(self.forwarded) + len(lent) + 1 > self.limit:
                self.dropped += 1
            else:
                self.rx_lease[index] += 1
                lent.append(Entry(handle(RX, index, self.rx_lease[index]), len(frame), KIND_RX))
                start = index * STRIDE + HEADROOM
                assert bytes(self.world.rx_bytes[start : start + len(frame)]) == frame
        self.delivered = []
        assert self.world.rx_active.take_all() == lent
        self.held += lent
        self.forget_sent()

    def forget_sent(self) -> None:
        """A round takes what was sent after a burst of what was received."""
        self.forwarded -= {index for region, index in self.completed if region == RX}

    def check_rx_owners(self) -> None:
        assert self.world is not None
        in_queue = len(self.posted)
        assert in_queue == min(self.world.rx_queue.size, self.world.rx_count - len(self.held) - len(self.forwarded))
        sent = sum(whose(chain.descriptors[1][0])[0] == RX for chain in self.sending)
        client = len(self.held) + len(self.forwarded) - sent
        driver = self.world.rx_count - in_queue - sent - client
        assert self.world.owned(RX) == (driver, in_queue + sent, client)

    def check_acknowledged(self) -> None:
        assert self.world is not None
        acknowledged = []
        for region, index in self.completed:
            self.sent += 1
            if region == RX:
                continue
            self.tx_lease[index] += 1
            acknowledged.append(Entry(handle(TX, index, self.tx_lease[index]), ROOM, KIND_ACK))
        self.completed = []
        assert self.world.tx_done.take_all() == acknowledged
        self.spare += acknowledged

    def check_device(self) -> None:
        assert self.world is not None
        self.posted += self.world.rx_queue.pop_all()
        fresh = self.world.tx_queue.pop_all()
        room = self.world.tx_queue.frames - len(self.sending)
        assert len(fresh) == min(room, len(self.waiting))
        for chain in fresh:
            header, (address, length, flags) = chain.descriptors
            assert header == (HEADER_IOVA, HEADER, 0)
            assert flags == 0
            region, index, offset = whose(address)
            assert offset == HEADROOM
            memory = self.world.rx_bytes if region == RX else self.world.tx_bytes
            start = index * STRIDE + HEADROOM
            assert bytes(memory[start : start + length]) == self.waiting.popleft()
        self.sending += fresh
        sent = sum(whose(chain.descriptors[1][0])[0] == TX for chain in self.sending)
        assert self.world.owned(TX) == (0, sent, self.world.tx_count - sent)
        self.check_rx_owners()

    # ---- Lies: each ends the session ------------------------------------------------------------------------------

    def expect_fault(self, event: int, detail: int) -> None:
        assert self.world is not None
        counted = self.world.counters
        assert self.world.pump() == (event, detail)
        refusals = [int(count) for count in counted.refused_handles]
        faults = [int(count) for count in counted.device_faults]
        wanted = refusals if event == lib.NB_EVENT_CLIENT_FAULT else faults
        assert wanted[detail] == 1
        assert sum(refusals) + sum(faults) == 1
        assert sum(self.world.owned(RX)) == self.world.rx_count
        assert sum(self.world.owned(TX)) == self.world.tx_count
        self.over = True

    @precondition(lambda self: not self.over and self.held and not self.returned)
    @rule(
        data=st.data(),
        wrong=st.sampled_from(["region", "index", "session", "lease", "kind", "flags", "twice"]),
    )
    def lie_about_a_return(self, data: st.DataObject, wrong: str) -> None:
        assert self.world is not None
        self.run_pump()
        good = data.draw(st.sampled_from(self.held)).handle
        lies = {
            "region": (Entry(good + (1 << 24), 0, KIND_RX), lib.NB_REFUSE_REGION),
            "index": (Entry(good | 0xFFFFFF, 0, KIND_RX), lib.NB_REFUSE_INDEX),
            "session": (Entry(good ^ 1 << 48, 0, KIND_RX), lib.NB_REFUSE_SESSION),
            "lease": (Entry(good ^ 1 << 40, 0, KIND_RX), lib.NB_REFUSE_LEASE),
            "kind": (Entry(good, 0, KIND_ACK), lib.NB_REFUSE_KIND),
            "flags": (Entry(good, 0, KIND_RX, 1), lib.NB_REFUSE_KIND),
            "twice": (Entry(good, 0, KIND_RX), lib.NB_REFUSE_OWNER),
        }
        entry, refusal = lies[wrong]
        if wrong == "twice":
            self.world.rx_free.put(entry)
            if self.world.rx_free.slots == 1:  # there is not even room for a second
                refusal = lib.NB_REFUSE_RING_JUMP
        self.world.rx_free.put(entry)
        self.expect_fault(lib.NB_EVENT_CLIENT_FAULT, refusal)

    @precondition(lambda self: not self.over and self.sending)
    @rule(data=st.data(), wrong=st.sampled_from(["id", "twice", "jump"]))
    def lie_about_a_completion(self, data: st.DataObject, wrong: str) -> None:
        assert self.world is not None
        self.run_pump()
        queue = self.world.tx_queue
        if not self.sending:
            return
        head = data.draw(st.sampled_from(self.sending)).head
        if wrong == "id":
            queue.push(queue.size + head, 0)
            self.expect_fault(lib.NB_EVENT_DEVICE_FAULT, lib.NB_FAULT_USED_ID)
        elif wrong == "twice":
            if not queue.has_place_for_two(head):
                return
            queue.push(head, 0)
            queue.push(head, 0)
            # With one frame in flight there is not even room for a second completion.
            fault = lib.NB_FAULT_USED_ID if len(self.sending) > 1 else lib.NB_FAULT_USED_JUMP
            self.expect_fault(lib.NB_EVENT_DEVICE_FAULT, fault)
        else:
            self.expect_fault(lib.NB_EVENT_DEVICE_FAULT, queue.jump(len(self.sending)))


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(
    max_examples=20 * int(os.environ.get("CORE_TIMES", "1")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
