"""The metrics a manifest may ask for by name: the one list that the checker, the JSON Schema and the exporter read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's name, its kind in Prometheus' terms, its unit, and what it tells."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    tells: str


METRICS: tuple[Metric, ...] = (
    Metric("packets_rx", "counter", "frames", "frames received from the device and handed to the service"),
    Metric("packets_tx", "counter", "frames", "frames taken from the service that the device has sent"),
    Metric("bytes_rx", "counter", "bytes", "bytes of those received frames, without the virtio header"),
    Metric("bytes_tx", "counter", "bytes", "bytes of those sent frames, without the virtio header"),
    Metric("drops", "counter", "frames", "frames dropped, by reason"),
    Metric("refused_handles", "counter", "handles", "DMA handles a client gave that were refused, by reason"),
    Metric(
        "refused_completions", "counter", "entries", "used-ring entries the device wrote that were refused, by reason"
    ),
    Metric("irq_latency_ns", "histogram", "nanoseconds", "interrupt latency, by stage"),
    Metric("interrupts", "counter", "interrupts", "interrupts taken from the device"),
    Metric("wakeups_sent", "counter", "wake-ups", "doorbells rung, by direction"),
    Metric(
        "wakeups_suppressed", "counter", "wake-ups", "doorbells saved because the other side was awake, by direction"
    ),
    Metric("batch_size", "histogram", "frames", "frames moved in one turn of the pump, by direction"),
    Metric("buffers", "gauge", "buffers", "buffers of the pool, by owner"),
    Metric("resets", "counter", "resets", "device resets, by cause"),
    Metric("sessions", "counter", "sessions", "client sessions begun"),
    Metric("iommu_faults", "counter", "faults", "DMA faults the IOMMU reported for the function"),
    Metric("link_up", "gauge", "boolean", "1 while the device reports its link up"),
)

METRIC_NAMES: tuple[str, ...] = tuple(metric.name for metric in METRICS)
