"""Who the driver process is, in mode strict: a user of its own, who is neither root nor a service."""

from __future__ import annotations

import pwd
import zlib
from collections.abc import Collection

from netbridge.errors import UsageError
from vfio._record import NamedTuple

DRIVER_USER = "netbridge"
# Where systemd's DynamicUser= puts users that nobody added (systemd.exec(5)); passwd rarely has one there.
FIRST_DYNAMIC_UID, LAST_DYNAMIC_UID = 61184, 65519


class Identity(NamedTuple):
    """Who the driver process is, in mode strict."""

    uid: int
    gid: int
    name: str


def driver_identity(user: str | None, service_uids: Collection[int], purpose: str) -> Identity:
    """The user named, or the system user made for it, or a uid that no user has: the same one for the same `purpose`.
    Raises UsageError for one that there is not, and for one that is root's or a service's."""
    if user is None:
        try:
            entry = pwd.getpwnam(DRIVER_USER)
        except KeyError:
            taken = {entry.pw_uid for entry in pwd.getpwall()}.union(service_uids)
            span = LAST_DYNAMIC_UID - FIRST_DYNAMIC_UID + 1
            first = zlib.crc32(purpose.encode())
            free = next(uid for i in range(span) if (uid := FIRST_DYNAMIC_UID + (first + i) % span) not in taken)
            return Identity(free, free, f"uid {free}")
        identity = Identity(entry.pw_uid, entry.pw_gid, entry.pw_name)
    elif user.isdecimal():
        identity = Identity(int(user), int(user), f"uid {user}")
    else:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise UsageError(f"there is no user {user}; name one that there is with --driver-user, or a uid") from None
        identity = Identity(entry.pw_uid, entry.pw_gid, entry.pw_name)
    if identity.uid == 0 or identity.gid == 0:
        raise UsageError(f"{identity.name} is root: name an ordinary user for the driver with --driver-user")
    if identity.uid in service_uids:
        raise UsageError(
            f"{identity.name} is a service's user, and could then send signals to the driver; "
            "name another one with --driver-user"
        )
    return identity
