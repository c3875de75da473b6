"""Ten thousand sessions in a row, between a whole driver and a client: sessions, ledgers, pumps, and a reset of the
device each. Neither process may keep a file, a mapping or memory of them."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from netbridge.client import RequestRefused
from tests.unit.test_vhost_run import accept, listening, running

pytestmark = pytest.mark.thorough

SESSIONS, SETTLED = 10_000, 1_000
PAGES_OF_GRACE = 256  # of the allocator's, 1 MiB; a leak of one object of 117 bytes a session is more


def held(pid: int) -> tuple[int, int, int]:
    """A process's open files, mapped memfds and resident pages."""
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").count("memfd:")
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), maps, pages


def test_ten_thousand_sessions_leave_nothing(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 7 * SESSIONS, "else a leak of files has room"
    with listening(tmp_path) as listener, running(tmp_path) as run:
        back_end = accept(listener)
        processes = (run.process.pid, os.getpid())
        for number in range(SESSIONS):
            with run.connect() as port:
                port.send_bytes(bytes(60))
                # Answered by a driver that serves this session: so it is as far as in any other.
                with pytest.raises(RequestRefused):
                    port.set_mac(bytes([2, 0, 0, 0, 0, 1]))
                back_end.requests.clear()  # which it keeps for other tests
                back_end.tables.clear()
                if number == SETTLED:
                    before = [held(pid) for pid in processes]
                elif number == SESSIONS - 1:
                    after = [held(pid) for pid in processes]
        for was, now in zip(before, after, strict=True):
            assert now[:2] == was[:2]
            assert now[2] <= was[2] + PAGES_OF_GRACE
        code, out, err = run.end()
    back_end.join()
    assert code == 0, err
    assert json.loads(out)["sessions"] == SESSIONS
