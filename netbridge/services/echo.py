"""The echo service: every frame goes back to its sender, the MAC addresses exchanged. Where the driver's manifest lets
it write to received frames, it forwards those of one buffer without a copy; among its totals they are `forwarded`.

    python -m netbridge.services.echo [--socket PATH] [--wait SECONDS] [--once] [--json] [--capture FILE]

The loop is C (nb_client_echo).
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from netbridge.client import Client
from netbridge.datapath._core import ffi, lib
from netbridge.errors import NetbridgeError
from netbridge.services import arguments, service
from netbridge.services.pcapng import Capture

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Echo(service.Service):
    name = "netbridge-echo"

    def __init__(self, capture: Capture | None = None) -> None:
        self._counts = ffi.new("struct nb_echo_counts *")
        self._capture = capture

    def begin(self, client: Client) -> None:
        if self._capture is not None:
            self._capture.begin(client)

    def work(self, client: Client, control_fd: int) -> bool:
        service.check(lib.nb_client_echo(client.native, control_fd, self._counts))
        return True

    def end(self) -> None:
        if self._capture is not None:
            self._capture.end()

    def totals(self) -> dict[str, Any]:
        totals: dict[str, Any] = {
            name: getattr(self._counts, name) for name in ("frames", "bytes", "bursts", "unsendable", "forwarded")
        }
        return totals if self._capture is None else {**totals, "capture": self._capture.state}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=Echo.name,
        description="Sends every frame back, with its MAC addresses exchanged; without a copy where the driver lets it "
        "write to received frames.",
    )
    arguments.common(parser)
    parser.add_argument("--capture", metavar="FILE", help="write the frames of both directions to a pcapng file")
    options = parser.parse_args(words)
    with ExitStack() as stack:
        try:
            capture = stack.enter_context(Capture.open(options.capture)) if options.capture else None
        except NetbridgeError as error:
            print(f"{Echo.name}: {error}", file=sys.stderr)
            return error.exit_code
        return service.run(Echo(capture), options)


if __name__ == "__main__":
    sys.exit(main())
