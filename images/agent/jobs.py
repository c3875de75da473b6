"""A command as a process with its pipes or its terminal: how one is started."""

from __future__ import annotations

import os
import struct

from .protocol import WINDOW, Refused, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any


class Job:
    """A command under way: its process, its pipes, and how much output the host will still take."""

    def __init__(self, ident: int, process: subprocess.Popen[bytes], streams: dict[int, str], stdin: int | None):
        self.id = ident
        self.process = process
        self.pidfd = os.pidfd_open(process.pid)
        self.streams = streams
        self.credit = WINDOW
        self.stdin = stdin
        self.stdin_data = bytearray()
        self.stdin_ends = False
        self.terminal: int | None = None
        self.halt_at = b""
        self.halted: list[int] = []  # what stands still, since it has printed that: itself and all that it started
        self.tail = b""
        self.left: dict[int, int] | None = None  # after the exit: bytes still to be read, per pipe


def start_job(request: Request) -> Job:
    """Start the command that a request is for. Raises Refused, or OSError where it cannot be run."""
    import subprocess

    argv = request.header.get("argv")
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
        raise Refused("argv has to be a list of at least one text")
    environment = dict(os.environ)
    options: dict[str, Any] = {"start_new_session": True, "bufsize": 0}
    user = request.header.get("user")
    if user is not None:
        environment.update(_become(user, options))
    environment.update(request.header.get("env") or {})
    cwd = request.header.get("cwd")
    if cwd is not None and not os.path.isdir(cwd):
        raise Refused(f"working directory {cwd!r} is not a directory of the guest")

    pipes: list[int] = []
    terminal = None
    try:
        if request.header.get("pty"):
            terminal, slave = os.openpty()
            pipes.append(slave)
            set_size(terminal, request.header["pty"])
            options |= {"stdin": slave, "stdout": slave, "stderr": slave, "preexec_fn": _take_terminal}
        else:
            options |= {
                "stdin": subprocess.PIPE if request.header.get("stdin") else subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.STDOUT if request.header.get("merge") else subprocess.PIPE,
            }
        process = subprocess.Popen(argv, env=environment, cwd=cwd, **options)
    except FileNotFoundError as error:
        _close(terminal)
        where = environment.get("PATH", "")
        raise Refused(f"no such command in the guest: {argv[0]!r} (PATH={where})") from error
    except BaseException:
        _close(terminal)
        raise
    finally:
        for fd in pipes:
            os.close(fd)

    # The Popen object would close these behind our back; from here on they are plain descriptors.
    streams: dict[int, str] = {}
    stdin = None
    if terminal is not None:
        streams[terminal] = "stdout"
        stdin = os.dup(terminal)
    else:
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            if pipe is not None:
                streams[os.dup(pipe.fileno())] = name
                pipe.close()
        if process.stdin is not None:
            stdin = os.dup(process.stdin.fileno())
            process.stdin.close()
    for fd in (*streams, *(() if stdin is None else (stdin,))):
        os.set_blocking(fd, False)
    job = Job(request.id, process, streams, stdin)
    job.terminal = terminal
    job.halt_at = str(request.header.get("halt_at") or "").encode()
    return job


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _become(user: str | int, options: dict[str, Any]) -> dict[str, str]:
    """Ask Popen for another user; returns the variables that go with it. Refused when there is no such user."""
    import pwd

    try:
        entry = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
    except KeyError:
        if not isinstance(user, int):
            raise Refused(f"no such user in the guest: {user!r}") from None
        options |= {"user": user, "group": user, "extra_groups": []}
        return {"HOME": "/"}
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    options |= {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}
    return {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}


def set_size(terminal: int, size: list[int]) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", int(size[0]), int(size[1]), 0, 0))


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
