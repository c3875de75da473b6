"""Frames that came against those that were to come: what is missing, extra, doubled or displaced, as scapy shows it."""

from __future__ import annotations

import collections
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from scapy.layers.l2 import Ether

SHOWN = 4
"""Frames of each kind that a report of a mismatch shows in full."""


class WireMismatch(AssertionError):
    """The frames that came are not those that were to come; the message shows the difference."""


@dataclass
class Exchange:
    """What became of frames that were to be answered, one reply each."""

    sent: int = 0
    received: int = 0
    lost: list[bytes] = field(default_factory=list)
    """Replies that did not come."""
    extra: list[bytes] = field(default_factory=list)
    """Frames that answer nothing that was sent."""
    twice: list[bytes] = field(default_factory=list)
    """Replies that came once more than they were due."""
    reordered: int = 0
    """Replies that came after the reply to a frame of the same flow that was sent later."""
    rtt_ns: list[int] = field(default_factory=list)
    """Round-trip time of each reply, as this process saw it."""
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        return not (self.lost or self.extra or self.twice)

    def check(self, ordered: bool = True) -> None:
        """Raise WireMismatch unless every reply came, once, and nothing else did."""
        if not self.exact or (ordered and self.reordered):
            head = (
                f"{self.sent} frames sent, {self.received} came back: {len(self.lost)} lost, {len(self.extra)} extra, "
                f"{len(self.twice)} twice, {self.reordered} out of order"
            )
            raise WireMismatch("\n".join((head, *describe(self.lost, self.extra, self.twice))))


def compare(wanted: Sequence[bytes], got: Sequence[bytes], ordered: bool) -> tuple[str, list[str]] | None:
    """What differs, in a few words and in lines that show it; None when nothing does."""
    missing = list((collections.Counter(wanted) - collections.Counter(got)).elements())
    surplus = list((collections.Counter(got) - collections.Counter(wanted)).elements())
    known = set(wanted)
    extra = [data for data in surplus if data not in known]
    twice = [data for data in surplus if data in known]
    counts = f"{len(missing)} missing, {len(extra)} extra, {len(twice)} twice"
    if missing or surplus:
        return counts, describe(missing, extra, twice)
    if not ordered or wanted == got:
        return None
    at = next(n for n, pair in enumerate(zip(wanted, got, strict=True)) if pair[0] != pair[1])
    first = f"the order differs from frame {at} on:"
    return counts, [first, f"  expected {summary(wanted[at])}", f"  came     {summary(got[at])}"]


def summary(data: bytes) -> str:
    return f"{Ether(data).summary()} ({len(data)} bytes)" if data else "an empty frame"


def describe(missing: Sequence[bytes], extra: Sequence[bytes], twice: Sequence[bytes]) -> list[str]:
    """Lines that show the difference; where a missing and an extra frame are nearly alike, what differs in them."""
    lines = []
    strangers = list(extra)
    for kind, frames in (("missing", missing), ("extra", extra), ("twice", twice)):
        lines += [f"{kind}: {summary(data)}" for data in frames[:SHOWN]]
        if len(frames) > SHOWN:
            lines.append(f"{kind}: … and {len(frames) - SHOWN} more")
    for data in missing[:SHOWN]:
        alike = [(difflib.SequenceMatcher(None, data, other).ratio(), other) for other in strangers[: 4 * SHOWN]]
        likeness, other = max(alike, default=(0.0, b""))
        if likeness > 0.6:
            strangers.remove(other)
            lines.append("one missing frame is much like one extra frame; expected (-), came (+):")
            lines += difference(data, other)
    return lines


def difference(expected: bytes, came: bytes) -> list[str]:
    """What differs in two frames, field by field as scapy shows them."""
    before, after = (Ether(data).show(dump=True).splitlines() for data in (expected, came))
    lines = list(difflib.unified_diff(before, after, lineterm="", n=1))
    return ["  " + line for line in lines[2:]]  # without the two lines that would name the files
