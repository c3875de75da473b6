#!/usr/bin/env python3
"""A V-Node's program in place of net-bridge.vnode, which tells on stderr of each step by which the device comes into
service, before it is made; the harness halts it at one. Its arguments are where the driver's modules are."""

from __future__ import annotations

import itertools
import os
import sys

sys.path[:0] = sys.argv[1:]

from netbridge import driver  # noqa: E402
from netbridge.virtio.pci import VirtioPci  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STEPS = (
    "reset",
    "write_status",
    "write_driver_features",
    "enable_vectors",
    "set_config_vector",
    "set_up_queue",
    "enable_queue",
    "allow_dma",
    "notify",
)


numbers = itertools.count(1)


def telling(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def told(self: VirtioPci, *arguments: Any, **options: Any) -> Any:
        words = " ".join(str(argument) for argument in arguments if isinstance(argument, int))
        os.write(2, f"step {next(numbers)} {name} {words}\n".encode())
        return call(self, *arguments, **options)

    return told


for step in STEPS:
    setattr(VirtioPci, step, telling(step, getattr(VirtioPci, step)))

driver.main()
