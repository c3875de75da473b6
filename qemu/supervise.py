"""Runs one program and makes sure that it does not outlive whoever asked for it, however that one ends.

    python supervise.py OWNER-PID LIFELINE-FD PROGRAM ARGUMENT…

LIFELINE-FD is one end of a stream socket pair. The program is killed when the other end is shut down or closed, or
when the process OWNER-PID is gone: the one catches an owner that forgets, the other an owner whose end of the
socket lives on in a child it had forked. Should this process itself be killed, the kernel kills the program
(PR_SET_PDEATHSIG, which holds for the thread that forked it: here there is only one). On the lifeline it tells
"pid N" once the program runs and "exit N" when it has ended, N being negative for a signal.

It is run as a script by a bare interpreter, so that it starts in a few milliseconds and has nothing to clean up.
"""

import ctypes
import os
import select
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CANNOT_START = 127


def start(argv: list[str]) -> int:
    """Fork and exec; returns the child's pid."""
    supervisor = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child:
        return child
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == supervisor:  # it could have died before the signal was asked for
            os.execvp(argv[0], argv)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(CANNOT_START)


def main(arguments: list[str]) -> None:
    owner = os.pidfd_open(int(arguments[0]))
    lifeline = socket.socket(fileno=int(arguments[1]))
    lifeline.set_inheritable(False)
    child = start(arguments[2:])
    try:
        lifeline.sendall(b"pid %d\n" % child)
    except OSError:
        os.kill(child, signal.SIGKILL)
    ended = os.pidfd_open(child)
    poll = select.poll()
    for fd in (owner, lifeline.fileno(), ended):
        poll.register(fd, select.POLLIN)
    while ended not in (ready := [fd for fd, _ in poll.poll()]):
        # Nothing is ever sent this way: readable means that the other end is shut down or closed.
        os.kill(child, signal.SIGKILL)
        for fd in ready:
            poll.unregister(fd)
    _, status = os.waitpid(child, 0)
    try:
        lifeline.sendall(b"exit %d\n" % os.waitstatus_to_exitcode(status))
    except OSError:
        pass  # the owner has gone; nobody is left to be told


if __name__ == "__main__":
    main(sys.argv[1:])
