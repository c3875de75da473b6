"""Everything that can go wrong at the port, one family: `PortError`."""

from __future__ import annotations

from enum import IntEnum

from netbridge.errors import PortError as PortError


class Reason(IntEnum):
    """Why a session ended, as BYE carries it. Numbers are part of the wire format; they are never used again for
    something else. A number that is not known here reads as UNSPECIFIED."""

    UNSPECIFIED = 0
    SHUTDOWN = 1
    BUSY = 2
    NOT_PERMITTED = 3
    VERSION = 4
    MALFORMED = 5
    UNEXPECTED = 6
    TIMEOUT = 7
    GEOMETRY = 8
    RING_FAULT = 9
    DEVICE_RESET = 10
    NOT_SHARED = 11
    FAILED = 12

    @classmethod
    def _missing_(cls, value: object) -> Reason | None:
        return cls.UNSPECIFIED if isinstance(value, int) else None

    @property
    def may_pass(self) -> bool:
        """Whether connecting again later may work out without anybody changing anything."""
        return self in _MAY_PASS

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Reason.UNSPECIFIED: "no reason given",
    Reason.SHUTDOWN: "orderly shutdown",
    Reason.BUSY: "another client has the port",
    Reason.NOT_PERMITTED: "not permitted",
    Reason.VERSION: "no common version",
    Reason.MALFORMED: "malformed message",
    Reason.UNEXPECTED: "message out of place",
    Reason.TIMEOUT: "handshake took too long",
    Reason.GEOMETRY: "geometry does not hold",
    Reason.RING_FAULT: "a ring entry that may not be",
    Reason.DEVICE_RESET: "the device was reset",
    Reason.NOT_SHARED: "memory is not shared with clients",
    Reason.FAILED: "internal failure",
}

_MAY_PASS = {Reason.UNSPECIFIED, Reason.BUSY, Reason.TIMEOUT, Reason.DEVICE_RESET, Reason.FAILED}


class BadMessage(PortError):
    """A control message that is not one. `reason` is what the BYE in answer says."""

    def __init__(self, text: str, reason: Reason = Reason.MALFORMED) -> None:
        super().__init__(text)
        self.reason = reason


class BadGeometry(PortError):
    """Offsets, counts, sizes or seals that do not hold together."""


class PortUnavailable(PortError):
    """There is no driver at the socket. It may come: trying again later is reasonable."""


class PortInUse(PortError):
    """The socket's path belongs to another running instance, or to something that is no socket."""


class PortClosed(PortError):
    """The session is over: the other side said BYE, or hung up. `reason` and `text` are what it said."""

    def __init__(self, reason: Reason, text: str = "") -> None:
        self.reason = reason
        self.text = text
        super().__init__(f"the driver closed the port: {reason.words}" + (f" ({text})" if text else ""))


class RequestRefused(PortError):
    """The driver did not do what a client asked for; `verdict` (netbridge.ipc.requests.Verdict) says why. The session
    goes on as before."""

    def __init__(self, verdict: IntEnum, text: str) -> None:
        super().__init__(f"{verdict.name.lower().replace('_', ' ')}: {text or 'no reason given'}")
        self.verdict = verdict
