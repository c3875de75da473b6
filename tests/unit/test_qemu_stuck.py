"""A guest that does not get on, played second by second."""

from collections.abc import Callable

from qemu import guest, vm
from qemu.stuck import FLOOD_BYTES, LOOK_SECONDS, Stuck
from tests.e2e.patience import TOLD_SECONDS

TIMEOUT = 180.0


def told(
    used: Callable[[float], float] = lambda _: 0.0,
    waited: Callable[[float], float] = lambda _: 0.0,
    spoke: Callable[[float], float] = lambda _: 0.0,
    printed: Callable[[float], int] = lambda _: 0,
) -> tuple[float, str]:
    """After how many seconds which reason is given, for a guest that has done so much by each second."""
    watch = Stuck(0.0, TIMEOUT, guest.SPIN_SECONDS)
    now = 0.0
    while (reason := watch.look(now, used(now), waited(now), spoke(now), printed(now))) is None:
        now += LOOK_SECONDS
    return now, reason


def test_one_that_does_nothing() -> None:
    assert told() == (4.0, "it has been idle and silent for 4 s")
    seconds, reason = told(used=lambda now: min(now, 3.0))  # it has booted as far as that
    assert seconds < TOLD_SECONDS
    assert "idle and silent" in reason


def test_one_that_gets_no_turn_is_not_idle() -> None:
    seconds, _ = told(waited=lambda now: 0.5 * now)
    assert seconds == TIMEOUT


def test_one_that_spins() -> None:
    seconds, reason = told(used=lambda now: now)
    assert (seconds, reason) == (12.0, "it has used 12 s of processor time without a word on the console")
    assert seconds < TOLD_SECONDS


def test_a_word_gives_it_as_much_time_again() -> None:
    assert told(used=lambda now: now, spoke=lambda now: 8.0 if now >= 8.0 else 0.0)[0] == 20.0


def test_one_that_speaks_and_speaks_ends_with_the_time_there_is_at_all() -> None:
    assert told(used=lambda now: now, spoke=lambda now: now) == (180.0, "its agent did not greet within 180 s")


def test_one_that_floods_its_console() -> None:
    seconds, reason = told(used=lambda now: now, spoke=lambda now: now, printed=lambda now: int(now * FLOOD_BYTES / 5))
    assert (seconds, reason) == (5.25, "it has flooded its console with 268 KiB")


def test_the_other_limits_are_within_the_time_there_is() -> None:
    """Of KVM on trial, and of a panic or a stop whose last words are awaited."""
    assert max(guest.TRIAL_SECONDS, 2 * vm.PANIC_SECONDS) < TOLD_SECONDS
