"""Commands under way: their output goes to the host as far as it grants credit and the port has room.

Beyond that the command itself is blocked on its pipe, so a flood costs a fixed amount of memory here.
"""

from __future__ import annotations

import os
import select
import struct

from .halting import send_signal, stop_with_children
from .jobs import Job, set_size, start_job
from .protocol import CHUNK, Refused, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .channel import Channel, Loop


class Commands:
    """Those under way. rearm() is to be called when the port has room again."""

    def __init__(self, channel: Channel, loop: Loop):
        self._channel = channel
        self._loop = loop
        self._jobs: dict[int, Job] = {}

    def run(self, request: Request) -> None:
        if request.id in self._jobs:
            raise Refused(f"request {request.id} is already running")
        job = start_job(request)
        if job.halt_at:
            # With one processor, a command that prints the line is then stopped before its write returns.
            try:
                os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
            except PermissionError:
                pass  # no guest, but a test of this program
        self._jobs[job.id] = job
        self._loop.watch(job.pidfd, select.EPOLLIN, lambda _: self._on_exit(job))
        self._channel.send({"id": job.id, "event": "started", "pid": job.process.pid})
        self._arm(job)

    def stdin(self, request: Request) -> None:
        job = self._jobs.get(request.id)
        if job is None or job.stdin is None:
            return  # the command has ended or closed its input meanwhile: nobody's fault
        job.stdin_data += request.payload
        job.stdin_ends |= bool(request.header.get("eof"))
        self._feed_stdin(job)

    def kill(self, request: Request) -> None:
        """Signal a command's whole process group; a command that has ended already is left alone. What was halted
        elsewhere goes on afterwards, also to see that the command is gone."""
        job = self._jobs.get(request.id)
        if job is None or job.left is not None:
            return
        send_signal(os.killpg, job.process.pid, int(request.header.get("signal", 9)))
        for pid in job.halted:
            send_signal(os.kill, pid, 18)  # SIGCONT
        job.halted.clear()

    def resize(self, request: Request) -> None:
        job = self._jobs.get(request.id)
        if job is not None and job.terminal in job.streams:
            set_size(job.terminal, request.header["pty"])

    def acknowledge(self, ident: int, count: int) -> None:
        job = self._jobs.get(ident)
        if job is not None:
            job.credit += count
            self._arm(job)

    def _arm(self, job: Job) -> None:
        """Read from a command's pipes exactly while the host grants credit and the port is not behind."""
        if job.left is not None:
            self._drain_rest(job)
            return
        willing = job.credit > 0 and not self._channel.full
        for fd in list(job.streams):
            if willing:
                self._loop.watch(fd, select.EPOLLIN, lambda _, fd=fd: self._on_output(job, fd))  # type: ignore[misc]
            else:
                self._loop.unwatch(fd)

    def rearm(self) -> None:
        for job in list(self._jobs.values()):
            self._arm(job)

    def _on_output(self, job: Job, fd: int) -> None:
        self._forward(job, fd, CHUNK)
        if job.credit <= 0 or self._channel.full:
            self.rearm()

    def _forward(self, job: Job, fd: int, limit: int) -> int:
        """Send what one pipe holds, up to `limit` bytes; closes it at its end. Returns the bytes sent."""
        try:
            data = os.read(fd, max(1, min(limit, CHUNK, job.credit)))
        except BlockingIOError:
            return 0
        except OSError:  # EIO: the last holder of a terminal has closed it
            data = b""
        if not data:
            self._close_stream(job, fd)
            return 0
        if job.halt_at:
            self._look_for_halt(job, data)
        job.credit -= len(data)
        self._channel.send({"id": job.id, "event": "output", "stream": job.streams[fd]}, data)
        return len(data)

    def _look_for_halt(self, job: Job, data: bytes) -> None:
        """Stop the command, with all that it started, once it has printed what it is to be halted at."""
        text = job.tail + data
        if job.halt_at in text:
            job.halt_at = b""
            job.halted = stop_with_children(job.process.pid)
            self._channel.send({"id": job.id, "event": "halted"})
        else:
            job.tail = text[1 - len(job.halt_at) :] if len(job.halt_at) > 1 else b""

    def _close_stream(self, job: Job, fd: int) -> None:
        self._loop.unwatch(fd)
        job.streams.pop(fd, None)
        if fd == job.terminal:
            job.terminal = None
        os.close(fd)

    def _feed_stdin(self, job: Job) -> None:
        if job.stdin is None:
            return
        while job.stdin_data:
            try:
                written = os.write(job.stdin, job.stdin_data[:CHUNK])
            except BlockingIOError:
                self._loop.watch(job.stdin, select.EPOLLOUT, lambda _: self._feed_stdin(job))
                return
            except OSError:  # the command reads no more; what is left is acknowledged and dropped
                self._channel.send({"id": job.id, "event": "ack", "count": len(job.stdin_data)})
                job.stdin_data.clear()
                job.stdin_ends = True
                break
            del job.stdin_data[:written]
            self._channel.send({"id": job.id, "event": "ack", "count": written})
        self._loop.unwatch(job.stdin)
        if job.stdin_ends:
            if job.terminal is None:
                os.close(job.stdin)
                job.stdin = None
            else:
                os.write(job.stdin, b"\x04")
                job.stdin_ends = False

    def _on_exit(self, job: Job) -> None:
        """The process has ended. What its pipes hold is still sent; a child it left behind is not waited for."""
        import fcntl
        import termios

        self._loop.unwatch(job.pidfd)
        os.close(job.pidfd)
        job.process.wait()
        if job.stdin is not None:
            self._loop.unwatch(job.stdin)
            os.close(job.stdin)
            job.stdin = None
        job.left = {}
        for fd in job.streams:
            self._loop.unwatch(fd)
            # A terminal holds more in its line discipline than FIONREAD tells; it is read until it is empty.
            if fd == job.terminal:
                job.left[fd] = 1 << 20
            else:
                job.left[fd] = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
        self._drain_rest(job)

    def _drain_rest(self, job: Job) -> None:
        assert job.left is not None
        for fd in list(job.streams):
            while job.left[fd] > 0 and fd in job.streams:
                if job.credit <= 0 or self._channel.full:
                    return
                sent = self._forward(job, fd, job.left[fd])
                job.left[fd] = job.left[fd] - sent if sent else 0
            if fd in job.streams:
                self._close_stream(job, fd)
        if self._jobs.pop(job.id, None) is not None:
            code = job.process.returncode
            self._channel.send({"id": job.id, "event": "exit", "code": code})
