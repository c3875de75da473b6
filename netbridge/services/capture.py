"""The capture service: frames to a pcapng file, or a pipe. `netbridge capture`.

    netbridge capture --out frames.pcapng
    netbridge capture --out - | tshark -r -

It has the port to itself, as any service, and takes frames without answering them. To see both directions of another
service's frames, tell that one to capture (`--capture FILE` of echo and tap), or a client of your own
(`netbridge.services.pcapng.Capture`). The loop is C (nb_client_capture): one write for a burst.
"""

from __future__ import annotations

import argparse
import sys

from netbridge.client import Client
from netbridge.datapath._core import lib
from netbridge.errors import ExitCode, NetbridgeError, UsageError
from netbridge.services import arguments, service
from netbridge.services.arguments import MOST_SNAP_LENGTH
from netbridge.services.pcapng import Capture

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NO_LIMIT = (1 << 64) - 1


class CaptureService(service.Service):
    name = "netbridge-capture"

    def __init__(self, capture: Capture, count: int | None) -> None:
        self._capture = capture
        self._count = count

    def begin(self, client: Client) -> None:
        self._capture.begin(client)

    def work(self, client: Client, control_fd: int) -> bool:
        left = NO_LIMIT if self._count is None else self._count - self._capture.received
        result = lib.nb_client_capture(client.native, control_fd, left)
        service.check(result)
        self._capture.check()
        return bool(result == 0)

    def end(self) -> None:
        self._capture.end()

    def totals(self) -> dict[str, Any]:
        return {"frames": self._capture.received}


def main(options: argparse.Namespace) -> int:
    """Captures until told to stop; returns the exit code. What it has to say goes to stderr."""
    try:
        if options.snap_length > MOST_SNAP_LENGTH:
            raise UsageError(f"--snap-length {options.snap_length}: expected at most {MOST_SNAP_LENGTH} bytes")
        if options.out == "-" and sys.stdout.isatty():
            raise UsageError(
                "--out -: standard output is a terminal; pipe it somewhere: netbridge capture --out - | ..."
            )
        counters = options.counters or f"{options.socket}.counters"
        with Capture.open(options.out, snap_length=options.snap_length, counters=counters) as capture:
            return service.run(CaptureService(capture, options.count), options, seconds=options.seconds, out=sys.stderr)
    except NetbridgeError as error:
        print(f"{CaptureService.name}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog=CaptureService.name)
    arguments.capture(_parser)
    sys.exit(main(_parser.parse_args()) or ExitCode.OK)
