"""How long to pause before something that keeps failing is tried again."""

from __future__ import annotations


class Backoff:
    """How long to wait before a driver is started again, in seconds: twice as long each time, up to `most`, and from
    the beginning after one that ran for `calm` seconds."""

    def __init__(self, first: float = 0.1, most: float = 10.0, calm: float = 30.0) -> None:
        self.first, self.most, self.calm = first, most, calm
        self._next = first

    def after(self, ran: float) -> float:
        """The pause after a driver that ran for so many seconds."""
        if ran >= self.calm:
            self._next = self.first
        pause = self._next
        self._next = min(pause * 2, self.most)
        return pause
