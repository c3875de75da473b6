#!/usr/bin/env python3
"""The guest's end of the harness: runs commands, moves files and answers probes over one virtio-serial port.

One thread, one epoll loop, the standard library only. What it is asked and what it answers are frames: a fixed
head (magic, length of the header, length of the payload), a JSON header and a binary payload. Every request has
an id that its answers repeat, so many run at once. Output of commands is sent only as far as the host has
granted credit and the port has room; beyond that the command itself is blocked on its pipe, so a flood costs a
fixed amount of memory here.

Bytes that are not a frame are skipped until the next magic. Modules that only commands need are imported after
the greeting: under emulation an import costs milliseconds, and the greeting is what the host waits for.

The host's end imports the framing from this file, so there is one description of it.
"""

# os.path instead of pathlib: that costs more to import than everything else here together.
# ruff: noqa: PTH103, PTH104, PTH108, PTH110, PTH112, PTH113, PTH120, PTH123, PTH208

from __future__ import annotations

import errno
import os
import select
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from typing import Any

PROTOCOL = 2
MAGIC = b"\xf7GA1"
HEAD = struct.Struct("<4sII")
MAX_HEADER = 1 << 20
MAX_PAYLOAD = 1 << 20
CHUNK = 1 << 15
"""Bytes of output, input or file per frame: what the kernel's virtio-serial driver takes in one write."""
WINDOW = 8 * CHUNK
"""Bytes that either side may have under way in one direction of one request before the other has acknowledged."""
BACKLOG = 8 * CHUNK
"""Bytes waiting for room in the port above which no more output is read from any command."""

PORT_NAME = "agent.0"
PORTS = "/sys/class/virtio-ports"


DISKS = (("code", "/code"),)
"""Serials of the disks that are mounted, read-only, when the host says that it begins; and where to."""

RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h
MS_RDONLY = 1  # linux/mount.h


class _Plain:
    """How JSON is read: what the scanner of the standard library wants to be told."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float


def _json_functions() -> tuple[Callable[[object], str], Callable[[str], object]]:
    # The core of the package json without the package: that imports regular expressions, a fifth of a second under
    # emulation, of which reading and writing compact JSON needs none.
    try:
        from _json import encode_basestring_ascii, make_encoder, make_scanner
    except ImportError:
        import json

        return lambda value: json.dumps(value, separators=(",", ":")), json.loads

    def refuse(value: object) -> None:
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")

    scan = make_scanner(_Plain)  # type: ignore[arg-type]

    def dumps(value: object) -> str:
        return "".join(make_encoder({}, refuse, encode_basestring_ascii, None, ":", ",", False, False, True)(value, 0))

    def loads(text: str) -> object:
        try:
            value, end = scan(text, 0)
        except StopIteration as error:
            raise ValueError(f"not JSON from character {error.value} on") from None
        if end != len(text):
            raise ValueError(f"something follows the JSON, from character {end} on")
        return value

    return dumps, loads


dumps, loads = _json_functions()


def encode(header: dict[str, Any], payload: bytes | memoryview = b"") -> bytes:
    """One frame. Raises ValueError when header or payload is longer than the other end would accept."""
    text = dumps(header).encode()
    if len(text) > MAX_HEADER or len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame takes at most {MAX_HEADER} bytes of header and {MAX_PAYLOAD} of payload")
    return b"".join((HEAD.pack(MAGIC, len(text), len(payload)), text, payload))


class Decoder:
    """Cuts a byte stream into frames; skips, and counts in `garbage`, whatever is not one."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._begun: tuple[dict[str, Any], int, int] | None = None  # a header, where its payload starts and ends
        self.garbage = 0

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        self._buffer += data
        while (frame := self._next()) is not None:
            yield frame

    def _skip(self, count: int) -> None:
        self.garbage += count
        del self._buffer[:count]

    def _next(self) -> tuple[dict[str, Any], bytes] | None:
        # The header is looked at before the payload is there, so that a false magic cannot hold up a true frame
        # behind it for longer than one header; and it is looked at once, however many pieces the payload comes in.
        if self._begun is None:
            self._begun = self._header()
        if self._begun is None:
            return None
        header, start, end = self._begun
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[start:end])
        del self._buffer[:end]
        self._begun = None
        return header, payload

    def _header(self) -> tuple[dict[str, Any], int, int] | None:
        buffer = self._buffer
        while True:
            start = buffer.find(MAGIC)
            if start < 0:
                begun = next((n for n in range(len(MAGIC) - 1, 0, -1) if buffer.endswith(MAGIC[:n])), 0)
                self._skip(len(buffer) - begun)
                return None
            if start:
                self._skip(start)
            if len(buffer) < HEAD.size:
                return None
            _, header_size, payload_size = HEAD.unpack_from(buffer)
            if header_size > MAX_HEADER or payload_size > MAX_PAYLOAD:
                self._skip(len(MAGIC))
                continue
            body = HEAD.size + header_size
            if len(buffer) < body:
                return None
            try:
                header = loads(buffer[HEAD.size : body].decode())
            except (ValueError, RecursionError):
                header = None
            if isinstance(header, dict):
                return header, body, body + payload_size
            self._skip(len(MAGIC))


class Request:
    """A frame from the host that asks for something."""

    def __init__(self, ident: int, header: dict[str, Any], payload: bytes):
        self.id = ident
        self.header = header
        self.payload = payload


class Refused(Exception):
    """A request that cannot be done; the text goes to the host."""


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


class Reading:
    """A file on its way to the host."""

    def __init__(self, ident: int, fd: int):
        self.id = ident
        self.fd = fd
        self.credit = WINDOW


class Writing:
    """A file on its way from the host; it appears under its name only when it is whole."""

    def __init__(self, path: str, partial: str, fd: int, mode: int):
        self.path = path
        self.partial = partial
        self.fd = fd
        self.mode = mode


def _signal(send: Callable[[int, int], None], target: int, number: int) -> None:
    try:
        send(target, number)
    except ProcessLookupError:
        pass


def _stop_with_children(first: int) -> list[int]:
    """Stop a process and its descendants, those in sessions of their own, too; returns them once they stand still."""
    stopped: list[int] = []
    fresh = [first]
    while fresh:
        for pid in fresh:
            _signal(os.kill, pid, 19)  # SIGSTOP
        stopped += fresh
        # Only what stands still cannot start another process.
        while any(_stat(pid)[0] not in "TtZX" for pid in fresh):
            time.sleep(0.001)
        everybody = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        fresh = [pid for pid in everybody if pid not in stopped and _stat(pid)[1] in stopped]
    return stopped


def _stat(pid: int) -> tuple[str, int]:
    """State and parent of a process; "X" when there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


class Agent:
    """The loop. `fd` is the port, read and written without blocking; the agent owns it."""

    def __init__(self, fd: int):
        self.port = fd
        os.set_blocking(fd, False)
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.interest: dict[int, int] = {}
        self.decoder = Decoder()
        self.out: list[memoryview] = []
        self.backlog = 0
        self.host_gone = False
        self.jobs: dict[int, Job] = {}
        self.readings: dict[int, Reading] = {}
        self.writings: dict[int, Writing] = {}
        self.evaluating = False
        self.namespace: dict[str, Any] = {"__name__": "__agent__"}

    # The port

    def send(self, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        frame = encode(header, payload)
        self.out.append(memoryview(frame))
        self.backlog += len(frame)
        self.flush()

    def flush(self) -> None:
        while self.out:
            try:
                written = os.write(self.port, self.out[0][:CHUNK])
            except BlockingIOError:
                break
            except OSError as error:
                # EPIPE or ENODEV: the host has closed its end. What it was to read is of no use to the next one.
                if error.errno not in (errno.EPIPE, errno.ENODEV, errno.ECONNRESET):
                    raise
                self.lose_host()
                return
            self.backlog -= written
            if written == len(self.out[0]):
                self.out.pop(0)
            else:
                self.out[0] = self.out[0][written:]
        self.watch(self.port, select.EPOLLIN | (select.EPOLLOUT if self.out else 0), self.on_port)

    def lose_host(self) -> None:
        self.out.clear()
        self.backlog = 0
        self.host_gone = True
        self.unwatch(self.port)

    def on_port(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.flush()
            self.rearm()
        if not events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            return
        try:
            data = os.read(self.port, 4 * CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.lose_host()
            return
        garbage = self.decoder.garbage
        for header, payload in self.decoder.feed(data):
            self.handle(header, payload)
        if self.decoder.garbage != garbage:
            self.send({"id": 0, "event": "garbage", "bytes": self.decoder.garbage - garbage})

    # epoll, with the handler of each descriptor

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        before = self.interest.get(fd)
        if before is None:
            self.epoll.register(fd, events)
        elif before != events:
            self.epoll.modify(fd, events)
        self.interest[fd] = events
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        if self.interest.pop(fd, None) is not None:
            self.epoll.unregister(fd)
            del self.handlers[fd]

    def run(self) -> None:
        """Serve until the process is ended, or, on a socket, until the host has gone."""
        self.flush()
        while True:
            for fd, events in self.epoll.poll(0.1 if self.host_gone else -1):
                handler = self.handlers.get(fd)
                if handler is not None:
                    handler(events)
            for reading in list(self.readings.values()):
                self.pump_file(reading)
            if self.host_gone and not self.find_host():
                return

    def find_host(self) -> bool:
        """Whether to go on: a port waits for its next host (a poll each 0.1 s, as it has no event for that)."""
        import stat

        if not stat.S_ISCHR(os.fstat(self.port).st_mode):
            return False
        poll = select.poll()
        poll.register(self.port, select.POLLIN)
        if not any(events & select.POLLHUP for _, events in poll.poll(0)):
            self.host_gone = False
            self.decoder = Decoder()
            self.greet()
        return True

    def greet(self) -> None:
        system = os.uname()
        self.send(
            {
                "id": 0,
                "event": "hello",
                "protocol": PROTOCOL,
                "pid": os.getpid(),
                "python": ".".join(map(str, sys.version_info[:3])),
                "kernel": system.release,
                "uptime": time.monotonic(),
            }
        )

    # Requests

    def handle(self, header: dict[str, Any], payload: bytes) -> None:
        ident = header.get("id")
        op = header.get("op")
        if type(ident) is not int or not isinstance(op, str):
            self.send({"id": 0, "event": "error", "message": "a request needs an integer id and a text op"})
            return
        method = getattr(self, "op_" + op.replace("-", "_"), None)
        try:
            if method is None:
                raise Refused(f"unknown request {op!r}; this agent speaks protocol {PROTOCOL}")
            answer = method(Request(ident, header, payload))
        except (Refused, OSError) as error:
            self.send({"id": ident, "event": "error", "message": str(error)})
        except Exception as error:  # whatever a request provokes, the next one must be served
            import traceback

            text = f"{type(error).__name__}: {error}"
            self.send({"id": ident, "event": "error", "message": text, "trace": traceback.format_exc()[-4000:]})
        else:
            if answer is not None:
                self.send({"id": ident, "event": "result", **answer})

    def op_hello(self, _: Request) -> dict[str, Any]:
        """Greet: asked for by the host of a guest that was restored, whose agent has greeted another before."""
        self.greet()
        return {}

    def op_begin(self, request: Request) -> dict[str, Any]:
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

    def op_ping(self, request: Request) -> dict[str, Any]:
        return {"size": len(request.payload)}

    def op_eval(self, request: Request) -> dict[str, Any]:
        """Run Python in the resident interpreter; the value of a last expression is the answer."""
        import ast

        tree = ast.parse(request.payload.decode(), "<eval>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None

        def work() -> object:
            exec(compile(tree, "<eval>", "exec"), self.namespace)  # noqa: S102 - this is what it is for
            if not isinstance(last, ast.Expr):
                return None
            return eval(compile(ast.Expression(last.value), "<eval>", "eval"), self.namespace)

        return {"value": self.guarded(work, request)}

    def op_call(self, request: Request) -> dict[str, Any]:
        """Call module:function with JSON arguments in the resident interpreter."""
        import importlib

        arguments: Any = loads(request.payload.decode())
        module, _, name = str(request.header["function"]).partition(":")

        def work() -> object:
            target: Any = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            return target(*arguments["args"], **arguments["kwargs"])

        return {"value": self.guarded(work, request)}

    def guarded(self, work: Callable[[], object], request: Request) -> object:
        """Run `work` here and now, but not for ever: everything else waits meanwhile."""
        import signal

        _complete_path()

        seconds = float(request.header.get("timeout", 5.0))

        def ring(*_: object) -> None:
            if self.evaluating:
                raise TimeoutError(f"not done after {seconds:g} s in the resident interpreter; use a command")

        before = signal.signal(signal.SIGALRM, ring)
        self.evaluating = True
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            value = work()
            dumps(value)
            return value
        except (SystemExit, KeyboardInterrupt) as error:
            raise Refused(f"{type(error).__name__} in the resident interpreter") from error
        finally:
            self.evaluating = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    # Commands

    def op_run(self, request: Request) -> None:
        import subprocess

        if request.id in self.jobs:
            raise Refused(f"request {request.id} is already running")
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
                _set_size(terminal, request.header["pty"])
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
        if job.halt_at:
            # With one processor, a command that prints the line is then stopped before its write returns.
            try:
                os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
            except PermissionError:
                pass  # no guest, but a test of this program
        self.jobs[request.id] = job
        self.watch(job.pidfd, select.EPOLLIN, lambda _: self.on_exit(job))
        self.send({"id": request.id, "event": "started", "pid": process.pid})
        self.arm(job)

    def op_stdin(self, request: Request) -> None:
        job = self.jobs.get(request.id)
        if job is None or job.stdin is None:
            return  # the command has ended or closed its input meanwhile: nobody's fault
        job.stdin_data += request.payload
        job.stdin_ends |= bool(request.header.get("eof"))
        self.feed_stdin(job)

    def op_kill(self, request: Request) -> None:
        """Signal a command's whole process group; a command that has ended already is left alone. What was halted
        elsewhere goes on afterwards, also to see that the command is gone."""
        job = self.jobs.get(request.id)
        if job is None or job.left is not None:
            return
        _signal(os.killpg, job.process.pid, int(request.header.get("signal", 9)))
        for pid in job.halted:
            _signal(os.kill, pid, 18)  # SIGCONT
        job.halted.clear()

    def op_resize(self, request: Request) -> None:
        job = self.jobs.get(request.id)
        if job is not None and job.terminal in job.streams:
            _set_size(job.terminal, request.header["pty"])

    def op_ack(self, request: Request) -> None:
        count = int(request.header["count"])
        job = self.jobs.get(request.id)
        if job is not None:
            job.credit += count
            self.arm(job)
        elif request.id in self.readings:
            self.readings[request.id].credit += count

    def arm(self, job: Job) -> None:
        """Read from a command's pipes exactly while the host grants credit and the port is not behind."""
        if job.left is not None:
            self.drain_rest(job)
            return
        willing = job.credit > 0 and self.backlog < BACKLOG
        for fd in list(job.streams):
            if willing:
                self.watch(fd, select.EPOLLIN, lambda _, fd=fd: self.on_output(job, fd))  # type: ignore[misc]
            else:
                self.unwatch(fd)

    def rearm(self) -> None:
        for job in list(self.jobs.values()):
            self.arm(job)

    def on_output(self, job: Job, fd: int) -> None:
        self.forward(job, fd, CHUNK)
        if job.credit <= 0 or self.backlog >= BACKLOG:
            self.rearm()

    def forward(self, job: Job, fd: int, limit: int) -> int:
        """Send what one pipe holds, up to `limit` bytes; closes it at its end. Returns the bytes sent."""
        try:
            data = os.read(fd, max(1, min(limit, CHUNK, job.credit)))
        except BlockingIOError:
            return 0
        except OSError:  # EIO: the last holder of a terminal has closed it
            data = b""
        if not data:
            self.close_stream(job, fd)
            return 0
        if job.halt_at:
            self.look_for_halt(job, data)
        job.credit -= len(data)
        self.send({"id": job.id, "event": "output", "stream": job.streams[fd]}, data)
        return len(data)

    def look_for_halt(self, job: Job, data: bytes) -> None:
        """Stop the command, with all that it started, once it has printed what it is to be halted at."""
        text = job.tail + data
        if job.halt_at in text:
            job.halt_at = b""
            job.halted = _stop_with_children(job.process.pid)
            self.send({"id": job.id, "event": "halted"})
        else:
            job.tail = text[1 - len(job.halt_at) :] if len(job.halt_at) > 1 else b""

    def close_stream(self, job: Job, fd: int) -> None:
        self.unwatch(fd)
        job.streams.pop(fd, None)
        if fd == job.terminal:
            job.terminal = None
        os.close(fd)

    def feed_stdin(self, job: Job) -> None:
        if job.stdin is None:
            return
        while job.stdin_data:
            try:
                written = os.write(job.stdin, job.stdin_data[:CHUNK])
            except BlockingIOError:
                self.watch(job.stdin, select.EPOLLOUT, lambda _: self.feed_stdin(job))
                return
            except OSError:  # the command reads no more; what is left is acknowledged and dropped
                self.send({"id": job.id, "event": "ack", "count": len(job.stdin_data)})
                job.stdin_data.clear()
                job.stdin_ends = True
                break
            del job.stdin_data[:written]
            self.send({"id": job.id, "event": "ack", "count": written})
        self.unwatch(job.stdin)
        if job.stdin_ends:
            if job.terminal is None:
                os.close(job.stdin)
                job.stdin = None
            else:
                os.write(job.stdin, b"\x04")
                job.stdin_ends = False

    def on_exit(self, job: Job) -> None:
        """The process has ended. What its pipes hold is still sent; a child it left behind is not waited for."""
        import fcntl
        import termios

        self.unwatch(job.pidfd)
        os.close(job.pidfd)
        job.process.wait()
        if job.stdin is not None:
            self.unwatch(job.stdin)
            os.close(job.stdin)
            job.stdin = None
        job.left = {}
        for fd in job.streams:
            self.unwatch(fd)
            # A terminal holds more in its line discipline than FIONREAD tells; it is read until it is empty.
            if fd == job.terminal:
                job.left[fd] = 1 << 20
            else:
                job.left[fd] = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
        self.drain_rest(job)

    def drain_rest(self, job: Job) -> None:
        assert job.left is not None
        for fd in list(job.streams):
            while job.left[fd] > 0 and fd in job.streams:
                if job.credit <= 0 or self.backlog >= BACKLOG:
                    return
                sent = self.forward(job, fd, job.left[fd])
                job.left[fd] = job.left[fd] - sent if sent else 0
            if fd in job.streams:
                self.close_stream(job, fd)
        if self.jobs.pop(job.id, None) is not None:
            code = job.process.returncode
            self.send({"id": job.id, "event": "exit", "code": code})

    # Files

    def op_get(self, request: Request) -> None:
        path = str(request.header["path"])
        if os.path.isdir(path):
            raise Refused(f"{path} is a directory of the guest")
        # Not to be held up by a FIFO or a device that has nothing to say.
        self.readings[request.id] = Reading(request.id, os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        self.pump_file(self.readings[request.id])

    def pump_file(self, reading: Reading) -> None:
        while reading.credit > 0 and self.backlog < BACKLOG and not self.host_gone:
            problem = None
            try:
                data = os.read(reading.fd, CHUNK)
            except BlockingIOError:
                data = b""
            except OSError as error:
                data, problem = b"", error
            if data:
                reading.credit -= len(data)
                self.send({"id": reading.id, "event": "output", "stream": "file"}, data)
                continue
            os.close(reading.fd)
            del self.readings[reading.id]
            if problem is not None:
                self.send({"id": reading.id, "event": "error", "message": str(problem)})
            else:
                self.send({"id": reading.id, "event": "result"})
            return

    def op_put(self, request: Request) -> None:
        path = str(request.header["path"])
        if os.path.isdir(path):
            raise Refused(f"{path} is a directory of the guest; give the full path of the file")
        os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
        partial = f"{path}.part{request.id}"
        # A device or an attribute of sysfs is written in place: there is nothing to rename onto it.
        in_place = (os.path.exists(path) and not os.path.isfile(path)) or path.startswith(("/sys/", "/proc/"))
        if in_place:
            partial = path
        flags = os.O_WRONLY | os.O_CLOEXEC | (0 if in_place else os.O_CREAT | os.O_TRUNC)
        fd = os.open(partial, flags, 0o600)
        self.writings[request.id] = Writing(path, partial, fd, int(request.header.get("mode", 0o644)))

    def op_data(self, request: Request) -> dict[str, Any] | None:
        writing = self.writings.get(request.id)
        if writing is None:
            return None  # the put was refused; the host learns of it from that answer
        try:
            view = memoryview(request.payload)
            while view:
                view = view[os.write(writing.fd, view) :]
            if not request.header.get("eof"):
                return None
            if writing.partial != writing.path:
                os.fchmod(writing.fd, writing.mode)
                os.rename(writing.partial, writing.path)
        except OSError:
            del self.writings[request.id]
            os.close(writing.fd)
            if writing.partial != writing.path:
                os.unlink(writing.partial)
            raise
        del self.writings[request.id]
        os.close(writing.fd)
        return {}


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


def _complete_path() -> None:
    """Give the interpreter, started bare to be quick, the module path that commands have."""
    if "site" not in sys.modules:
        import site

        site.main()
        sys.path[:0] = [entry for entry in os.environ.get("PYTHONPATH", "").split(":") if entry not in ("", *sys.path)]


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


def _set_size(terminal: int, size: list[int]) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", int(size[0]), int(size[1]), 0, 0))


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def find_port(name: str = PORT_NAME, ports: str = PORTS) -> str:
    """Path of the virtio-serial port of that name. Raises FileNotFoundError naming the ports there are."""
    there = []
    for entry in sorted(os.listdir(ports)) if os.path.isdir(ports) else []:
        with open(f"{ports}/{entry}/name", encoding="utf-8") as file:
            there.append(file.read().strip())
        if there[-1] == name:
            return f"/dev/{entry}"
    raise FileNotFoundError(f"no virtio-serial port named {name!r} under {ports}; there are: {there or 'none'}")


def main(arguments: list[str]) -> int:
    """agent.py [PORT-NAME]; or agent.py --fd N, to serve an open socket instead (tests do), or --mount the disks."""
    if arguments[:1] == ["--mount"]:
        for serial, target in DISKS:
            mount_disk(serial, target)
        return 0
    if arguments[:1] == ["--fd"]:
        fd = int(arguments[1])
    else:
        fd = os.open(find_port(*arguments[:1]), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    agent = Agent(fd)
    agent.greet()
    import ast  # noqa: F401 - loaded now, while the host is busy with the greeting, not at the first request
    import ctypes  # noqa: F401
    import fcntl  # noqa: F401
    import signal
    import subprocess  # noqa: F401

    # A shell that starts this in the background has it ignore what a terminal's keys send, and so would every command.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    agent.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
