"""Taking the port over: HELLO, the driver's offer, READY; and trying again while there is nobody to take it from."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

from netbridge.client.session import Client
from netbridge.ipc.control import ControlSocket
from netbridge.ipc.errors import BadGeometry, PortClosed, PortError, PortUnavailable, Reason
from netbridge.ipc.messages import DEFAULT_SOCKET, Bye, Hello, Ready
from netbridge.ipc.offloads import NO_OFFLOADS, Offload

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.01, 0.25


def connect(
    path: str | os.PathLike[str] = DEFAULT_SOCKET,
    *,
    name: str = "client",
    offloads: Offload = NO_OFFLOADS,
    timeout: float = 5.0,
    wait: float = 0.0,
) -> Client:
    """Connects to the driver that listens at `path` and takes the port over.

    `name`: what the driver's log and counters call this client; 1 to 32 letters, digits, '.', '_' or '-'. `offloads`:
    those this client can take; the session has as many of them as the device does. `timeout`: seconds for the
    handshake. `wait`: seconds to keep trying while no driver listens, or while it is busy.

    Raises PortUnavailable when nobody listens, PortClosed with the driver's reason when it says no, BadGeometry when
    what it offers does not hold together, PortError for everything else.
    """
    give_up = time.monotonic() + wait
    pause = _FIRST_RETRY_SECONDS
    while True:
        try:
            return _connect_once(os.fspath(path), Hello(name, offloads=offloads), timeout)
        except PortError as error:
            may_pass = isinstance(error, PortUnavailable) or (isinstance(error, PortClosed) and error.reason.may_pass)
            left = give_up - time.monotonic()
            if not may_pass or left <= 0:
                raise
        # There is nothing to wait for: no file descriptor becomes readable when somebody starts to listen at a path.
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, _LAST_RETRY_SECONDS)


def _connect_once(path: str, hello: Hello, timeout: float) -> Client:
    deadline = time.monotonic() + timeout
    packed = hello.pack()
    with ExitStack() as stack:
        control = ControlSocket(path, timeout)
        stack.callback(control.close)
        control.send(packed)
        welcome, fds = control.await_welcome(deadline)
        with ExitStack() as received:
            for fd in fds:
                received.callback(os.close, fd)
            try:
                if welcome.offloads & ~hello.offloads:
                    raise BadGeometry(
                        f"offloads {welcome.offloads:#x}, of which only {hello.offloads:#x} were asked for"
                    )
                client = Client(control, welcome, fds)
            except BadGeometry as error:
                control.send(Bye(Reason.GEOMETRY, str(error)).pack())
                raise BadGeometry(f"the driver's offer does not hold together: {error}") from None
            except PortError as error:
                control.send(Bye(Reason.FAILED, str(error)).pack())
                raise
            received.pop_all()
        stack.pop_all()
    try:
        control.send(Ready().pack())
        client.check()
    except BaseException:
        client.close()
        raise
    return client
