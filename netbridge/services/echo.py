"""The echo service: every frame goes back to its sender, the MAC addresses exchanged.

    python -m netbridge.services.echo [--socket PATH] [--wait SECONDS] [--once] [--json]

The loop is C (nb_client_echo); Python connects, waits for the end and says what came of it: a line when a session
begins, a line with the totals when it ends. When a session ends for a reason that passes, such as a device reset or a
driver that died, it connects again (--wait says how long to try), unless it was told --once. SIGTERM, SIGINT and the
driver's own shutdown are an orderly end: exit code 0.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from contextlib import ExitStack

from netbridge.client import Client, PortClosed, PortError, Reason, connect
from netbridge.datapath._core import ffi, lib
from netbridge.ipc.messages import DEFAULT_SOCKET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAME = "netbridge-echo"
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    say = _say_json if options.json else _say_words
    counts = ffi.new("struct nb_echo_counts *")
    # Both end in KeyboardInterrupt, in Python; the wake-up fd ends the C loop, which otherwise would sleep on.
    wakeup_in, wakeup_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup_out, warn_on_full_buffer=False)
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    try:
        _serve(options, wakeup_in, counts, say)
    except KeyboardInterrupt:
        return 0
    except PortError as error:
        if isinstance(error, PortClosed) and error.reason is Reason.SHUTDOWN:
            return 0
        print(f"{NAME}: {error}", file=sys.stderr)
        return error.exit_code
    raise AssertionError("serving has no other end")


def _serve(options: argparse.Namespace, wakeup_fd: int, counts: Any, say: Any) -> None:
    """Serves session after session; ends by PortError or KeyboardInterrupt only."""
    while True:
        with connect(options.socket, name=NAME, wait=options.wait) as client:
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
                _echo(client, wakeup_fd, counts)
            except PortError as error:
                end = str(error)
                if options.once or not (isinstance(error, PortClosed) and error.reason.may_pass):
                    raise
            finally:
                say("closed", end=end, **_totals(counts))


def _echo(client: Client, wakeup_fd: int, counts: Any) -> None:
    with ExitStack() as stack:
        poller = stack.enter_context(select.epoll())
        poller.register(client.control_fd, select.EPOLLIN)
        poller.register(wakeup_fd, select.EPOLLIN)
        while True:
            if lib.nb_client_echo(client.native, poller.fileno(), counts) < 0:
                raise PortError("the driver put an entry into a ring that no driver may; it is not to be trusted")
            client.check()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=NAME, description="Sends every frame back, with its MAC addresses exchanged.")
    parser.add_argument("--socket", default=DEFAULT_SOCKET, metavar="PATH", help="the driver's socket (%(default)s)")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="keep trying to connect that long (%(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="end with the session, whatever ended it")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead of words")
    return parser.parse_args(arguments)


def _totals(counts: Any) -> dict[str, int]:
    return {name: getattr(counts, name) for name in ("frames", "bytes", "bursts", "unsendable")}


def _say_json(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def _say_words(event: str, **facts: object) -> None:
    words = ", ".join(f"{name} {value}" for name, value in facts.items())
    print(f"{NAME}: {event}: {words}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
