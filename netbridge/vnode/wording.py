"""How a manifest's problems are put into words: what was found, what was expected, and which name was perhaps meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass

MOST = 50  # problems told at once; more help nobody


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a manifest, and where. Lines and columns count from 1, as editors do."""

    line: int | None
    column: int | None
    key: str  # the path of keys that leads there, such as "runtime.required_mem_mb"; "" for the file as a whole
    what: str
    expected: str | None = None
    suggestion: str | None = None

    def __str__(self) -> str:
        text = f"{self.key}: {self.what}" if self.key else self.what
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.suggestion is not None:
            text += f"; did you mean {self.suggestion}?"
        return text

    def as_dict(self) -> dict[str, object]:
        """The same for machines."""
        return asdict(self)


class Problems:
    """Collects problems, up to MOST of them; `sorted()` has them in the order of the file."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self._untold = 0

    def add(
        self, place: tuple[int, int], key: str, what: str, expected: str | None = None, suggestion: str | None = None
    ) -> None:
        """Take in one problem."""
        if len(self._problems) < MOST:
            self._problems.append(Problem(*place, key, what, expected, suggestion))
        else:
            self._untold += 1

    def sorted(self) -> tuple[Problem, ...]:
        """All of them by line and column; at the end one that says how many more there are, if there are."""
        told = sorted(self._problems, key=lambda problem: (problem.line or 0, problem.column or 0))
        if self._untold:
            told.append(Problem(None, None, "", f"and {self._untold} more problems"))
        return tuple(told)

    def __len__(self) -> int:
        return len(self._problems) + self._untold


def show(text: str, longest: int = 60) -> str:
    """A value from the file in quotes, safe to print: escaped, one line, not longer than a message can bear."""
    shown = text if len(text) <= longest else text[: longest - 3]
    escaped = "".join(c if c.isprintable() and c not in '"\\' else _escape(c) for c in shown)
    return f'"{escaped}"' if shown is text else f'"{escaped}..."'


def _escape(character: str) -> str:
    return "\\" + character if character in '"\\' else character.encode("unicode_escape").decode("ascii")


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The known name that is most like `word`, or None when none is. Case and an omitted CAP_ make no difference."""
    if len(word) > 64:
        return None
    folded = word.strip().casefold().replace("-", "_")
    best, found = 0.6, None
    for name in names:
        for candidate in (folded, f"cap_{folded}"):
            likeness = difflib.SequenceMatcher(None, candidate, name.casefold()).ratio()
            if likeness > best:
                best, found = likeness, name
    return found


def listing(names: Iterable[str], last: str = "or") -> str:
    """Names as a sentence has them: "a, b or c"."""
    words = list(names)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
