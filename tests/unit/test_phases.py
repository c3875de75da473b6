"""The bridge's phases: every pair is either a move or has a reason against it."""

from __future__ import annotations

from itertools import product

import pytest

from netbridge.errors import NetbridgeError
from netbridge.phases import MOVES, Phase, check_move, reason

PAIRS = list(product(Phase, Phase))


@pytest.mark.parametrize(("start", "end"), PAIRS, ids=lambda phase: phase.name)
def test_every_move_is_allowed_or_has_a_reason_against_it(start: Phase, end: Phase) -> None:
    if end in MOVES[start]:
        check_move(start, end)
        with pytest.raises(KeyError):
            reason(start, end)
    else:
        with pytest.raises(NetbridgeError, match=rf"cannot go from {start.name} .* to {end.name}: "):
            check_move(start, end)


def test_every_phase_leads_back_to_an_end() -> None:
    assert all(Phase.IDLE in ends for ends in MOVES.values())
