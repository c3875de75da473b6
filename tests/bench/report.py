"""What a run of benches found: as JSON for programs, as a table on the terminal, as pictures, and as a page to read.

`build/bench/report.json` is a list of rows (contest.Row), one for each metric and peer. A later run of one bench
replaces that bench's rows and leaves the others. `docs/performance.md` takes its figures from that file:

    python -m tests.bench.report        write the figures into docs/performance.md
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.bench.contest import Row

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "bench"
REPORT = OUT / "report.json"
MACHINE = OUT / "machine.json"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures: made by python -m tests.bench.report -->", "<!-- end of figures -->"


def load(path: Path = REPORT) -> list[Row]:
    """The rows of earlier runs; none where there was none."""
    if not path.exists():
        return []
    return [_row(record) for record in json.loads(path.read_text())]


def _row(record: dict[str, Any]) -> Row:
    as_tuples = {name: tuple(record[name]) for name in ("cache_line_ns", "commands")}
    return Row(**{**record, **as_tuples})


def merge(rows: Sequence[Row], path: Path = REPORT) -> list[Row]:
    """Puts the rows of this run in the place of the same benches' earlier ones, and writes the file."""
    measured = {row.bench for row in rows}
    merged = sorted([row for row in load(path) if row.bench not in measured] + list(rows), key=lambda row: row.bench)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps([row.as_dict() for row in merged], indent=1) + "\n")
    scratch.rename(path)
    return merged


def figure(value: float) -> str:
    """Three digits that count."""
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    if value >= 1e4:
        return f"{value / 1e3:.3g} k"
    return f"{value:.3g}"


def verdict(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"≥ {row.goal:g}" if row.reached else f"BELOW {row.goal:g}"


HEAD = ("metric", "unit", "ours", "peer", "", "ratio", "spread", "goal")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.metric,
        row.unit,
        figure(row.ours),
        figure(row.peer),
        row.peer_name,
        f"{row.ratio_median:.2f}",
        f"{row.ratio_min:.2f}–{row.ratio_max:.2f}",
        verdict(row),
    )


def table(rows: Iterable[Row]) -> str:
    """For a terminal, a block for each bench."""
    blocks = []
    for bench, group in groupby(rows, key=lambda row: row.bench):
        lines = [HEAD, *(_cells(row) for row in group)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
        body = [
            "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines
        ]
        blocks.append("\n".join([bench, *(line.rstrip() for line in body)]))
    return "\n\n".join(blocks)


def page(rows: Iterable[Row], machine: dict[str, Any]) -> str:
    """The same in Markdown, with the machine and the commands."""
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items())
    lines = [
        BEGIN,
        "",
        f"Machine: {facts}. A ratio above 1 means that Net-Bridge is ahead, whichever way the metric counts.",
    ]
    for bench, group in groupby(rows, key=lambda row: row.bench):
        members = list(group)
        near, far = min(row.cache_line_ns[0] for row in members), max(row.cache_line_ns[1] for row in members)
        lines += ["", f"### {bench}", ""]
        lines += [f"{members[0].rounds} rounds; a cache line took {near:.0f} to {far:.0f} ns one way meanwhile.", ""]
        lines += ["| " + " | ".join(HEAD) + " |", "|" + "-|" * len(HEAD)]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in members]
        commands = list(dict.fromkeys(command for row in members for command in row.commands))
        if commands:
            lines += ["", "```", *commands, "```"]
    return "\n".join([*lines, "", END])


def write_page(path: Path = PAGE) -> None:
    """Puts the figures between the two marks of the page; the rest of it is written by hand. Raises ValueError."""
    text = path.read_text()
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"{path} lacks the line {BEGIN!r} or {END!r}")
    machine = json.loads(MACHINE.read_text()) if MACHINE.exists() else {}
    path.write_text(before + page(load(), machine) + after)


def can_plot() -> bool:
    """Whether there is matplotlib."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(rows: Sequence[Row], directory: Path = OUT) -> list[Path]:
    """One SVG a bench: each metric's ratio to each peer with its spread, and the line at 1. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    pictures = []
    for bench, group in groupby(rows, key=lambda row: row.bench):
        members = list(group)[::-1]
        figure_, axes = pyplot.subplots(figsize=(9, 1.2 + 0.32 * len(members)), layout="constrained")
        middle = [row.ratio_median for row in members]
        spread = [
            [row.ratio_median - row.ratio_min for row in members],
            [row.ratio_max - row.ratio_median for row in members],
        ]
        colours = ["tab:green" if row.reached else "tab:red" for row in members]
        places = range(len(members))
        axes.barh(places, middle, color=colours, alpha=0.75)
        axes.errorbar(middle, places, xerr=spread, fmt="none", ecolor="black", capsize=3, linewidth=1)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_yticks(places, [f"{row.metric}  :  {row.peer_name}" for row in members])
        axes.set_xlabel("ratio to the peer; above 1: Net-Bridge is ahead")
        axes.set_title(bench)
        picture = directory / f"{bench.replace(' ', '-')}.svg"
        figure_.savefig(picture)
        pyplot.close(figure_)
        pictures.append(picture)
    return pictures


if __name__ == "__main__":
    try:
        write_page()
    except ValueError as error:
        sys.exit(f"report: {error}")
