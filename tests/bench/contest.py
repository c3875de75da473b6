"""Two or more doing the same work in turns, and what came of it as ratios.

A machine like a developer's changes its speed under one's hands, so an absolute figure says little and two figures
from two runs say nothing. Here each round lets everybody do the work once, in an order that turns, and a ratio is taken
within the round. What is reported is the median of the ratios and their spread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tests.bench import machine

Better = Literal["higher", "lower"]
Work = Callable[[], float]
"""Does the work once and returns the figure, in the metric's unit."""

LEAST_ROUNDS = 5
"""Fewer are for trying things out: a median of less says nothing of the spread."""


class Unavailable(Exception):
    """This cannot be measured here; the message says why and, where one can, what to do about it."""


@dataclass(frozen=True)
class Row:
    """We and one peer. `ratio_*` are above 1 where we are ahead, whichever way the metric counts."""

    bench: str
    metric: str
    unit: str
    better: Better
    ours: float
    peer: float
    peer_name: str
    ratio_median: float
    ratio_min: float
    ratio_max: float
    rounds: int
    goal: float | None
    """The ratio that is asked for; None where a figure is only told."""
    cache_line_ns: tuple[float, float]
    """One-way time of a cache line between two processors, the least and the most seen meanwhile: see machine.py."""
    commands: tuple[str, ...] = ()

    @property
    def reached(self) -> bool:
        return self.goal is None or self.ratio_median >= self.goal

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Contest:
    """One metric of one bench: ours against each peer. `commands` are what a reader would type to see it again."""

    bench: str
    metric: str
    unit: str
    ours: Work
    peers: Mapping[str, Work]
    better: Better = "higher"
    goals: Mapping[str, float] = field(default_factory=dict)
    commands: Sequence[str] = ()
    exact: bool = False
    """The same figure however often it is taken: so it is taken once, ours first."""

    def run(self, rounds: int, on_round: Callable[[int, str, float], None] = lambda *_: None) -> list[Row]:
        """A warm-up of each that does not count, then `rounds` rounds; `on_round` is told (round, who, figure)."""
        if not self.peers:
            raise Unavailable("no peer can be had here, and a figure without one is not reported")
        contestants = {"": self.ours, **self.peers}
        rounds = 1 if self.exact else rounds
        for work in () if self.exact else contestants.values():
            work()
        figures: dict[str, list[float]] = {name: [] for name in contestants}
        states = [machine.cache_line_ns()]
        for number in range(rounds):
            for name in _turned(list(contestants), number):
                figure = contestants[name]()
                if not figure > 0:
                    raise ValueError(f"{self.bench}, {self.metric}: {name or 'ours'} measured {figure} {self.unit}")
                figures[name].append(figure)
                on_round(number, name or "Net-Bridge", figure)
            states.append(machine.cache_line_ns())
        return [self._row(name, figures[""], figures[name], states) for name in self.peers]

    def _row(self, name: str, ours: list[float], peer: list[float], states: list[float]) -> Row:
        pairs = zip(ours, peer, strict=True)
        ratios = [mine / theirs if self.better == "higher" else theirs / mine for mine, theirs in pairs]
        return Row(
            bench=self.bench,
            metric=self.metric,
            unit=self.unit,
            better=self.better,
            ours=statistics.median(ours),
            peer=statistics.median(peer),
            peer_name=name,
            ratio_median=statistics.median(ratios),
            ratio_min=min(ratios),
            ratio_max=max(ratios),
            rounds=len(ratios),
            goal=self.goals.get(name),
            cache_line_ns=(min(states), max(states)),
            commands=tuple(self.commands),
        )


def _turned(names: list[str], number: int) -> Iterator[str]:
    """Every round somebody else begins, so that nobody always runs on a processor that is warm, or tired."""
    start = number % len(names)
    yield from names[start:] + names[:start]


@dataclass(frozen=True)
class Pair:
    """A row that a Series is to have: one figure of ours against the same of a peer's."""

    metric: str
    unit: str
    figure: str
    """The key of what both have measured."""
    ours: str
    peer: str
    better: Better = "higher"
    goal: float | None = None


@dataclass
class Series:
    """Several metrics at once, for contestants that take longer to get to work than to be measured: a visit to one
    returns all its figures. Ratios are taken within a round, as in a Contest. A figure that a contestant does not have
    makes no row."""

    bench: str
    visits: Mapping[str, Callable[[], Mapping[str, float]]]
    pairs: Sequence[Pair]
    commands: Sequence[str] = ()
    absent: dict[str, str] = field(default_factory=dict)
    """After `run`: who could not do the work when it was first asked to, and why. There are no rows of theirs."""

    metric = "all metrics in turns"
    unit = "(the first of them)"

    def run(self, rounds: int, on_round: Callable[[int, str, float], None] = lambda *_: None) -> list[Row]:
        """As Contest.run. The warm-up is left out: each visit settles before it is measured."""
        if len(self.visits) < 2:
            raise Unavailable("no peer can be had here, and a figure without one is not reported")
        figures: dict[str, list[Mapping[str, float]]] = {name: [] for name in self.visits}
        states = [machine.cache_line_ns()]
        for number in range(rounds):
            for name in _turned([name for name in self.visits if name not in self.absent], number):
                try:
                    found = self.visits[name]()
                except RuntimeError as error:
                    if number > 0:
                        raise
                    self.absent[name] = str(error)
                    continue
                if wrong := [key for key, value in found.items() if not value > 0]:
                    raise ValueError(f"{self.bench}: {name} measured {wrong[0]} as {found[wrong[0]]}")
                figures[name].append(found)
                on_round(number, name, next(iter(found.values())))
            if len(self.visits) - len(self.absent) < 2:
                raise Unavailable("; ".join(f"{name}: {why}" for name, why in self.absent.items()))
            states.append(machine.cache_line_ns())
        rows = []
        for pair in self.pairs:
            if pair.ours in self.absent or pair.peer in self.absent:
                continue
            sides = [figures.get(name, [{}]) for name in (pair.ours, pair.peer)]
            if all(pair.figure in found for side in sides for found in side):
                ours, peer = ([found[pair.figure] for found in side] for side in sides)
                goals = {} if pair.goal is None else {pair.peer: pair.goal}
                contest = Contest(
                    self.bench, pair.metric, pair.unit, lambda: 0.0, {}, pair.better, goals, self.commands
                )
                rows.append(contest._row(pair.peer, ours, peer, states))
        return rows
