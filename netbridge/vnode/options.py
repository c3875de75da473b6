"""What the command line adds to a manifest, and what comes of a run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import vfio
from netbridge.bridge import Stop
from netbridge.errors import NetbridgeError
from netbridge.session import Settings
from vfio._record import NamedTuple


class Options:
    """What the command line adds to the manifest. `driver_user`: a name or uid for the driver process; None: the user
    `netbridge` if there is one, else a uid that no user has."""

    def __init__(
        self,
        *,
        pci: vfio.PciAddress | None,
        socket_path: str,
        counters_path: str,
        service_uids: Collection[int],
        driver_user: str | None,
        without_features: Collection[str],
        interface: str,
        settings: Settings,
    ) -> None:
        self.pci = pci
        self.socket_path = socket_path
        self.counters_path = counters_path
        self.service_uids = service_uids
        self.driver_user = driver_user
        self.without_features = without_features
        self.interface = interface
        self.settings = settings


class Outcome(NamedTuple):
    """How it ended: why, the number of the signal that asked for it (0 for none), how often the driver was restarted,
    and the final counters."""

    why: Stop
    signal: int
    restarts: int
    counters: dict[str, Any]


class DriverFailed(NetbridgeError):
    """The driver process ended with an error, whose message and exit code this is."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
