"""A client that means no good, in the guest: `python3 -m tests.e2e.hostile WHAT [COUNT]`. Says `done`, and how it went.

keep     takes the port COUNT times, and keeps every file and mapping that it was sent
crowd    knocks COUNT times, some of the connections at a time; says which reasons it heard
wreck    takes the port and does to its memory, its doorbells and its socket whatever they let it do, for COUNT seconds
         and WRECKED sessions at the least; says for which reasons they ended
linger   a child takes the port, holds COUNT frames and COUNT buffers to send, and is killed; its parent keeps the
         memory, and says for each line of its input what is in it: a digest, and whether MARK is
stall    takes the port and reads nothing until there is a line of input, then all that is there
"""

from __future__ import annotations

import collections
import ctypes
import fcntl
import hashlib
import mmap
import os
import random
import select
import signal
import socket
import sys
import time

from netbridge.client import PortClosed, PortError, connect
from netbridge.ipc.messages import DEFAULT_SOCKET, Bye, Facts, Hello, Link, parse

PATIENCE_SECONDS = 30.0
AT_A_TIME = 40
WRECKED = 6
MARK = b"a frame that only the next client may see"
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


def keep(count: int) -> str:
    kept: list[object] = []
    for _ in range(count):
        with connect(wait=PATIENCE_SECONDS, name="keeper") as port:
            fds = [os.dup(fd) for fd in port._fds]
            maps = [mmap.mmap(fd, os.fstat(fd).st_size) for fd in fds[:3]]
            # No frame's header, which would be taken for the device's lie.
            maps[2][4096:8192] = b"mine" * 1024
            kept += [fds, maps]
    return f"{count} sessions"


def crowd(count: int) -> str:
    heard: collections.Counter[str] = collections.Counter()
    waiting: list[socket.socket] = []
    for _ in range(count):
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        caller.connect(DEFAULT_SOCKET)  # waits while the queue is full, as it does not with a timeout
        caller.settimeout(PATIENCE_SECONDS)
        waiting.append(caller)
        if len(waiting) == AT_A_TIME:
            heard.update(map(answer, waiting))
            waiting = []
    heard.update(map(answer, waiting))
    return ", ".join(f"{words} {number}" for words, number in sorted(heard.items()))


def answer(caller: socket.socket) -> str:
    with caller:
        said = parse(caller.recv(1024))
        assert isinstance(said, Bye), said
        return said.reason.name


def wreck(seconds: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    choose = random.Random(1)
    end = time.monotonic() + seconds
    sessions = 0
    ended: collections.Counter[str] = collections.Counter()
    while time.monotonic() < end or sessions < WRECKED:
        with connect(wait=PATIENCE_SECONDS, name="wrecker") as port:
            sessions += 1
            rings = sessions % 2 == 0  # or else the frames
            fds = port._fds
            # What an epoll instance and an eventfd let whoever has them do.
            select.epoll.fromfd(os.dup(fds[4])).register(fds[3], select.EPOLLIN)
            fcntl.fcntl(fds[3], fcntl.F_SETFL, 0)
            fcntl.fcntl(fds[3], fcntl.F_SETOWN, os.getppid())
            fcntl.fcntl(fds[3], fcntl.F_SETFL, os.O_NONBLOCK)
            if not rings:
                ring(fds[3], (1 << 64) - 2)  # no ring of it is heard any more
            sizes = [os.fstat(fd).st_size for fd in fds[:3]]
            for fd, size in zip(fds, sizes, strict=False):
                for forbidden in (0, size - 4096, size + 4096):
                    assert libc.ftruncate(fd, ctypes.c_long(forbidden)) < 0, "sealed"
            maps = [mmap.mmap(fd, size) for fd, size in zip(fds, sizes, strict=False)]
            # The frames, of which the headers are the device's; or the rings, which end the session.
            for region in (0,) if rings else (1, 2, 1, 2):
                memory, size = maps[region], sizes[region]
                for _ in range(200):
                    at = choose.randrange(size - 64)
                    memory[at : at + 64] = choose.randbytes(64)
                flags = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
                libc.fallocate(fds[region], flags, ctypes.c_long(0), ctypes.c_long(size))
                ring(fds[3])
                # Not zeros: a ring to which nothing was added yet would be as it was.
                memory[:] = bytes([choose.randrange(1, 256)]) * size
                ring(fds[3])
                time.sleep(0.02)
            if not rings:  # which have to be looked at before the session ends for another reason
                for message in (Hello("again").pack(), Link(Facts(bytes(6))).pack(), b"x" * 900):
                    for _ in range(100):
                        port._conversation._control.send(message)
            try:
                while True:
                    port.check()
                    select.select([port.control_fd], [], [], PATIENCE_SECONDS)
            except PortClosed as error:
                ended[error.reason.name] += 1
            except PortError:
                ended["UNHEARD"] += 1  # with so much unread, the reason may be lost
    return ", ".join(f"{reason} {number}" for reason, number in sorted(ended.items()))


def linger(count: int) -> str:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        port = connect(wait=PATIENCE_SECONDS, name="lingerer")
        held: list[object] = []
        while len(held) < count:
            frames = port.receive(most=count - len(held), timeout=PATIENCE_SECONDS)
            assert frames, f"{len(held)} of {count} frames came"
            held += frames
        spare = port.allocate(most=count, timeout=PATIENCE_SECONDS)
        assert len(spare) == count
        socket.send_fds(theirs, [b"x"], port._fds[:3])
        os.kill(os.getpid(), signal.SIGKILL)
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 1, 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    maps = [mmap.mmap(fd, os.fstat(fd).st_size) for fd in fds]
    print("killed", flush=True)
    for _ in sys.stdin:
        whole = b"".join(bytes(memory) for memory in maps)
        print(f"kept {hashlib.sha256(whole).hexdigest()} {MARK in whole}", flush=True)
    return "no more lines"


def stall(_count: int) -> str:
    with connect(wait=PATIENCE_SECONDS, name="staller") as port:
        print(f"may hold {port.rx_limit}", flush=True)
        sys.stdin.readline()
        taken = 0
        while frames := port.receive(timeout=0):
            taken += len(frames)
            port.release(frames)
    return f"{taken} frames"


def ring(doorbell: int, count: int = 1) -> None:
    try:
        os.eventfd_write(doorbell, count)
    except BlockingIOError:
        pass  # full: the driver never reads it


if __name__ == "__main__":
    what, number = sys.argv[1], int(sys.argv[2])
    print("done:", {"keep": keep, "crowd": crowd, "wreck": wreck, "linger": linger, "stall": stall}[what](number))
