"""Tests against DPDK: skipped where it is not installed, failed there when it was asked for (`make interop`)."""

from __future__ import annotations

import pytest

from tests.interop import testpmd


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-dpdk", action="store_true", help="fail, not skip, where DPDK is not to be had")


@pytest.fixture(scope="session", autouse=True)
def dpdk(request: pytest.FixtureRequest) -> None:
    why = testpmd.missing("net_vhost", "net_pcap", "bus_vdev", "mempool_ring")
    if not why:
        return
    if request.config.getoption("--require-dpdk"):
        pytest.fail(f"{why}: tests/interop/host-dpdk installs it", pytrace=False)
    pytest.skip(f"{why}: make interop installs it")
