"""The agent: greets, and serves what it is asked until it is ended."""

from __future__ import annotations

import os

from .channel import Channel, Loop
from .machine import DISKS, begin, find_port, mount_disk
from .protocol import PROTOCOL, Refused, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

HOST_POLL_SECONDS = 0.1


class Agent:
    """Hands each request to whoever answers it. Made once the host has been greeted."""

    def __init__(self, channel: Channel, loop: Loop):
        from .commands import Commands
        from .files import Files
        from .interpreter import Interpreter

        self._channel = channel
        self._loop = loop
        self._commands = commands = Commands(channel, loop)
        self._files = files = Files(channel)
        interpreter = Interpreter()
        self._operations: dict[str, Callable[[Request], dict[str, Any] | None]] = {
            "hello": self._hello,
            "begin": begin,
            "ping": lambda request: {"size": len(request.payload)},
            "ack": self._acknowledge,
            "eval": interpreter.evaluate,
            "call": interpreter.call,
            "run": commands.run,
            "stdin": commands.stdin,
            "kill": commands.kill,
            "resize": commands.resize,
            "get": files.get,
            "put": files.put,
            "data": files.data,
        }
        channel.on_frame = self._handle
        channel.on_room = commands.rearm

    def run(self) -> None:
        """Serve until the process is ended, or, on a socket, until the host has gone."""
        while True:
            self._loop.turn(HOST_POLL_SECONDS if self._channel.gone else -1)
            self._files.pump()
            if self._channel.gone and not self._channel.find_host():
                return

    def _hello(self, _: Request) -> dict[str, Any]:
        """Greet: asked for by the host of a guest that was restored, whose agent has greeted another before."""
        self._channel.greet()
        return {}

    def _acknowledge(self, request: Request) -> None:
        count = int(request.header["count"])
        self._commands.acknowledge(request.id, count)
        self._files.acknowledge(request.id, count)

    def _handle(self, header: dict[str, Any], payload: bytes) -> None:
        send = self._channel.send
        ident, op = header.get("id"), header.get("op")
        if type(ident) is not int or not isinstance(op, str):
            send({"id": 0, "event": "error", "message": "a request needs an integer id and a text op"})
            return
        try:
            operation = self._operations.get(op)
            if operation is None:
                raise Refused(f"unknown request {op!r}; this agent speaks protocol {PROTOCOL}")
            answer = operation(Request(ident, header, payload))
        except (Refused, OSError) as error:
            send({"id": ident, "event": "error", "message": str(error)})
        except Exception as error:  # whatever a request provokes, the next one must be served
            import traceback

            text = f"{type(error).__name__}: {error}"
            send({"id": ident, "event": "error", "message": text, "trace": traceback.format_exc()[-4000:]})
        else:
            if answer is not None:
                send({"id": ident, "event": "result", **answer})


def main(arguments: list[str]) -> int:
    """[PORT-NAME]; or --fd N, to serve an open socket instead (a box and tests do), or --mount the disks."""
    if arguments[:1] == ["--mount"]:
        for serial, target in DISKS:
            mount_disk(serial, target)
        return 0
    if arguments[:1] == ["--fd"]:
        fd = int(arguments[1])
    else:
        fd = os.open(find_port(*arguments[:1]), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    loop = Loop()
    channel = Channel(fd, loop)
    channel.greet()
    # Loaded now, while the host is busy with the greeting, not at the first request.
    agent = Agent(channel, loop)
    import ast  # noqa: F401
    import ctypes  # noqa: F401
    import fcntl  # noqa: F401
    import signal
    import subprocess  # noqa: F401

    # A shell that starts this in the background has it ignore what a terminal's keys send, and so would every command.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    agent.run()
    return 0
