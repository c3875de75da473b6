"""One driver process, as the monitor sees it: started, told what to do, heard, killed, buried.

It is started without the files it works with, and gets them when there is a device for it. So a process can stand by,
with all its modules imported and in its sandbox, until the one before it has died.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time

import _cffi_backend

import netbridge
import vfio
from netbridge.errors import ExitCode, UsageError
from netbridge.vnode import handover
from netbridge.vnode.cgroup import Slot
from netbridge.vnode.manifest import Manifest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST_FILES = 256


class DriverProcess:
    """A driver process. `close` is the end of it, whatever it is doing.

    `slot`: its place in the cgroup, if there is one. `ready`: it has imported what it needs and is in its sandbox.
    `up`: it serves the port. `prepared`: it was told about its sandbox. `last_word`: of it. `status`: as
    waitpid has it, once it has ended. `violation`: the system call that it was killed for."""

    def __init__(self, manifest: Manifest, slot: Slot | None, locked: int) -> None:
        """Starts it. `locked`: bytes of memory that it may lock. Owns `slot`. Raises OSError."""
        self.slot = slot
        self.prepared = self.ready = self.up = False
        self.heard = True  # there may be more to hear
        self.last_word: tuple[str, str] | None = None
        self.listener = -1  # of seccomp
        self.violation: str | None = None
        self.file_calls = 0
        self.status: int | None = None
        self.began = time.monotonic()
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = _spawn(manifest, slot, locked, theirs)
        self.pidfd = os.pidfd_open(self.pid)

    def tell(self, what: Any, fds: tuple[int, ...] = ()) -> None:
        """Sends it what it waits for. That it has died is seen elsewhere."""
        try:
            handover.tell(self.channel, what, fds)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def stop(self) -> None:
        """Asks it to end."""
        try:
            self.channel.send(handover.STOP)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def reap(self) -> None:
        """Waits until it has ended."""
        if self.status is None:
            _, self.status = os.waitpid(self.pid, 0)

    @property
    def wanted_more_memory(self) -> bool:
        """Whether the kernel killed it for that."""
        return self.slot is not None and self.slot.out_of_memory_kills > 0

    def close(self) -> None:
        """Kills it, if it lives, and gives back what is held for it."""
        if self.status is None:
            self.kill()
            self.reap()
        self.channel.close()
        os.close(self.pidfd)
        if self.listener >= 0:
            os.close(self.listener)
        if self.slot is not None:
            self.slot.close()


def _spawn(manifest: Manifest, slot: Slot | None, locked: int, theirs: socket.socket) -> int:
    command = driver_command(manifest)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        _become_driver(command, slot, locked, theirs, may_log=manifest.capabilities.log)
    except BaseException as error:
        handover.say(theirs, handover.FAILED, f"{ExitCode.FAILURE}\nthe driver process cannot be started: {error}")
    finally:
        os._exit(ExitCode.FAILURE)


def _become_driver(command: list[str], slot: Slot | None, locked: int, theirs: socket.socket, *, may_log: bool) -> None:
    """In the child: nothing of the monitor's stays but its end of the channel and, if it may log, stderr."""
    signal.set_wakeup_fd(-1)
    # It is the monitor that is told to stop, also from a terminal.
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if slot is not None:
        slot.join()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    channel = os.dup(theirs.fileno())
    os.dup2(null, 0)
    os.dup2(null, 1)
    if not may_log:
        os.dup2(null, 2)
    os.dup2(channel, handover.CHANNEL_FD)
    for fd in range(handover.CHANNEL_FD + 1):
        os.set_inheritable(fd, True)
    os.closerange(handover.CHANNEL_FD + 1, 1 << 16)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (locked, locked))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, MOST_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir("/")
    os.execve(sys.executable, command, {})


def driver_command(manifest: Manifest) -> list[str]:
    """The driver process's command: this Python, without site-packages, environment or current directory, which
    saves memory and leaves nobody a say in what it imports. Raises UsageError for an entry point that there is not, or
    that somebody else could change."""
    program = manifest.entrypoint_path
    if os.path.exists(program):
        _refuse_others_program(program)
    else:
        # A manifest of one's own for the V-Node that comes with the package need not bring its program along.
        program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "net-bridge", manifest.entrypoint)
    if not os.path.isfile(program):
        raise UsageError(
            f"{manifest.path}: runtime.entrypoint: there is no {manifest.entrypoint_path}; "
            'expected a program there, or "bin/net-bridge.vnode", which comes with the package'
        )
    where = (netbridge.__file__, vfio.__file__)
    paths = [os.path.dirname(os.path.dirname(os.path.abspath(str(file)))) for file in where]
    paths.append(os.path.dirname(os.path.abspath(_cffi_backend.__file__)))
    cache = ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
    return [sys.executable, "-I", "-S", *cache, os.path.abspath(program), *dict.fromkeys(paths)]


def _refuse_others_program(program: str) -> None:
    """It is started as root: nobody else may have a hand in it."""
    for path in (program, os.path.dirname(os.path.abspath(program))):
        status = os.stat(path)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise UsageError(
                f"runtime.entrypoint: {path} belongs to uid {status.st_uid} and has mode "
                f"{status.st_mode & 0o7777:o}; expected that nobody but root can change it"
            )
