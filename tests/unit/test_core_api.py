"""What Python relies on in the C core: sizes that others wrote down too, and frames that flow without the GIL."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from netbridge.datapath._core import ffi, lib
from netbridge.ipc import geometry
from tests.unit.core.ownership import World


@pytest.fixture
def world() -> Iterator[World]:
    world = World(rx_size=4, tx_size=4, rx_count=8, tx_count=4, limit=8, burst=4)
    yield world
    world.close()


def test_the_port_and_the_core_agree_on_sizes() -> None:
    assert ffi.sizeof("struct nb_ring_header") == geometry.RING_HEADER_BYTES
    assert ffi.sizeof("struct nb_entry") == geometry.RING_ENTRY_BYTES


def test_the_most_buffers_of_the_port_are_the_most_of_the_core() -> None:
    region = {"base": ffi.NULL, "iova": 0, "stride": 2048, "headroom": 64, "session": 1, "id": lib.NB_REGION_RX}
    most = lib.nb_ledger_new(ffi.new("struct nb_region *", {**region, "count": geometry.MOST_BUFFERS}))
    assert most != ffi.NULL
    lib.nb_ledger_free(most)
    assert lib.nb_ledger_new(ffi.new("struct nb_region *", {**region, "count": geometry.MOST_BUFFERS + 1})) == ffi.NULL


def test_other_threads_run_while_the_pump_sleeps(world: World) -> None:
    os.eventfd_read(world.control_fd)
    result = ffi.new("struct nb_pump_result *")
    pump = threading.Thread(target=lib.nb_pump_run, args=(world.core, result))
    patience_s = 10
    begun = time.monotonic()
    # If the pump kept the GIL nothing here could end it, so somebody outside stands by who can.
    ring = f"sleep {patience_s}; printf '\\001\\0\\0\\0\\0\\0\\0\\0' >&{world.control_fd}"
    with subprocess.Popen(["sh", "-c", ring], pass_fds=[world.control_fd]) as rescuer:
        pump.start()
        while world.counters.sleeps == 0:
            time.sleep(0.001)
            assert time.monotonic() < begun + patience_s, "the pump did not fall asleep, or it kept the GIL"
        os.eventfd_write(world.control_fd, 1)
        pump.join(patience_s)
        rescuer.kill()
    assert not pump.is_alive()
    assert result.event == lib.NB_EVENT_CONTROL
