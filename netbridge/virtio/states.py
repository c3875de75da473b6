"""The states of the network device, the moves between them, and why the other moves are never made.

The names follow the status field (virtio 1.3 §2.1) and the initialisation sequence (§3.1.1). A move that is not in
`MOVES` is refused with a reason from `NEVER`; the two tables together cover every pair of states, which a test holds.
"""

from __future__ import annotations

from enum import Enum

from netbridge.virtio.errors import WrongState


class State(Enum):
    """Where the device stands. The value says what is true in it."""

    FOUND = "as whoever had it before left it"
    RESET = "reset: status 0, no features agreed, no queues, no DMA"
    ACKNOWLEDGED = "noticed: ACKNOWLEDGE and DRIVER are set"
    NEGOTIATED = "features agreed and confirmed: FEATURES_OK reads back"
    CONFIGURED = "interrupts and queues set up; the device does not look at them yet"
    LIVE = "in service: DRIVER_OK is set"
    NEEDS_RESET = "the device has lost its way and says so"
    FAILED = "given up on; reset if it still answers, and cut off from memory if it does not"
    CLOSED = "let go of"


MOVES: dict[State, frozenset[State]] = {
    State.FOUND: frozenset({State.RESET, State.FAILED, State.CLOSED}),
    State.RESET: frozenset({State.RESET, State.ACKNOWLEDGED, State.FAILED, State.CLOSED}),
    State.ACKNOWLEDGED: frozenset({State.NEGOTIATED, State.RESET, State.FAILED, State.CLOSED}),
    State.NEGOTIATED: frozenset({State.CONFIGURED, State.RESET, State.FAILED, State.CLOSED}),
    State.CONFIGURED: frozenset({State.LIVE, State.NEEDS_RESET, State.RESET, State.FAILED, State.CLOSED}),
    State.LIVE: frozenset({State.NEEDS_RESET, State.RESET, State.FAILED, State.CLOSED}),
    State.NEEDS_RESET: frozenset({State.NEEDS_RESET, State.RESET, State.FAILED, State.CLOSED}),
    State.FAILED: frozenset({State.RESET, State.FAILED, State.CLOSED}),
    State.CLOSED: frozenset(),
}

_ANY = frozenset(State)

# From, to, reason. The first row that matches is the one that is told.
NEVER: tuple[tuple[frozenset[State], frozenset[State], str], ...] = (
    (frozenset({State.CLOSED}), _ANY, "the device was let go of; open it anew"),
    (_ANY, frozenset({State.FOUND}), "a device that was touched is never again as it was found"),
    (
        frozenset({State.FOUND}),
        _ANY,
        "what the former driver left, queues and features among it, is wiped by a reset only",
    ),
    (
        frozenset({State.NEEDS_RESET, State.FAILED}),
        _ANY,
        "only a reset leads out of it; what the device does until then means nothing",
    ),
    (
        frozenset({State.NEGOTIATED, State.CONFIGURED, State.LIVE}),
        frozenset({State.ACKNOWLEDGED, State.NEGOTIATED}),
        "features are agreed once; others need a reset first",
    ),
    (
        frozenset({State.CONFIGURED, State.LIVE}),
        frozenset({State.CONFIGURED}),
        "queues are set up once; to set them up anew, reset the device first",
    ),
    (frozenset({State.ACKNOWLEDGED}), frozenset({State.ACKNOWLEDGED}), "it is acknowledged already"),
    (frozenset({State.LIVE}), frozenset({State.LIVE}), "it is in service already"),
    (
        _ANY,
        frozenset({State.NEGOTIATED}),
        "a device reads accepted features only from a driver that has acknowledged it",
    ),
    (
        _ANY,
        frozenset({State.CONFIGURED}),
        "how queues are laid out depends on the features, so those are agreed first",
    ),
    (
        _ANY,
        frozenset({State.LIVE}),
        "a device in service uses its queues at once, so they are set up first",
    ),
    (
        _ANY,
        frozenset({State.NEEDS_RESET}),
        "only a device whose queues are set up can lose its way in them",
    ),
)


def check_move(name: str, start: State, end: State) -> None:
    """Raises WrongState, with the reason, unless the device called `name` may go from `start` to `end`."""
    if end in MOVES[start]:
        return
    raise WrongState(
        f"{name}: the device cannot go from {start.name} ({start.value}) to {end.name}: {reason(start, end)}"
    )


def reason(start: State, end: State) -> str:
    """Why a device never goes from `start` to `end`."""
    for starts, ends, why in NEVER:
        if start in starts and end in ends:
            return why
    raise KeyError((start, end))
