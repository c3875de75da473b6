"""The socket file a client finds the driver at: made safely, never stolen from a live owner, removed at the end.

Apart from the server, so that a privileged process can open it for a driver that may not touch the file system.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from contextlib import ExitStack

from netbridge.ipc.errors import PortInUse, PortUnavailable

# More than the one client that is served, so that the others get their answer instead of a wait.
_BACKLOG = 16
# sun_path, less its terminating zero.
_LONGEST_PATH = 107


class PortListener:
    """Listens at `path`, whose directory is made if need be (0755).

    `mode` is that of the socket file, and `owner` its uid, if that is to be another than this process's. Who may
    connect is decided by the peer's uid, so the default lets everyone reach the door; where one user alone may, make it
    that user's with mode 0o600: then the kernel keeps the others from knocking at all. A lock file beside the socket
    (`<path>.lock`) keeps a second instance away from it even while both start.

    Raises PortInUse when another instance serves the path or what is there is no socket, PortUnavailable when the path
    cannot be used at all.
    """

    def __init__(self, path: str | os.PathLike[str], *, mode: int = 0o666, owner: int = -1) -> None:
        self.path = os.fspath(path)
        if len(os.fsencode(self.path)) > _LONGEST_PATH:
            raise PortUnavailable(f"socket path {self.path} is longer than {_LONGEST_PATH} bytes; choose a shorter one")
        with ExitStack() as stack:
            try:
                self._open(stack, mode, owner)
            except OSError as error:
                raise PortUnavailable(
                    f"cannot listen at {self.path}: {error.strerror}; choose a path that this user may use"
                ) from error
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack, mode: int, owner: int) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), mode=0o755, exist_ok=True)
        _lock(stack, self.path)
        _remove_stale(self.path)
        self.socket = stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        )
        # A client that waits for the socket may find it at any moment from here on. Until `listen` it must be told that
        # nobody listens yet, which passes, and never that it has no permission, which does not.
        umask = os.umask(0)
        try:
            self.socket.bind(self.path)
        finally:
            os.umask(umask)
        stack.callback(_unlink_own, self.path, _identity(self.path))
        os.chown(self.path, owner, -1)
        os.chmod(self.path, mode)
        self.socket.listen(_BACKLOG)

    @classmethod
    def adopt(cls, fd: int, path: str) -> PortListener:
        """A listening socket that another process opened at `path` and keeps: it stays that one's to remove. Takes
        ownership of `fd`. Touches no file."""
        listener = cls.__new__(cls)
        listener.path = path
        with ExitStack() as stack:
            listener.socket = stack.enter_context(socket.socket(fileno=fd))
            listener._stack = stack.pop_all()
        return listener

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        """Stops listening and removes the socket file, if it is still this one's. More than once does no harm."""
        self._stack.close()

    def __enter__(self) -> PortListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(stack: ExitStack, path: str) -> None:
    """Takes the lock file's lock for as long as `stack` lives. The kernel gives it back when the process dies."""
    lock_path = path + ".lock"
    while True:
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The owner before may have removed the name between our open and our lock: then this locks nothing.
            if _identity(lock_path) == _identity_of(os.fstat(fd)):
                break
        except BlockingIOError:
            os.close(fd)
            raise PortInUse(_in_use(path)) from None
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
    stack.callback(os.close, fd)
    stack.callback(_unlink, lock_path)


def _remove_stale(path: str) -> None:
    """Removes a socket that nobody listens at any more."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise PortInUse(f"{path} exists and is no socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        result = probe.connect_ex(path)
    if result != errno.ECONNREFUSED:
        raise PortInUse(_in_use(path))
    os.unlink(path)


def _in_use(path: str) -> str:
    return f"another instance serves {path}; stop it, or choose another path"


def _identity_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _identity(path: str) -> tuple[int, int] | None:
    try:
        return _identity_of(os.lstat(path))
    except FileNotFoundError:
        return None


def _unlink_own(path: str, identity: tuple[int, int] | None) -> None:
    if _identity(path) == identity:
        _unlink(path)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        # Gone already; or this process may not any more, and then a stale socket is removed at the next start.
        pass
