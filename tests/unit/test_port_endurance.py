"""Ten thousand sessions in a row: nothing is left of any of them, in either client or the server."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from netbridge.client import connect
from netbridge.ipc.server import ClientGone
from tests.unit.port_fakes import OfferedSession, ServedPort, open_fds

pytestmark = pytest.mark.thorough

SESSIONS, SETTLED = 10_000, 1_000
PAGES_OF_GRACE = 256  # of the allocator's, 1 MiB; a leak of one object of 105 bytes a session is more


def mappings() -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:")


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])


def test_ten_thousand_sessions_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "aethernet.sock"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 7 * SESSIONS, "else a leak of files has room"
    with ServedPort(path) as port:
        after: list[tuple[int, int]] = []
        pages = 0
        for number in range(1, SESSIONS + 1):
            with OfferedSession(number % 65535 + 1) as offered:
                with port.paused() as server:
                    server.offer(offered.session)
                with connect(path):
                    pass
                while not isinstance(port.await_event(), ClientGone):
                    pass
            if number == SETTLED:
                after.append((open_fds(), mappings()))
                pages = resident_pages()
        after.append((open_fds(), mappings()))
        assert after[0] == after[1]
        assert resident_pages() <= pages + PAGES_OF_GRACE
