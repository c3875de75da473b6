"""The ladder of fixtures: image, code disk, a guest, its NIC claimed, its wire.

Part of pytest_plugin.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu.capabilities import lacking, lacks_root
from qemu.completed import CommandFailed
from qemu.dimensions import Dimensions
from qemu.errors import NotOnMetal
from qemu.guest import Guest
from qemu.images import Image
from qemu.session import SESSION, Session
from qemu.tap import Tap
from qemu.truth import Truth

if TYPE_CHECKING:
    from qemu.wire import Wire


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    if reason := lacking(item, None):
        pytest.skip(reason)
    try:
        yield
    except NotOnMetal as error:
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    try:
        yield
    except NotOnMetal as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def guests(pytestconfig: pytest.Config) -> Session:
    """What all guests of this run are made from; guests.boot(name, …) gives a test one of its own."""
    return pytestconfig.stash[SESSION]


@pytest.fixture(scope="session")
def guest_image(guests: Session) -> Image:
    """The image named in the configuration; built when it is not in the cache."""
    return guests.image()


@pytest.fixture(scope="session")
def code_disk(guests: Session) -> Path:
    """The disk with the project's code as it is now."""
    return guests.code()


@pytest.fixture
def shared_guest(guests: Session) -> Guest:
    """The guest that tests in it share, with one NIC; up, though what tests before have left in it is still there."""
    return guests.guest()


@pytest.fixture
def dimensions(request: pytest.FixtureRequest) -> Dimensions:
    """What the test's guest is to be like: the defaults, and what its markers `guest_with` pin."""
    return Dimensions.pinned(marker.kwargs for marker in request.node.iter_markers("guest_with"))


@pytest.fixture
def guest(request: pytest.FixtureRequest, guests: Session, dimensions: Dimensions, artefacts: Path) -> Iterator[Guest]:
    """A guest of the test's own, in which nothing has happened yet. Afterwards it is looked at (truth.py)."""
    if dimensions.needs_tap and (reason := lacks_root()):
        pytest.skip(reason)
    with guests.fresh(artefacts.name, dimensions) as guest:
        if reason := lacking(request.node, guest):
            pytest.skip(reason)
        before = Truth(guest)
        yield guest
        allowed = {kind for marker in request.node.iter_markers("guest_allows") for kind in marker.args}
        problems = [] if getattr(guest, "refused", False) else before.problems(allowed)
        if problems:
            pytest.fail("after the test its guest is not as it has to be:\n  " + "\n  ".join(problems), pytrace=False)


@dataclass(frozen=True)
class Claimed:
    """A NIC that VFIO has: its guest, its PCI address, and the driver that it had."""

    guest: Guest
    address: str
    driver: str


@pytest.fixture
def claimed(guest: Guest) -> Iterator[Claimed]:
    """The guest with its first NIC bound to vfio-pci, and given back afterwards."""
    address = next(address for address in guest.functions("0x02"))
    driver = guest.rebind(address, "vfio-pci")
    yield Claimed(guest, address, driver)
    try:
        guest.rebind(address, driver)
    except CommandFailed as error:
        pytest.fail(f"the NIC {address} could not be given back to {driver}: {error}")


@pytest.fixture
def wire(guest: Guest) -> Wire:
    """The host's end of the NIC of the test's guest."""
    return guest.wire


@pytest.fixture
def tap(guest: Guest) -> Tap:
    """The same of a guest whose NIC has several queue pairs, or offloads: an interface of the host's kernel."""
    peer = guest.machine.nics[0].wire
    assert isinstance(peer, Tap), "only guest_with(queue_pairs=..., offloads=True) makes one"
    return peer


@pytest.fixture
def artefacts(request: pytest.FixtureRequest, guests: Session) -> Path:
    """A directory for what this test wants to keep."""
    path: Path = guests.artefacts / re.sub(r"[^\w.\[\]-]+", "-", request.node.nodeid).strip("-")
    path.mkdir(parents=True, exist_ok=True)
    return path
