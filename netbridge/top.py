"""`netbridge top`: what a driver does at this moment, from its counters page, which it reads from outside.

Rates are differences of two readings. A histogram is a small picture of what came in between: a column for each power
of two that there is anything in. Only metrics that the manifest lists are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import sys
import time

from netbridge import metrics
from netbridge.datapath._core import ffi
from netbridge.errors import ExitCode
from netbridge.vnode.metric_names import METRICS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_BARS = " ▁▂▃▄▅▆▇█"
_HOME, _TO_LINE_END, _TO_SCREEN_END = "\x1b[H", "\x1b[K", "\x1b[J"
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the other screen, without a cursor


class Reading:
    """The page at one moment."""

    def __init__(self, path: str) -> None:
        self.native = metrics.load(path)
        self.at = time.monotonic()
        self.plain = metrics.as_dict(self.native)
        self.listed = metrics.exported(self.native)


def rates(before: Reading, after: Reading) -> dict[str, Any]:
    """Of each listed metric: how much more it is, for each second; of histograms, what they hold more in each power of
    two, and the quantiles of that in nanoseconds."""
    seconds = max(after.at - before.at, 1e-9)
    found: dict[str, Any] = {"seconds": round(seconds, 3)}
    for metric in METRICS:
        name = metric.name
        if name not in after.listed:
            continue
        old, new = before.plain[name], after.plain[name]
        if name == "irq_latency_ns":
            found[name] = {
                stage: _latency(before.native.irq_latency_ns[i], after.native.irq_latency_ns[i])
                for i, stage in enumerate(metrics.LATENCY_STAGES)
            }
        elif name == "recovery_ns":
            found[name] = {"": _latency(before.native.recovery_ns, after.native.recovery_ns)}
        elif metric.kind == "histogram":
            found[name] = {label: new[label] - old[label] for label in new}
        elif isinstance(new, dict):
            found[name] = {label: round((new[label] - old[label]) / seconds, 1) for label in new}
        else:
            found[name] = round((new - old) / seconds, 1)
    return found


def _latency(before: Any, after: Any) -> dict[str, Any]:
    between = ffi.new("struct nb_histogram *")
    between.count = max(after.count - before.count, 0)
    between.sum_ns = max(after.sum_ns - before.sum_ns, 0)
    between.max_ns = after.max_ns
    for i, (old, new) in enumerate(zip(before.buckets, after.buckets, strict=True)):
        between.buckets[i] = max(new - old, 0)
    counts = [sum(between.buckets[i : i + 4]) for i in range(0, len(between.buckets), 4)]
    summary = metrics.summary(between)
    return {**{key: summary[key] for key in ("count", "mean", "p50", "p99")}, "powers_of_two": counts}


def picture(counts: list[int]) -> str:
    """A column for each count, from the first that is not 0 to the last; none is as low as nothing."""
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return ""
    shown = counts[filled[0] : filled[-1] + 1]
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // max(shown))] for count in shown)


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    shown = [f"{'':<26} {'a second':>14}"]
    for metric in METRICS:
        value = found.get(metric.name)
        if value is None:
            continue
        if metric.name in ("irq_latency_ns", "recovery_ns"):
            title = metric.name.removesuffix("_ns").replace("_", " ")
            for stage, numbers in value.items():
                times = "  ".join(f"{key} {numbers[key] / 1000:,.1f} µs" for key in ("p50", "p99"))
                counts = numbers["powers_of_two"]
                first = next((i for i, count in enumerate(counts) if count), 0)
                scale = f"from {(1 << first) / 1000:,.1f} µs, doubling" if numbers["count"] else "none"
                shown.append(f"{title + ' ' + stage:<26} {times:<32} {picture(counts)}  {scale}")
        elif metric.kind == "histogram":
            counts = list(value.values())
            shown.append(f"{metric.name:<26} {sum(counts):>14,}  {picture(counts)}  from 1, doubling")
        elif isinstance(value, dict):
            words = "  ".join(f"{label} {rate:,.1f}" for label, rate in value.items() if rate)
            shown.append(f"{metric.name:<26} {sum(value.values()):>14,.1f}  {words}")
        else:
            shown.append(f"{metric.name:<26} {value:>14,.1f}")
    return shown


def main(options: argparse.Namespace) -> int:
    """Shows until told to stop. Raises CountersUnreadable."""
    readable, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _show(options, readable)
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(readable)
        os.close(written)


def _show(options: argparse.Namespace, stop: int) -> int:
    before = Reading(options.counters)
    live = sys.stdout.isatty() and not options.json and not options.once
    if live:
        sys.stdout.write(_ENTER)
    try:
        while True:
            if select.select([stop], [], [], options.interval)[0]:
                return ExitCode.OK
            after = Reading(options.counters)
            found = rates(before, after)
            before = after
            if options.json:
                print(json.dumps(found), flush=True)
            elif live:
                size = shutil.get_terminal_size()
                page = [line[: size.columns] for line in lines(found)][: size.lines - 1]
                # Written over what is there, in one piece: nothing is blank in between.
                sys.stdout.write(_HOME + "".join(f"{line}{_TO_LINE_END}\r\n" for line in page) + _TO_SCREEN_END)
                sys.stdout.flush()
            else:
                print("\n".join(lines(found)), flush=True)
            if options.once:
                return ExitCode.OK
    finally:
        if live:
            sys.stdout.write(_LEAVE)
            sys.stdout.flush()
