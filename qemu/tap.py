"""A NIC's other end as a network interface of the host's kernel, in a network namespace of its own.

For what a Wire cannot do: several queue pairs, offloads (the kernel takes and gives a virtio header with each frame),
and the whole of Linux as the peer. It takes root, or at least CAP_NET_ADMIN; no other interface is seen or touched, and
the namespace goes with its last user.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

from pyroute2 import IPRoute

from qemu.capabilities import lacks_root
from qemu.errors import HarnessError, ToolMissing
from qemu.packets import ETH_P_ALL
from qemu.sniffer import Sniffer

CLONE_NEWNET = 0x40000000  # linux/sched.h
TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP, IFF_NO_PI, IFF_MULTI_QUEUE, IFF_VNET_HDR = 0x0002, 0x1000, 0x0100, 0x4000
MOST_QUEUES = 8

Result = TypeVar("Result")


class Tap:
    """An interface with `queues` queue pairs and an address such as "10.9.8.2/24", or none; up from the start.

    Give the NIC properties={"mq": "on", "vectors": 2 * queues + 2} for more than one pair. `beside` another, it is in
    that one's namespace, under another name. `captured` is false where a capture would be in the way of a measurement:
    see capture(). Raises HarnessError with the reason when this user may not make interfaces.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        queues: int = 1,
        offloads: bool = True,
        name: str = "tap0",
        mtu: int = 1500,
        beside: Tap | None = None,
        captured: bool = True,
    ):
        if not 1 <= queues <= MOST_QUEUES:
            raise ValueError(f"a tap has 1 to {MOST_QUEUES} queue pairs, not {queues}")
        if reason := lacks_root():
            raise HarnessError(f"an interface of the host {reason}")
        self.name = name
        self.queues = queues
        self.mtu = mtu
        self.offloads = offloads
        self.shape = f"{queues} queue pairs, offloads {'on' if offloads else 'off'}"
        """What a NIC sees of this peer: a guest that is restored must find the same."""
        self.closed = False
        self._captured = captured
        self._sniffer: Sniffer | None = None
        self._fds: list[int] = []
        self._namespace = -1
        try:
            # A thread of its own, because a namespace is entered by a thread; it ends, and the namespace stays.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(self._make, address, beside).result()
        except BaseException:
            self.close()
            raise

    def _make(self, address: str | None, beside: Tap | None) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(beside._namespace, CLONE_NEWNET) if beside is not None else libc.unshare(CLONE_NEWNET):
            raise HarnessError(f"no network namespace for {self.name}: {os.strerror(ctypes.get_errno())}")
        self._namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if self.offloads else 0)
        flags |= IFF_MULTI_QUEUE if self.queues > 1 else 0
        for _ in range(self.queues):
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            self._fds.append(fd)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", self.name.encode(), flags))
        with IPRoute() as routes:
            if address is None:
                # Nobody speaks IP on it, so the kernel is not to announce itself there: those frames would wait for the
                # guest's driver, and be counted.
                with contextlib.suppress(FileNotFoundError):
                    Path(f"/proc/sys/net/ipv6/conf/{self.name}/disable_ipv6").write_text("1")
            for name in ("lo", self.name):
                (index,) = routes.link_lookup(ifname=name)
                routes.link("set", index=index, state="up", **({"mtu": self.mtu} if name == self.name else {}))
            if address is not None:
                host, _, length = address.partition("/")
                routes.addr("add", index=index, address=host, prefixlen=int(length or 24))
        # Every frame that passes the interface, in both directions, for whoever wants to look.
        self.packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.packets.bind((self.name, ETH_P_ALL))

    # What the command line of QEMU is made of

    def netdev(self, ident: str) -> str:
        fds = ":".join(map(str, self._fds))
        word = f"fds={fds}" if self.queues > 1 else f"fd={fds}"
        return f"tap,id={ident},{word}"  # whether frames have a header QEMU asks the interface

    def fds(self) -> Sequence[int]:
        return tuple(self._fds)

    def attached(self) -> None:
        """QEMU has inherited the queues: our copies are closed, so that the interface goes with QEMU."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    # What one does with it

    def capture(self, path: Path) -> None:
        """Keep every frame from now on, both ways, as pcapng, until close(); of long ones the beginning. Booting the
        guest that has the other end does so."""
        if self._captured and self._sniffer is None:
            self._sniffer = self.inside(lambda: Sniffer(path, self.name))

    def captured(self) -> tuple[int, int] | None:
        """Frames to the guest and from it as they are in the capture's file; None when none is kept."""
        return None if self._sniffer is None else self._sniffer.captured()

    def run(self, argv: Sequence[str], timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a command of the host in the interface's namespace. Raises CalledProcessError, TimeoutExpired."""
        if shutil.which("nsenter") is None:
            raise ToolMissing("nsenter is not installed: apt-get install util-linux")
        enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._namespace}"]
        return subprocess.run([*enter, *argv], check=True, capture_output=True, text=True, timeout=timeout)

    def inside(self, do: Callable[[], Result]) -> Result:
        """What `do` returns, called by a thread in the interface's namespace, where sockets and interfaces it opens
        belong. Raises what it raises."""

        def enter() -> Result:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(self._namespace, CLONE_NEWNET):
                raise HarnessError(f"cannot enter {self.name}'s namespace: {os.strerror(ctypes.get_errno())}")
            return do()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(enter).result()

    def join(self, other: Tap) -> None:
        """Makes a bridge of the two, which are in one namespace: what one NIC sends, the other receives, also frames
        that were never cut. The host's kernel says nothing on it by itself."""

        def make() -> None:
            with IPRoute() as routes:
                routes.link("add", ifname="bridge", kind="bridge")
                (bridge,) = routes.link_lookup(ifname="bridge")
                for tap in (self, other):
                    (index,) = routes.link_lookup(ifname=tap.name)
                    routes.link("set", index=index, master=bridge)
                routes.link("set", index=bridge, state="up")

        self.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6"])
        self.inside(make)

    def dropped(self) -> int:
        """Frames that its NIC did not take in time, or that did not come through to the host."""
        words = self.run(["cat", "/proc/net/dev"]).stdout.split(f"{self.name}:")[1].split()
        return int(words[3]) + int(words[11])

    def close(self) -> None:
        """Nothing of it is left once QEMU has ended, too. May be called again."""
        self.closed = True
        if self._sniffer is not None:
            self._sniffer.close()
            self._sniffer = None
        self.attached()
        if hasattr(self, "packets"):
            self.packets.close()
        if self._namespace >= 0:
            with contextlib.suppress(OSError):
                os.close(self._namespace)
            self._namespace = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
