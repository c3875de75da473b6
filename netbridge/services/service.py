"""What the reference services have in common: connecting, and connecting again; signals; what they print.

A service's loop is C and runs without the GIL; Python connects, waits for the end and says what came of it: a line when
a session begins, a line with the totals when it ends. When a session ends for a reason that passes, such as a device
reset or a driver that died, it connects again (--wait says how long to try), unless it was told --once. SIGTERM, SIGINT
and the driver's own shutdown are an orderly end: exit code 0.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys

from netbridge.client import Client, PortClosed, PortError, Reason, connect
from netbridge.datapath._core import ffi
from netbridge.errors import NetbridgeError
from netbridge.ipc.offloads import NO_OFFLOADS, Offload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)


def check(result: int) -> None:
    """What a loop of the core came back with. Raises PortError: -1, the driver broke the protocol; -2, the system
    (errno) lets nobody wait for it."""
    if result == -1:
        raise PortError("the driver put an entry into a ring that no driver may; it is not to be trusted")
    if result == -2:
        raise PortError(f"cannot wait for the driver: {os.strerror(ffi.errno)}")


class Service:
    """One of them. `name` is what the driver calls it; the methods are for it to fill in."""

    name: str
    offloads: Offload = NO_OFFLOADS
    """Those that it can take."""

    def begin(self, client: Client) -> None:
        """A session has begun."""

    def work(self, client: Client, control_fd: int) -> bool:
        """Moves frames until `control_fd` is readable (True) or its work is done (False). Raises PortError."""
        raise NotImplementedError

    def end(self) -> None:
        """The session is over."""

    def totals(self) -> dict[str, Any]:
        """What to say when a session has ended."""
        return {}

    def watch(self, client: Client, poller: select.epoll) -> None:
        """Adds to what makes `work` return True."""

    def notice(self, client: Client) -> None:
        """`work` came back, and the client's facts are as they are now."""


def run(
    service: Service, options: argparse.Namespace, *, seconds: float | None = None, out: TextIO | None = None
) -> int:
    """Serves session after session until something ends it, at most `seconds`; returns the exit code. What it says goes
    to `out` (standard output). Main thread only."""
    say = _sayer(service.name, options.json, out)
    # Each ends in KeyboardInterrupt, in Python; the wake-up fd ends the C loop, which otherwise would sleep on.
    wakeup_in, wakeup_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(wakeup_out, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in _STOP_SIGNALS}
    try:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        _serve(service, options, wakeup_in, say)
    except KeyboardInterrupt:
        return 0
    except NetbridgeError as error:
        if isinstance(error, PortClosed) and error.reason is Reason.SHUTDOWN:
            return 0
        print(f"{service.name}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(wakeup_in)
        os.close(wakeup_out)
    return 0


def _serve(service: Service, options: argparse.Namespace, wakeup_fd: int, say: Callable[..., None]) -> None:
    """Serves session after session; returns when the service's work is done."""
    while True:
        with connect(options.socket, name=service.name, offloads=service.offloads, wait=options.wait) as client:
            service.begin(client)
            say(
                "connected",
                socket=options.socket,
                session=client.session,
                mac=client.mac.hex(":"),
                mtu=client.mtu,
                link="up" if client.link_up else "down",
            )
            end = "stopped by a signal"
            try:
                _work(service, client, wakeup_fd)
                end = "done"
                return
            except PortError as error:
                end = str(error)
                if options.once or not (isinstance(error, PortClosed) and error.reason.may_pass):
                    raise
            finally:
                service.end()
                say("closed", end=end, **service.totals())


def _work(service: Service, client: Client, wakeup_fd: int) -> None:
    with select.epoll() as poller:
        poller.register(client.control_fd, select.EPOLLIN)
        poller.register(wakeup_fd, select.EPOLLIN)
        service.watch(client, poller)
        while service.work(client, poller.fileno()):
            client.check()
            service.notice(client)


def _sayer(name: str, as_json: bool, out: TextIO | None) -> Callable[..., None]:
    def say_json(event: str, **facts: object) -> None:
        print(json.dumps({"event": event, **facts}), file=out, flush=True)

    def say_words(event: str, **facts: object) -> None:
        words = ", ".join(f"{key} {value}" for key, value in facts.items())
        print(f"{name}: {event}: {words}", file=out, flush=True)

    return say_json if as_json else say_words
