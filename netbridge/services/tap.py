"""The tap service: the Linux stack behind the port, through a TAP device. `netbridge tap`.

    netbridge tap --name nb0 --address 192.0.2.2/24 --address 2001:db8::2/64

Programs use the interface as any other. MAC address, MTU and link are the device's, and follow it; while no driver is
there the interface has no carrier. What the session has of offloads the interface has: so TCP is cut into segments, and
checksums are made, by the device or whoever is behind it. The loop is C (nb_client_tap). Started as root, it is another
user (--user) with CAP_NET_ADMIN and no other right before it connects.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress

from netbridge.client import Client
from netbridge.datapath._core import ffi, lib
from netbridge.errors import NetbridgeError
from netbridge.ipc.offloads import NO_OFFLOADS, Offload
from netbridge.services import arguments, rights, service
from netbridge.services.pcapng import Capture
from netbridge.services.tapdevice import TapDevice, TapFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ETHERNET, _VLAN_TAG = 14, 4
_COUNTS = ("frames_in", "bytes_in", "frames_out", "bytes_out", "refused", "too_long", "bad_headers")


class Tap(service.Service):
    name = "netbridge-tap"

    def __init__(self, device: TapDevice, capture: Capture | None = None, *, offloads: Offload = NO_OFFLOADS) -> None:
        self.offloads = offloads
        self._device = device
        self._capture = capture
        self._native = ffi.new("struct nb_tap *", {"fd": device.fd})

    def begin(self, client: Client) -> None:
        self._native.pieces = 0
        if self._capture is not None:
            self._capture.begin(client)
        self._device.begin(client.offloads, client.largest)
        self.notice(client)

    def notice(self, client: Client) -> None:
        # A tagged frame has to fit, too.
        longest = client.largest - _ETHERNET - _VLAN_TAG
        self._device.follow(client.mac, min(client.mtu, longest), client.link_up)

    def work(self, client: Client, control_fd: int) -> bool:
        result = lib.nb_client_tap(client.native, self._native, control_fd)
        if result == -2:
            raise TapFailed(f"{self._device.name}: {os.strerror(self._native.error)}; was the interface removed?")
        service.check(result)
        return True

    def end(self) -> None:
        with suppress(TapFailed):  # which ends the session, and is told already
            self._device.set_carrier(False)
        if self._capture is not None:
            self._capture.end()

    def totals(self) -> dict[str, Any]:
        totals: dict[str, Any] = {name: getattr(self._native, name) for name in _COUNTS}
        return totals if self._capture is None else {**totals, "capture": self._capture.state}


def main(options: argparse.Namespace) -> int:
    """Serves until told to stop; returns the exit code."""
    capture = None
    try:
        user = rights.find_user(options.user) if os.geteuid() == 0 else None
        if options.capture:
            capture = Capture.open(options.capture)
        with TapDevice(options.name) as device:
            device.configure(options.address)
            if user is not None:
                rights.become(user, rights.CAP_NET_ADMIN)
            offloads = NO_OFFLOADS if options.no_offloads else device.offloads
            return service.run(Tap(device, capture, offloads=offloads), options)
    except NetbridgeError as error:
        print(f"{Tap.name}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if capture is not None:
            capture.close()


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog=Tap.name)
    arguments.tap(_parser)
    sys.exit(main(_parser.parse_args()))
