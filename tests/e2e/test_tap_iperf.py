"""iperf3 between the Linux stack behind the port and a second guest's kernel, whichever of them sends.

The guests are those of the benches, since iperf3 is in no other. How fast it goes is for the benches to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu.session import Session
from tests.e2e import testbed, two_guests
from tests.e2e.two_guests import INTERFACE, THEIRS, THEIRS_6, THEIRS_MAC, Pair

pytestmark = [pytest.mark.needs_root, pytest.mark.thorough]

RECIPE = Path(__file__).resolve().parents[2] / "images" / "bench.toml"
SECONDS = 3
LEAST_BYTES = 1 << 20  # the emulated processor does a hundred times that; a connection that stalls, a window's worth


@pytest.fixture(scope="module")
def pair(guests: Session) -> Iterator[Pair]:
    with two_guests.pair(guests, "iperf", RECIPE) as both:
        two_guests.acquaint(both.ours, INTERFACE, (THEIRS, THEIRS_6), THEIRS_MAC)
        yield both


@pytest.mark.parametrize("address", [THEIRS, THEIRS_6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("way", [(), ("--reverse",)], ids=["ours-sends", "theirs-sends"])
def test_iperf3_both_ways(pair: Pair, address: str, way: tuple[str, ...]) -> None:
    with pair.theirs.start(["iperf3", "--server", "--one-off", "--forceflush", "--bind", address]) as server:
        server.wait_for_line("Server listening", testbed.START_SECONDS)
        words = ["iperf3", "--client", address, "--time", str(SECONDS), "--json", *way]
        told = json.loads(pair.ours.run(words, timeout=120.0).stdout)
        server.wait(testbed.START_SECONDS)
    assert "error" not in told
    assert told["end"]["sum_received"]["bytes"] > LEAST_BYTES
