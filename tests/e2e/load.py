"""Frames that come all the while something else goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Self

from qemu.wire import Wire, WireClosed, WireStalled
from tests.e2e.testbed import START_SECONDS
from tests.e2e.traffic import Generator

GAP_SECONDS = 0.002
PATIENCE_SECONDS = 0.2


class Load:
    """Keeps sending frames until the end of the block, and reads nothing: what comes back is taken when the account is
    settled afterwards."""

    def __init__(self, wire: Wire, mac: str) -> None:
        self._wire = wire
        self._frames = Generator(mac).udp(256)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")

    def _run(self) -> None:
        while True:
            for frame in self._frames:
                # A NIC without a driver, or with its link down or its machine paused, takes none: then they wait.
                with contextlib.suppress(WireStalled):
                    try:
                        self._wire.send(frame, timeout=PATIENCE_SECONDS)
                    except WireClosed:
                        return
                if self._stop.wait(GAP_SECONDS):
                    return

    def wait_for_answers(self, count: int) -> None:
        """Until so many frames have come back: driver and service are at work. Raises AssertionError."""
        wanted, deadline = self._wire.received + count, time.monotonic() + START_SECONDS
        while (missing := wanted - self._wire.received) > 0:
            assert time.monotonic() < deadline, f"{missing} of {count} frames have not come back"
            time.sleep(0.005)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
