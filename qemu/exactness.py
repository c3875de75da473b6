"""Frames that came against those that were to come: what is missing, extra, doubled or displaced, as scapy shows it."""

from __future__ import annotations

import collections
import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from scapy.layers.l2 import Ether
from scapy.packet import Packet

from qemu.inbox import Frame

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


class Endpoint(Protocol):
    """What a wire has to have for exactness to be demanded of it."""

    name: str

    def take(self, timeout: float | None = 0.0) -> list[Frame]: ...

    def transmit(self, data: bytes, timeout: float) -> int: ...


class Exactness:
    """Demands exactly the frames that were to come, of the wire that inherits this."""

    def exchange(
        self: Endpoint,
        frames: Iterable[bytes | Packet],
        *,
        reply: Callable[[bytes], bytes] = lambda frame: frame,
        window: int = 32,
        timeout: float = 5.0,
        ignore: Callable[[bytes], bool] = lambda _: False,
        flow: Callable[[bytes], object] = lambda _: None,
        progress: Callable[[Exchange], None] | None = None,
    ) -> Exchange:
        """Send frames, at most `window` of them unanswered at any moment, and match what comes back.

        `reply` tells what the answer to a frame has to be. Ends when everything is answered or when no answer came
        for `timeout` seconds. Frames for which `ignore` is true do not count. Answers keep their order when they are of
        one `flow`: all are, unless it says otherwise. Never raises on a difference: see Exchange.check(). An extra
        frame that comes after the last answer is found by the next call, so end with a call that matters little, or
        with expect([]).
        """
        outcome = Exchange()
        due: dict[bytes, collections.deque[tuple[int, int]]] = {}
        answered: set[bytes] = set()
        outstanding = 0
        latest: dict[object, int] = {}
        source = iter(frames)
        more = True
        began = progressed = time.monotonic()
        while more or outstanding:
            while more and outstanding < window:
                frame = next(source, None)
                if frame is None:
                    more = False
                    break
                data = frame if isinstance(frame, bytes) else bytes(frame)
                at = self.transmit(data, timeout)
                due.setdefault(reply(data), collections.deque()).append((outcome.sent, at))
                outcome.sent += 1
                outstanding += 1
            if not outstanding:
                break
            came = self.take(max(0.0, progressed + timeout - time.monotonic()))
            if not came:
                break
            for data, at in came:
                if expected := due.get(data):
                    index, sent_at = expected.popleft()
                    if not expected:
                        del due[data]
                    answered.add(data)
                    outstanding -= 1
                    outcome.received += 1
                    outcome.rtt_ns.append(at - sent_at)
                    last = latest.get(of := flow(data), -1)
                    outcome.reordered += index < last
                    latest[of] = max(last, index)
                    progressed = time.monotonic()
                elif ignore(data):
                    continue
                else:
                    (outcome.twice if data in answered else outcome.extra).append(data)
            if progress is not None:
                progress(outcome)
        outcome.lost = [data for data, waiting in due.items() for _ in waiting]
        outcome.seconds = time.monotonic() - began
        return outcome

    def expect(
        self: Endpoint,
        frames: Iterable[bytes | Packet],
        *,
        timeout: float = 5.0,
        ordered: bool = True,
        until: bytes | Packet | None = None,
        ignore: Callable[[bytes], bool] = lambda _: False,
    ) -> list[Frame]:
        """Wait for exactly these frames and return them as they came; raise WireMismatch on any difference.

        A missing, extra, doubled or (if `ordered`) displaced frame is a difference. Without `until` it returns as
        soon as as many frames are there, and does not see an extra one behind them; with `until`, a sentinel that
        is sent last on the other side, it reads up to that one, which closes the account without waiting for
        silence. Frames for which `ignore` is true do not count.
        """
        wanted = [bytes(frame) for frame in frames]
        sentinel = bytes(until) if until is not None else None
        came: list[Frame] = []
        deadline = time.monotonic() + timeout
        closed = False
        while not closed and (sentinel is not None or len(came) < len(wanted)):
            batch = self.take(max(0.0, deadline - time.monotonic()))
            if not batch:
                break
            for frame in batch:
                if frame.data == sentinel:
                    closed = True
                elif not ignore(frame.data):
                    came.append(frame)
        came += [frame for frame in self.take() if not ignore(frame.data)]
        got = [frame.data for frame in came]
        difference = compare(wanted, got, ordered)
        open_ended = sentinel is not None and not closed
        if difference is None and not open_ended:
            return came
        counts, lines = difference or ("all of them", [])
        head = f"{self.name}: {len(wanted)} frames expected, {len(got)} came within {timeout:g} s: {counts}"
        if open_ended:
            head += "; the sentinel that was to close the account did not come"
        raise WireMismatch("\n".join((head, *lines)))
