"""docs/virtio.md and docs/vhost-user.md name no test, no file and no case of the C suite that is not there, and list
every feature."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from netbridge.virtio.features import FEATURES, REQUIRED, SUPPORTED
from tests.unit.test_security_docs import every_test

ROOT = Path(__file__).parents[2]
GUIDES = ("virtio.md", "vhost-user.md")


def words(guide: str) -> list[str]:
    """Everything in backquotes, without what is in blocks of code."""
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    return re.findall(r"`([^`\s]+)`", re.sub(r"(?ms)^```.*?^```$", "", text))


@pytest.mark.parametrize("guide", GUIDES)
def test_every_test_that_is_named_is_there(guide: str) -> None:
    there = set().union(*every_test().values()) | {
        name
        for path in (ROOT / "tests" / "guest").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = [word for word in words(guide) if word.startswith("test_") and not word.endswith(".py")]
    for word in named:
        pattern = word.partition("[")[0].replace("...", "*")
        assert any(fnmatchcase(test, pattern) for test in there), word
    assert named or guide != "virtio.md"


@pytest.mark.parametrize("guide", GUIDES)
def test_every_file_that_is_named_is_there(guide: str) -> None:
    for word in words(guide):
        if re.fullmatch(r"[\w/.-]+\.(py|c|h)", word):
            found = [path for top in ("tests", "netbridge", "qemu") for path in (ROOT / top).rglob(Path(word).name)]
            assert any(path.match(word) for path in found), word


def test_every_case_of_the_c_suite_that_is_named_is_there() -> None:
    text = (ROOT / "docs" / "virtio.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+\.c)`: ((?:`[\w*]+`(?:, )?)+)", text)
    assert len(named) > 5
    for file, cases in named:
        source = (ROOT / "tests" / "unit" / "core" / file).read_text(encoding="utf-8")
        there = re.findall(r"\w+", source)
        for case in re.findall(r"`([^`]+)`", cases):
            assert any(fnmatchcase(name, case) for name in there), f"{file}: {case}"


def test_every_feature_that_is_used_is_in_the_table() -> None:
    text = (ROOT / "docs" / "virtio.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z][A-Z0-9_, ]+) \| ([0-9, -]+) \| (.*) \|$", text, re.MULTILINE)
    listed = {name for names, _, _ in rows for name in names.split(", ")}
    assert listed == {item.name for item in SUPPORTED}
    for names, _, means in rows:
        required = {item.name for item in REQUIRED} & set(names.split(", "))
        assert bool(required) == means.startswith("required"), names
    assert {item.name for item in FEATURES} >= listed
