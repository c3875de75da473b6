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


# The counters that the core keeps (struct nb_counters), in their order.
METRICS: tuple[Metric, ...] = (
    Metric("packets_rx", "counter", "frames", "frames received from the device, also those dropped later"),
    Metric("packets_tx", "counter", "frames", "frames taken from the service that the device has sent"),
    Metric("bytes_rx", "counter", "bytes", "bytes of the received frames, without the virtio header"),
    Metric("bytes_tx", "counter", "bytes", "bytes of the sent frames, without the virtio header"),
    Metric("drops", "counter", "frames", "frames dropped, by reason"),
    Metric("refused_handles", "counter", "handles", "DMA handles of a client that were refused, by reason"),
    Metric("device_faults", "counter", "faults", "things the device did that no device may do, by kind"),
    Metric("sessions", "counter", "sessions", "client sessions begun"),
    Metric("resets", "counter", "resets", "device resets"),
    Metric("queue_resets", "counter", "resets", "resets of one queue while the others went on"),
    Metric("recoveries", "counter", "recoveries", "resets that the client's session went on over, by cause"),
    Metric("recoveries_failed", "counter", "recoveries", "device resets that ended the client's session"),
    Metric("link_changes", "counter", "changes", "times the device's link went up or down"),
    Metric("interrupts", "counter", "interrupts", "interrupts taken from the device"),
    Metric("wakeups_sent", "counter", "wake-ups", "doorbells rung for the client"),
    Metric("wakeups_suppressed", "counter", "wake-ups", "doorbells saved because the client was awake"),
    Metric("notifications_sent", "counter", "notifications", "doorbells rung for the device"),
    Metric("notifications_suppressed", "counter", "notifications", "doorbells saved because the device asked for none"),
    Metric("sleeps", "counter", "sleeps", "times the pump ran out of work and waited"),
    Metric("rx_bursts", "histogram", "frames", "frames received in one go"),
    Metric("tx_bursts", "histogram", "frames", "frames sent in one go"),
    Metric("irq_latency_ns", "histogram", "nanoseconds", "interrupt latency, by stage"),
    Metric("recovery_ns", "histogram", "nanoseconds", "from noticing that the device failed to frames flowing again"),
)

METRIC_NAMES: tuple[str, ...] = tuple(metric.name for metric in METRICS)
