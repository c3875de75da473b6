"""What `bind` writes down of a function before it touches it, so that anybody can put it right after a crash.

One small file for each function that is lent, in a directory that also serves as the lock.
"""

from __future__ import annotations

import errno
import fcntl
import os

from vfio import _sys
from vfio.errors import NotPermitted, VfioError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfio.pci import PciAddress


def path_of(directory: str, address: PciAddress) -> str:
    """The file of a function."""
    return f"{directory}/{address}"


class Lock:
    """Keeps two processes from moving functions about at the same time; the kernel drops it if we are killed."""

    def __init__(self, directory: str) -> None:
        self._path = directory
        self._fd = -1

    def __enter__(self) -> None:
        try:
            os.makedirs(self._path, mode=0o700, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise refused(self._path, error) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(self._fd)
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def refused(directory: str, error: OSError) -> VfioError:
    """The error for a directory that cannot be read or written."""
    doing = f"cannot keep notes in {directory}"
    if isinstance(error, PermissionError):
        return NotPermitted(doing, errno=error.errno, fix="binding drivers needs root")
    return VfioError(
        doing, errno=error.errno, fix="nothing is bound without them: it could not be undone after a crash"
    )


def save(directory: str, address: PciAddress, driver: str | None, override: str | None) -> None:
    """Write down which driver and which driver_override a function has."""
    path = path_of(directory, address)
    text = f"driver={driver or ''}\noverride={override or ''}\n".encode()
    try:
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if os.write(fd, text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)
        os.rename(f"{path}.new", path)
    except OSError as error:
        raise refused(directory, error) from None


def load(directory: str, address: PciAddress) -> tuple[str | None, str | None] | None:
    """The driver and the driver_override that a function had; None when there are no notes of it."""
    try:
        text = _sys.read_file(path_of(directory, address))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise refused(directory, error) from None
    fields = dict(line.partition("=")[::2] for line in text.splitlines())
    values = [fields.get(key, "/") for key in ("driver", "override")]
    if not all(value.isprintable() and "/" not in value for value in values):
        raise VfioError(
            f"{path_of(directory, address)} is not what bind writes",
            device=address,
            fix="remove the file and bind anew",
        )
    return values[0] or None, values[1] or None


def forget(directory: str, address: PciAddress) -> None:
    """Remove the notes, if there are any."""
    try:
        os.unlink(path_of(directory, address))
    except FileNotFoundError:
        pass
