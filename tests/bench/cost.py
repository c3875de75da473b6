"""What a frame costs the pump there and back, and what that depends on; what the driver costs when it has little to do.

Instructions are counted by callgrind, and are the same however busy the machine is; times are taken in turns. What is
measured is the pump with a fake device and an echo client in one thread (core_cost.c), and nothing else is in it.
Beside each figure stands the one of the setting that it is compared with: flat means a ratio of about 1.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.bench.contest import Contest, Unavailable
from tests.unit.core import toolchain

SUMMARY = "instructions and time a frame costs the pump, how they grow, idle and partly loaded, memory, the counters"
HERE = Path(__file__).parent
COUNTED_FRAMES, TIMED_FRAMES, MANY_FRAMES = 8_192, 400_000, 100_000_000
LOAD_MS, MOST_RATE = 500, 10**9
FLAT, NEARLY_FLAT = 0.9, 0.8
LEAST_SHARE = 1e-5
SECONDS = 600.0


class Setting(NamedTuple):
    length: int = 64
    burst: int = 256
    queue: int = 256
    buffers: int = 1024
    pairs: int = 1
    forwards: int = 0


BASE = Setting()
SETTINGS: dict[str, tuple[Setting, Setting, float | None]] = {
    # What differs, the setting, what it is compared with, and the goal.
    "frames of 192 B": (Setting(length=192), BASE, FLAT),
    "frames of 512 B": (Setting(length=512), BASE, FLAT),
    "frames of 1518 B": (Setting(length=1518), Setting(length=512), FLAT),
    "bursts of 32": (Setting(burst=32), BASE, NEARLY_FLAT),
    "bursts of 1": (Setting(burst=1), BASE, None),
    "queues of 1024": (Setting(queue=1024), BASE, FLAT),
    "8192 buffers": (Setting(buffers=8192), BASE, FLAT),
    "2 queue pairs": (Setting(pairs=2), BASE, FLAT),
    "8 queue pairs": (Setting(pairs=8), BASE, FLAT),
    "short frames forwarded": (Setting(forwards=1), BASE, FLAT),
    "frames of 1518 B forwarded": (Setting(length=1518, forwards=1), Setting(length=1518), FLAT),
}
"""Frames beyond NB_TX_MOST_COPIED go another way than shorter ones."""
TIMED = ("frames of 192 B", "frames of 1518 B", "queues of 1024", "8192 buffers", "8 queue pairs")
WITHOUT_COUNTING = toolchain.Variant(
    "uncounted", (*toolchain.PLAIN.flags, "-include", str(HERE / "without_counting.h"))
)


def contests(quick: bool) -> Iterator[Contest]:
    plain = _build(toolchain.PLAIN)
    for what in TIMED[:1] if quick else TIMED:
        setting, against, goal = SETTINGS[what]
        yield _contest(
            f"pump, {what}",
            "ns a frame",
            plain,
            functools.partial(_time, plain),
            setting,
            against,
            None if goal is None else NEARLY_FLAT,
        )
    yield from _loads(plain)
    if not quick:
        yield _memory(plain)
    if shutil.which("valgrind") is None:
        raise Unavailable("instructions want valgrind, and there is none")
    for what, (setting, against, goal) in SETTINGS.items():
        if not quick or what in TIMED:
            yield _contest(
                f"pump, {what}",
                "instructions a frame",
                plain,
                functools.partial(_count, plain),
                setting,
                against,
                goal,
                exact=True,
            )
    bare = _build(WITHOUT_COUNTING)
    yield Contest(
        bench="cost",
        metric="pump, with all counters",
        unit="instructions a frame",
        ours=functools.partial(_count, plain, BASE),
        peers={"without any": functools.partial(_count, bare, BASE)},
        better="lower",
        goals={"without any": 0.99},
        commands=(_words(plain, BASE, COUNTED_FRAMES),),
        exact=True,
    )


def _build(variant: toolchain.Variant) -> Path:
    try:
        return toolchain.build(variant, "core_cost", ("core_cost",), HERE)
    except toolchain.CompilationFailed as error:
        raise RuntimeError(f"core_cost.c does not compile:\n{error}") from error


def _contest(
    metric: str,
    unit: str,
    program: Path,
    measure: Callable[[Setting], float],
    setting: Setting,
    against: Setting,
    goal: float | None,
    exact: bool = False,
) -> Contest:
    differing = [name for name in Setting._fields if getattr(setting, name) != getattr(against, name)]
    other = ", ".join(f"{name} {getattr(against, name)}" for name in differing)
    return Contest(
        bench="cost",
        metric=metric,
        unit=unit,
        ours=functools.partial(measure, setting),
        peers={other: functools.partial(measure, against)},
        better="lower",
        goals={} if goal is None else {other: goal},
        commands=(_words(program, setting, TIMED_FRAMES),),
        exact=exact,
    )


def _words(program: Path, setting: Setting, frames: int) -> str:
    return " ".join([program.name, "steps", str(frames), *map(str, setting)])


def _run(*words: object) -> tuple[str, str]:
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout, done.stderr


def _steps(program: Path, setting: Setting, frames: int) -> list[float]:
    return [float(word) for word in _run(program, "steps", frames, *setting)[0].split()]


def _time(program: Path, setting: Setting) -> float:
    return _steps(program, setting, TIMED_FRAMES)[0]


@functools.cache
def _count(program: Path, setting: Setting) -> float:
    """Instructions of the pump a frame: of twice as many frames less those of once, so that beginnings do not count."""

    def collect(frames: int) -> int:
        valgrind = ("valgrind", "--tool=callgrind", "--toggle-collect=nb_pump_run", "--callgrind-out-file=/dev/null")
        said = _run(*valgrind, program, "steps", frames, *setting)[1]
        found = re.search(r"Collected *: *(\d+)", said)
        if found is None:
            raise RuntimeError(f"callgrind does not say what it collected: {said}")
        return int(found[1])

    return (collect(2 * COUNTED_FRAMES) - collect(COUNTED_FRAMES)) / COUNTED_FRAMES


def _share(program: Path, rate: float) -> tuple[float, float]:
    """The pump's thread: its share of a processor's time, and frames a second, at so many frames offered a second."""
    share, reached = _run(program, "load", round(rate), LOAD_MS)[0].split()
    return max(float(share), LEAST_SHARE), float(reached)


def _loads(program: Path) -> Iterator[Contest]:
    """At a part of the load that the pump can carry it should take no more than that part of the processor."""

    def full() -> tuple[float, float]:
        share, reached = _share(program, MOST_RATE)
        rates.append(reached)
        return share, reached

    rates: list[float] = []
    full()

    def at(part: float) -> float:
        return _share(program, part * rates[-1])[0]

    for part in (0.5, 0.1):
        in_proportion = functools.partial(lambda part: part * full()[0], part)
        name = f"{part:.0%} of what it takes at full load"
        yield Contest(
            bench="cost",
            metric=f"pump's share of a processor at {part:.0%} load",
            unit="of one",
            ours=functools.partial(at, part),
            peers={name: in_proportion},
            better="lower",
            commands=(f"{program.name} load RATE {LOAD_MS}",),
        )
    yield Contest(
        bench="cost",
        metric="pump's share of a processor when idle",
        unit="of one",
        ours=functools.partial(lambda: _share(program, 0)[0]),
        peers={"at full load": lambda: full()[0]},
        better="lower",
        goals={"at full load": 1000.0},
        commands=(f"{program.name} load 0 {LOAD_MS}",),
    )


def _memory(program: Path) -> Contest:
    """One run of many frames: what it held early on is the peer of what it holds in the end."""
    found: list[float] = []

    def late() -> float:
        found[:] = _steps(program, BASE, MANY_FRAMES)
        return found[2]

    return Contest(
        bench="cost",
        metric=f"memory after {MANY_FRAMES:.0e} frames",
        unit="KiB",
        ours=late,
        peers={"after a hundredth of them": lambda: found[1]},
        better="lower",
        goals={"after a hundredth of them": 1.0},
        commands=(_words(program, BASE, MANY_FRAMES),),
        exact=True,
    )
