"""docs/security.md promises nothing without a test, and names no test that is not there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = re.sub(r"(?ms)^```.*?^```$", "", (ROOT / "docs" / "security.md").read_text(encoding="utf-8"))
PROMISES = "## What is promised"


def every_test() -> dict[str, set[str]]:
    """The tests of each file, by its path under tests/."""
    return {
        str(path.relative_to(ROOT / "tests")): {
            node.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        for path in (ROOT / "tests").glob("*/test_*.py")
    }


def promises() -> list[list[str]]:
    """The rows of the tables of promises, cell by cell."""
    chapters = [chapter for chapter in GUIDE.split("\n## ") if chapter.startswith(PROMISES.removeprefix("## "))]
    lines = [line for chapter in chapters for line in chapter.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "promise"]


def named(text: str) -> list[str]:
    """Everything in backquotes that means a test or a file of tests; `unit/test_port_*.py` means all such files."""
    return [word for word in re.findall(r"`([^`]+)`", text) if re.search(r"\btest_\w", word)]


def test_every_promise_names_a_test() -> None:
    rows = promises()
    assert len(rows) > 20
    for row in rows:
        assert named(row[-1]) or row[-1] == "the same", row[0]


def test_every_test_that_is_named_is_there() -> None:
    there = every_test()
    every = set().union(*there.values())
    assert len(named(GUIDE)) > 20
    for word in named(GUIDE):
        file, _, test = word.rpartition("::") if "::" in word else (word, "", "") if "/" in word else ("", "", word)
        files = [path for path in there if Path(path).match(file)] if file else list(there)
        assert files, f"{word}: there is no such file"
        assert not test or test in (set().union(*(there[path] for path in files)) if file else every), word
