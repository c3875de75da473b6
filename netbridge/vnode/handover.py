"""What the monitor and the driver process say to each other, over one SOCK_SEQPACKET pair.

The monitor sends the plan of the sandbox, then, as soon as there is a device, the start with the files the driver works
with, and later `STOP`. The driver answers in plain words, which is all that a monitor wants to hear from a process that
may have been taken over:

    confined    with the seccomp listener's file: it is in its sandbox, and waits for the start (mode strict)
    ready       it waits for the start (mode permissive)
    up          it has the device, and serves the port
    stopped W   it ended well, for the reason W (a name of `bridge.Stop`)
    failed C    it ends with this exit code, for the reason on the lines that follow

Either end sees the other's death as the end of the stream: the driver then quiesces the device and ends.
"""

from __future__ import annotations

import array
import marshal
import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

CHANNEL_FD = 3  # where the driver process finds its end
STOP = b"stop"
CONFINED, READY, UP, STOPPED, FAILED = "confined", "ready", "up", "stopped", "failed"
_LONGEST_TOLD = 1 << 16
_LONGEST_WORD = 1 << 14
_MOST_FDS = 8


def tell(channel: socket.socket, what: Any, fds: Sequence[int] = ()) -> None:
    """Monitor to driver. `what` is plain data; it travels as marshal, which costs the driver no module, and comes from
    its own parent and the same interpreter."""
    if fds:
        socket.send_fds(channel, [marshal.dumps(what)], fds)
    else:
        channel.send(marshal.dumps(what))


def await_told(channel: socket.socket) -> tuple[Any, list[int]] | None:
    """In the driver: waits for it. The caller owns the fds. None when the monitor is gone."""
    data, fds = _receive(channel, _LONGEST_TOLD, 0)
    return (marshal.loads(data), fds) if data else None


def say(channel: socket.socket, word: str, detail: str = "", fds: Sequence[int] = ()) -> None:
    """Driver to monitor. Nothing happens when the monitor is gone: there is nobody left to tell."""
    data = f"{word} {detail}".strip().encode()[:_LONGEST_WORD]
    try:
        if fds:
            socket.send_fds(channel, [data], fds)
        else:
            channel.send(data)
    except (BrokenPipeError, ConnectionResetError):
        pass


def hear(channel: socket.socket) -> tuple[str, str, list[int]] | None:
    """In the monitor: the next word, its detail, and files that came with it, the caller's to close. None when the
    driver is gone, or says what no driver says. Raises BlockingIOError when nothing waits."""
    try:
        data, fds = _receive(channel, _LONGEST_WORD, socket.MSG_DONTWAIT)
    except ConnectionResetError:
        return None
    word, _, detail = data.decode("utf-8", "replace").partition(" ")
    wanted = 1 if word == CONFINED else 0
    if word not in (CONFINED, READY, UP, STOPPED, FAILED) or len(fds) != wanted:
        for fd in fds:
            os.close(fd)
        return None
    return word, detail, fds


def _receive(channel: socket.socket, most: int, flags: int) -> tuple[bytes, list[int]]:
    """One packet and the files that came with it. (`socket.recv_fds` forgets about its flags.)"""
    fds = array.array("i")
    room = socket.CMSG_LEN(_MOST_FDS * fds.itemsize)
    data, ancillary, _, _ = channel.recvmsg(most, room, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)
