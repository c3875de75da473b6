"""Reads TOML files so that whoever wrote one learns what is wrong with it: which file, which key, what was expected.

A Table hands out each key once, checked; `finish` then refuses the keys that nobody asked for, because a misspelt
key that is silently ignored costs an afternoon.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from qemu.errors import RecipeError

T = TypeVar("T")

KINDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number", list: "a list", dict: "a table"}


def read_toml(path: Path) -> Table:
    """The file's top table. Raises RecipeError when it cannot be read or is not TOML."""
    try:
        return Table(path, "", tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; what there is: {_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None


def _neighbours(path: Path) -> str:
    found = sorted(str(other) for other in path.parent.glob("*.toml"))
    return ", ".join(found) if found else f"no .toml file in {path.parent}"


class Table:
    """One table of a TOML file. Every method raises RecipeError when the value is not what it asks for."""

    def __init__(self, path: Path, prefix: str, values: dict[str, Any]):
        self.path = path
        self._prefix = prefix
        self._values = values
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there; that alone does not make it one that was asked for."""
        return key in self._values

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Refuse the value of `key`: `expected` says what it should have been."""
        where = f"{self.path}: {self._prefix}{key}"
        if key not in self._values:
            raise RecipeError(f"{where}: missing; expected {expected}")
        raise RecipeError(f"{where}: expected {expected}, found {self._found(self._values[key])}")

    @staticmethod
    def _found(value: object) -> str:
        text = repr(value)
        return f"{KINDS.get(type(value), 'something else')}: {text if len(text) <= 60 else text[:57] + '...'}"

    def _get(self, key: str, kind: type[T], expected: str, default: T | None) -> T:
        self._asked.add(key)
        if key not in self._values and default is not None:
            return default
        value = self._values.get(key)
        # bool is an int to Python, and is not one to whoever writes a recipe.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse(key, expected)
        return value

    def string(self, key: str, expected: str, *, default: str | None = None, valid: Callable[[str], Any] = bool) -> str:
        """A string for which `valid` holds; `expected` describes it, with an example where that helps."""
        value = self._get(key, str, expected, default)
        if not valid(value):
            self.refuse(key, expected)
        return value

    def integer(self, key: str, expected: str, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        value = self._get(key, int, expected, None)
        if not low <= value <= high:
            self.refuse(key, expected)
        return value

    def strings(
        self,
        key: str,
        expected: str,
        *,
        default: tuple[str, ...] | None = None,
        valid: Callable[[str], Any] = bool,
        repeated: bool = False,
    ) -> tuple[str, ...]:
        """A list of strings for each of which `valid` holds; none twice, unless they may be repeated."""
        values = self._get(key, list, expected, None if default is None else list(default))
        for value in values:
            if not isinstance(value, str) or not valid(value):
                raise RecipeError(f"{self.path}: {self._prefix}{key}: expected {expected}, found {self._found(value)}")
            if not repeated and values.count(value) > 1:
                raise RecipeError(f"{self.path}: {self._prefix}{key}: {value!r} is there {values.count(value)} times")
        return tuple(values)

    def table(self, key: str, expected: str) -> Table:
        """The table below `key`."""
        return Table(self.path, f"{self._prefix}{key}.", self._get(key, dict, expected, None))

    def tables(self, key: str, expected: str) -> list[Table]:
        """The tables of an array of tables, which may be missing."""
        values = self._get(key, list, expected, [])
        if not all(isinstance(value, dict) for value in values):
            self.refuse(key, expected)
        return [Table(self.path, f"{self._prefix}{key}[{n}].", value) for n, value in enumerate(values)]

    def finish(self) -> None:
        """Refuse the keys that no one asked for."""
        for key in sorted(self._values.keys() - self._asked):
            like = difflib.get_close_matches(key, self._asked, n=1)
            hint = f"did you mean {like[0]!r}?" if like else f"known here: {', '.join(sorted(self._asked))}"
            raise RecipeError(f"{self.path}: {self._prefix}{key}: unknown key; {hint}")
