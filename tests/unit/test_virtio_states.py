"""The table of states: every move is either made or forbidden for a reason."""

import itertools
import re
from pathlib import Path

import pytest

from netbridge.virtio.errors import WrongState
from netbridge.virtio.states import MOVES, State, check_move, reason

PAIRS = list(itertools.product(State, State))


@pytest.mark.parametrize(("start", "end"), PAIRS, ids=lambda state: state.name)
def test_a_move_is_either_made_or_refused_with_its_reason(start: State, end: State) -> None:
    if end in MOVES[start]:
        check_move("fake", start, end)
        return
    with pytest.raises(WrongState, match=f"fake: the device cannot go from {start.name} ") as caught:
        check_move("fake", start, end)
    assert str(caught.value).endswith(reason(start, end))


def test_only_reset_failure_and_the_end_lead_out_of_trouble() -> None:
    for trouble in (State.NEEDS_RESET, State.FAILED):
        assert MOVES[trouble] - {trouble} == {State.RESET, State.FAILED, State.CLOSED} - {trouble}


def test_every_state_but_the_last_can_be_reset_fail_and_close() -> None:
    for state in State:
        if state is not State.CLOSED:
            assert MOVES[state] >= {State.RESET, State.FAILED, State.CLOSED}


def test_a_device_goes_into_service_only_when_configured() -> None:
    assert [state for state in State if State.LIVE in MOVES[state]] == [State.CONFIGURED]


def test_the_documentation_shows_the_same_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "virtio.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \|[^|]*\| ([^|]*) \|$", text, re.M))
    documented = {
        State[name]: frozenset(State[end] for end in re.findall(r"`([A-Z_]+)`", ends)) for name, ends in rows.items()
    }
    assert documented == MOVES
