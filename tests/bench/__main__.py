"""`make bench`: Net-Bridge beside its peers, on the same work, in the same run, in turns.

Prints a table of ratios with their spread, and leaves report.json, machine.json and a picture for each bench in
build/bench; no pictures without matplotlib, which `make bench` installs. A bench that cannot run here says why, and is
not counted as a success.
Exit codes: 0 everything ran; 1 something failed while it was measured; 2 the command line is wrong; 3 something could
not be measured here; 130 Ctrl-C. A goal that is missed changes none of them: it is marked in the table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence

from tests.bench import machine, report
from tests.bench.contest import LEAST_ROUNDS, Contest, Row, Series, Unavailable
from tests.bench.native import CompilationFailed

BENCHES = ("vhost", "port", "guest", "whole", "tcp", "cost", "harness")
"""Modules of this package. Each has `SUMMARY`, a line, and `contests(quick)`, which yields contests one by one,
may keep a guest or a peer running between them, and raises Unavailable where it cannot go on."""
QUICK = ("vhost", "port")  # a guest takes minutes
ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    known = {name: importlib.import_module(f"{__package__}.{name}") for name in BENCHES}
    listing = "\n".join(f"  {name:<8} {module.SUMMARY}" for name, module in known.items())
    parser = argparse.ArgumentParser(
        prog="make bench",
        description=__doc__,
        epilog=f"benches:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "benches", nargs="*", metavar="BENCH", help=f"which (default: all; with --quick {' and '.join(QUICK)})"
    )
    parser.add_argument("--quick", action="store_true", help="fewer metrics: two minutes in all")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}")
    parser.add_argument("--only", metavar="TEXT", default="", help="metrics with this in their name; report.json stays")
    parser.add_argument("--json", action="store_true", help="print this run's rows instead of the table")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.benches if name not in known]
    if unknown:
        parser.error(f"no bench is called {unknown[0]!r}; there are {', '.join(known)}")
    rounds = options.rounds or ROUNDS
    if rounds < LEAST_ROUNDS:
        parser.error(f"--rounds {rounds}: a spread wants at least {LEAST_ROUNDS}")

    if not report.can_plot():
        print("bench: no pictures will be drawn: matplotlib is missing, which make bench installs", file=sys.stderr)
    machine.claim_processors()
    report.OUT.mkdir(parents=True, exist_ok=True)
    report.MACHINE.write_text(json.dumps(machine.describe(), indent=1) + "\n")
    rows: list[Row] = []
    missing: list[str] = []
    failed: list[str] = []
    try:
        for name in options.benches or (QUICK if options.quick else BENCHES):
            try:
                for contest in known[name].contests(options.quick):
                    if options.only in contest.metric:
                        rows += _run(contest, rounds)
            except Unavailable as reason:
                missing.append(f"{name}: {reason}")
            except (CompilationFailed, OSError, RuntimeError, ValueError) as error:
                failed.append(f"{name}: {error}")
    except KeyboardInterrupt:
        print("\nbench: interrupted; what was measured by then is reported", file=sys.stderr)
        _finish(rows, options.json, keep=not options.only)
        return 130
    _finish(rows, options.json, keep=not options.only)
    for line in failed:
        print(f"bench: FAILED: {line}", file=sys.stderr)
    for line in missing:
        print(f"bench: not measured: {line}", file=sys.stderr)
    return 1 if failed else 3 if missing else 0


def _run(contest: Contest | Series, rounds: int) -> list[Row]:
    label = f"{contest.bench}: {contest.metric}"
    began = time.monotonic()
    _say(f"{label}: warming up")

    def on_round(number: int, who: str, figure: float) -> None:
        _say(f"{label}: round {number + 1} of {rounds}, {who} {report.figure(figure)} {contest.unit}")

    rows = contest.run(rounds, on_round)
    for row in rows:
        ratio = f"{row.ratio_median:.2f} ({row.ratio_min:.2f}–{row.ratio_max:.2f})"
        _say(f"{row.bench}: {row.metric}: {ratio} × {row.peer_name}, in {time.monotonic() - began:.0f} s", stays=True)
    return rows


def _say(text: str, stays: bool = False) -> None:
    """On a terminal, progress is one line that changes; elsewhere, only what stays is printed."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if stays else "", file=sys.stderr, flush=True)
    elif stays:
        print(text, file=sys.stderr, flush=True)


def _finish(rows: list[Row], as_json: bool, keep: bool) -> None:
    if not rows:
        return
    if keep:
        report.merge(rows)
    if as_json:
        print(json.dumps([row.as_dict() for row in rows], indent=1))
    else:
        print(f"\n{report.table(rows)}\n\n{report.REPORT}")
    if report.can_plot():
        for picture in report.plot(rows):
            print(picture, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
