"""Fragments of a Linux kernel's configuration: files such as images/iommufd.config, read, laid over each other, and
compared with what the kernel's own tools made of them.

The kernel drops a wish that cannot be fulfilled, for want of something it depends on, without a word. What came of
every wish is looked at here, so that nobody finds out in a guest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from qemu.errors import RecipeError

SET = re.compile(r'CONFIG_([A-Za-z0-9_]+)=(y|m|n|-?\d+|0x[0-9A-Fa-f]+|"(?:[^"\\]|\\.)*")')
NOT_SET = re.compile(r"# CONFIG_([A-Za-z0-9_]+) is not set")
BARE = re.compile(r"(#\s*)?CONFIG_")


def read_fragment(path: Path) -> dict[str, str]:
    """The options of a fragment, by their names without CONFIG_: y, m, n, a number, or a string with its quotes.

    Raises RecipeError, naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = ", ".join(sorted(str(other) for other in path.parent.glob("*.config"))) or "no .config file there"
        raise RecipeError(f"{path}: no such file; what there is: {there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    options: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        found = _option(line.strip())
        if found is None:
            if BARE.match(line.strip()) or (line.strip() and not line.strip().startswith("#")):
                raise RecipeError(
                    f"{path}:{number}: expected CONFIG_NAME=value or # CONFIG_NAME is not set, found {line.strip()!r}"
                )
            continue
        name, value = found
        if name in options:
            raise RecipeError(f"{path}:{number}: CONFIG_{name} is there a second time")
        options[name] = value
    return options


def _option(line: str) -> tuple[str, str] | None:
    if match := SET.fullmatch(line):
        return match[1], match[2]
    if match := NOT_SET.fullmatch(line):
        return match[1], "n"
    return None


def render(options: Mapping[str, str]) -> str:
    """The options as a file that the kernel's tools read."""
    return "".join(
        f"# CONFIG_{name} is not set\n" if value == "n" else f"CONFIG_{name}={value}\n"
        for name, value in options.items()
    )


def unfulfilled(options: Mapping[str, str], config: str) -> list[str]:
    """Which of the options are not as wished in the text of a .config; a line for each, with what it became."""
    became = dict(found for line in config.splitlines() if (found := _option(line)) is not None)
    return [
        f"CONFIG_{name}: {value} was asked for, it became {became.get(name, 'n')}"
        for name, value in options.items()
        if became.get(name, "n") != value
    ]
