"""What a bridge is at: named phases, the moves between them, and why the other moves are never made.

As in virtio/states.py: a move that is not in `MOVES` is refused with a reason from `NEVER`; the two tables together
cover every pair of phases, which a test holds.
"""

from __future__ import annotations

from enum import Enum

from netbridge.errors import NetbridgeError


class Phase(Enum):
    """The value says what is true in it."""

    IDLE = "there is no session: no buffers, and the device is out of service"
    PREPARED = "a session waits for its client; the device is configured and looks at nothing"
    SERVING = "frames flow"
    RECOVERING = "the device is reset under a session that is to go on"


MOVES: dict[Phase, frozenset[Phase]] = {
    Phase.IDLE: frozenset({Phase.IDLE, Phase.PREPARED}),
    Phase.PREPARED: frozenset({Phase.SERVING, Phase.IDLE}),
    Phase.SERVING: frozenset({Phase.RECOVERING, Phase.IDLE}),
    Phase.RECOVERING: frozenset({Phase.SERVING, Phase.IDLE}),
}

_ANY = frozenset(Phase)

# From, to, reason. The first row that matches is the one that is told.
NEVER: tuple[tuple[frozenset[Phase], frozenset[Phase], str], ...] = (
    (
        frozenset({Phase.SERVING, Phase.RECOVERING}),
        frozenset({Phase.PREPARED}),
        "its client may have kept a mapping, so a session is offered once; the next one has other memory",
    ),
    (
        frozenset({Phase.PREPARED}),
        frozenset({Phase.PREPARED}),
        "its buffers are mapped for the device; they are taken from it before others are made",
    ),
    (frozenset({Phase.SERVING}), frozenset({Phase.SERVING}), "one client at a time"),
    (
        frozenset({Phase.RECOVERING}),
        frozenset({Phase.RECOVERING}),
        "a recovery that fails is counted; it succeeds, or the session ends",
    ),
    (frozenset({Phase.IDLE}), frozenset({Phase.SERVING}), "there are no buffers to serve anybody with"),
    (
        frozenset({Phase.IDLE, Phase.PREPARED}),
        frozenset({Phase.RECOVERING}),
        "no client holds anything that would be worth keeping; the next session begins with a reset anyway",
    ),
)


def check_move(start: Phase, end: Phase) -> None:
    """Raises NetbridgeError, with the reason, unless a bridge may go from `start` to `end`."""
    if end not in MOVES[start]:
        why = reason(start, end)
        raise NetbridgeError(f"a bridge cannot go from {start.name} ({start.value}) to {end.name}: {why}")


def reason(start: Phase, end: Phase) -> str:
    """Why a bridge never goes from `start` to `end`."""
    for starts, ends, why in NEVER:
        if start in starts and end in ends:
            return why
    raise KeyError((start, end))
