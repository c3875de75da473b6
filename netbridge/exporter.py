"""`netbridge exporter`: a driver's counters for Prometheus, over HTTP or in a text file for the node exporter.

A process of its own that reads the counters page from outside, anew for each scrape, and exports exactly the metrics
that the driver's manifest lists under `observability.metrics`. While no driver runs, `netbridge_up` is 0 and
stands alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from netbridge import metrics
from netbridge.errors import ExitCode, NetbridgeError, UsageError
from netbridge.vnode.metric_names import METRICS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PREFIX = "netbridge_"
# The label of what an array counts by.
_LABELS = {
    "drops": "reason",
    "refused_handles": "reason",
    "device_faults": "kind",
    "recoveries": "cause",
    "irq_latency_ns": "stage",
}
_QUARTERS = 4  # buckets of a histogram that are one here: a power of two


class Collector:
    """What prometheus_client asks for the state of things."""

    def __init__(self, path: str) -> None:
        self._path = path

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        try:
            counters = metrics.load(self._path)
        except metrics.CountersUnreadable:
            counters = None
        yield GaugeMetricFamily(f"{PREFIX}up", "whether there is a driver to ask", value=counters is not None)
        if counters is None:
            return
        plain, listed = metrics.as_dict(counters), metrics.exported(counters)
        for metric in METRICS:
            if metric.name not in listed:
                continue
            name, label = PREFIX + metric.name, _LABELS.get(metric.name)
            labels = [label] if label else []
            if metric.kind == "histogram":
                histogram = HistogramMetricFamily(name, metric.tells, labels=labels)
                for value, buckets, total in _histograms(metric.name, counters):
                    histogram.add_metric([value] if label else [], buckets, total)
                yield histogram
            else:
                counter = CounterMetricFamily(name, metric.tells, labels=labels)
                values = plain[metric.name]
                for value, count in (values if label else {"": values}).items():
                    counter.add_metric([value] if label else [], count)
                yield counter


def _histograms(name: str, counters: Any) -> Iterator[tuple[str, list[tuple[str, int]], int | None]]:
    """(label, cumulated buckets, sum) of each histogram of this name; a sum of None is not known."""
    value = getattr(counters, name)
    if name in ("irq_latency_ns", "recovery_ns"):
        several = zip(metrics.LATENCY_STAGES, value, strict=True) if name in _LABELS else [("", value)]
        for stage, histogram in several:
            ends = [metrics.bucket_end(bucket) for bucket in range(len(histogram.buckets))]
            yield stage, _cumulated(list(histogram.buckets), ends, _QUARTERS), int(histogram.sum_ns)
    else:
        yield "", _cumulated(list(value), [(2 << i) - 1 for i in range(len(value))], 1), None


def _cumulated(counts: list[int], ends: list[int], step: int) -> list[tuple[str, int]]:
    """Prometheus' buckets, `step` of ours in each; the last one is without end."""
    last = range(step - 1, len(counts) - 1, step)
    # By upper end: below 8, where values are too small for quarters, there are buckets that nothing is ever put in.
    sums = {ends[i]: sum(counts[: i + 1]) for i in last}
    return [*((str(end), count) for end, count in sums.items()), ("+Inf", sum(counts))]


def main(options: argparse.Namespace) -> int:
    """Exports until told to stop; once, with --print or --textfile. Returns the exit code."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest, write_to_textfile
    except ImportError:
        raise NetbridgeError("prometheus_client is missing: pip install 'netbridge[exporter]'") from None
    registry = CollectorRegistry()
    registry.register(Collector(options.counters))
    if options.print:
        sys.stdout.write(generate_latest(registry).decode())
        return ExitCode.OK
    if options.textfile:
        try:
            write_to_textfile(options.textfile, registry)
        except OSError as error:
            raise UsageError(f"cannot write {options.textfile}: {error.strerror}") from None
        return ExitCode.OK
    host, _, port = options.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--listen {options.listen}: expected ADDRESS:PORT, such as 127.0.0.1:9117")
    # They wait for whoever waits below, and end nothing by themselves.
    stopping = (signal.SIGTERM, signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    try:
        return _serve(options.listen, host.strip("[]"), int(port), registry, stopping)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(listen: str, host: str, port: int, registry: Any, stopping: tuple[int, ...]) -> int:
    """Serves until one of these signals, which are blocked, comes."""
    from prometheus_client import start_http_server

    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise UsageError(f"cannot listen at {listen}: {error.strerror or os.strerror(error.errno or 0)}") from None
    print(f"http://{host}:{server.server_port}/metrics", flush=True)
    number = signal.sigwait(stopping)
    server.shutdown()
    server.server_close()
    thread.join()
    return ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.OK
