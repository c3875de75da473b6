"""The machine that the agent finds itself in: its port, its clock, its randomness and its disks."""

from __future__ import annotations

import os
import struct
import time

from .protocol import Refused, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PORT_NAME = "agent.0"
PORTS = "/sys/class/virtio-ports"

DISKS = (("code", "/code"),)
"""Serials of the disks that are mounted, read-only, when the host says that it begins; and where to."""

RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h
MS_RDONLY = 1  # linux/mount.h


def find_port(name: str = PORT_NAME, ports: str = PORTS) -> str:
    """Path of the virtio-serial port of that name. Raises FileNotFoundError naming the ports there are."""
    there = []
    for entry in sorted(os.listdir(ports)) if os.path.isdir(ports) else []:
        with open(f"{ports}/{entry}/name", encoding="utf-8") as file:
            there.append(file.read().strip())
        if there[-1] == name:
            return f"/dev/{entry}"
    raise FileNotFoundError(f"no virtio-serial port named {name!r} under {ports}; there are: {there or 'none'}")


def begin(request: Request) -> dict[str, Any]:
    """Take up work: the clock as the host has it, randomness of its own from the payload, the disks mounted.

    A guest that was restored from a snapshot would otherwise have the time and the random numbers of all others.
    """
    import fcntl

    time.clock_settime_ns(time.CLOCK_REALTIME, int(request.header["time_ns"]))
    seed = request.payload
    with open("/dev/urandom", "rb") as random:
        fcntl.ioctl(random, RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(random, RNDRESEEDCRNG)
    mounted = [target for serial, target in DISKS if mount_disk(serial, target)]
    return {"mounted": mounted}


def mount_disk(serial: str, target: str) -> bool:
    """Mount the disk of that serial, read-only; whether there is one. Nothing happens when it is mounted already."""
    import ctypes

    for name in os.listdir("/sys/block"):
        try:
            with open(f"/sys/block/{name}/serial", encoding="ascii") as file:
                found = file.read().strip()
        except OSError:
            continue
        if found != serial:
            continue
        if os.path.ismount(target):
            return True
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(f"/dev/{name}".encode(), target.encode(), b"ext4", ctypes.c_ulong(MS_RDONLY), None):
            code = ctypes.get_errno()
            raise Refused(f"the disk {serial!r} (/dev/{name}) cannot be mounted on {target}: {os.strerror(code)}")
        return True
    return False
