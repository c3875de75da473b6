"""Holds a document against the schema, and returns its values as plain data when nothing is wrong.

Checking never stops at the first problem: whatever can still be judged is judged, so that a manifest is put right in
one go. A value that was refused comes back as ABSENT, and its neighbours are checked as if it were not there.
"""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any, Final

from netbridge.vnode.document import Mapping, Node, Place, Refused, Scalar, Sequence
from netbridge.vnode.schema import (
    MANIFEST,
    Choice,
    Either,
    Fraction,
    Grants,
    ListOf,
    Section,
    Shape,
    Text,
    Whole,
)
from netbridge.vnode.wording import Problems, listing, nearest, show

ABSENT: Final = object()

_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]*)")
_REAL = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def check(root: Node | None, problems: Problems) -> Any:
    """Check a whole document. Returns what the sections hold, defaults filled in; of use only without problems."""
    if root is None or (isinstance(root, Scalar) and root.kind == "null"):
        problems.add((1, 1), "", "the file is empty", f"the sections {_names(MANIFEST, required=True)}")
        return ABSENT
    return _check(MANIFEST, root, "", root.place, problems)


def _check(shape: Shape, node: Node, path: str, at: Place, problems: Problems) -> Any:
    """Check one node. `at` is where its key stands, which is where a value that is not there is missed."""
    if isinstance(node, Refused):
        return ABSENT
    match shape:
        case Section():
            return _section(shape, node, path, at, problems)
        case ListOf():
            return _list(shape, node, path, problems)
        case Grants():
            return _grants(shape, node, path, problems)
        case Either():
            return _either(shape, node, path, at, problems)
        case Text() | Choice() | Whole() | Fraction():
            return _scalar(shape, node, path, problems)


# Sections and lists


def _section(shape: Section, node: Node, path: str, at: Place, problems: Problems) -> Any:
    if not isinstance(node, Mapping):
        what = f"{'it' if path else 'the document'} is {_describe(node)}"
        problems.add(node.place, path, what, f"a mapping with the keys {_names(shape)}")
        return ABSENT
    values: dict[str, Any] = {}
    meant: set[str | None] = set()
    for name, (place, child) in node.entries.items():
        key = shape.by_name.get(name)
        if key is None:
            meant.add(_unknown_key(shape, name, place, path, problems))
        else:
            values[name] = _check(key.shape, child, _join(path, name), place, problems)
    for key in shape.keys:
        if key.name not in node.entries:
            # A key that was only misspelt has been told of, and is not missing as well.
            if key.required and key.name not in meant:
                problems.add(at, _join(path, key.name), "it is missing", _expected(key.shape))
            values[key.name] = ABSENT if key.required else deepcopy(key.default)
    return values


def _unknown_key(shape: Section, name: str, place: Place, path: str, problems: Problems) -> str | None:
    """Tell of an unknown key, and return the known one that was probably meant."""
    home = _HOMES.get(name)
    if home is not None and home != path:
        suggestion = f"{name} under {home}" if home else f"{name} at the top level"
        problems.add(place, _join(path, name), "unknown key", _names(shape), suggestion)
        return None
    meant = nearest(name, shape.by_name)
    problems.add(place, _join(path, show(name)[1:-1]), "unknown key", _names(shape), meant)
    return meant


def _list(shape: ListOf, node: Node, path: str, problems: Problems) -> Any:
    if not isinstance(node, Sequence):
        problems.add(node.place, path, f"it is {_describe(node)}", "a list")
        return ABSENT
    if len(node.items) > shape.longest:
        problems.add(node.place, path, f"it has {len(node.items)} items", f"at most {shape.longest}")
        return ABSENT
    values: list[Any] = []
    seen: dict[str, Place] = {}
    for index, item in enumerate(node.items):
        value = _check(shape.item, item, f"{path}[{index}]", item.place, problems)
        if value is ABSENT:
            continue
        name = value[shape.identity] if isinstance(value, dict) and shape.identity else value
        if name is ABSENT:
            continue
        if name in seen:
            line, column = seen[name]
            problems.add(item.place, f"{path}[{index}]", f"{show(name)} is listed twice, first at {line}:{column}")
            continue
        seen[name] = item.place
        values.append(value)
    return values


def _either(shape: Either, node: Node, path: str, at: Place, problems: Problems) -> Any:
    section = next((choice for choice in shape.shapes if isinstance(choice, Section)), None)
    if section is not None and isinstance(node, Mapping):
        return _section(section, node, path, at, problems)
    suggestion = None
    for choice in shape.shapes:
        attempt = Problems()
        if choice is not section and isinstance(node, Scalar):
            value = _check(choice, node, path, at, attempt)
            if value is not ABSENT:
                return value
            suggestion = suggestion or next((problem.suggestion for problem in attempt.sorted()), None)
    problems.add(node.place, path, f"it is {_describe(node)}", shape.expected, suggestion)
    return ABSENT


# Capabilities


def _grants(shape: Grants, node: Node, path: str, problems: Problems) -> Any:
    """Returns the granted capabilities by name, each with its argument or None."""
    if not isinstance(node, Sequence):
        expected = "a list, each line a capability such as `- CAP_DMA_ALLOC`; `[]` grants nothing"
        problems.add(node.place, path, f"it is {_describe(node)}", expected)
        return ABSENT
    values: dict[str, Any] = {}
    seen: dict[str, Place] = {}
    for index, item in enumerate(node.items):
        if isinstance(item, Refused):
            continue
        at = f"{path}[{index}]"
        granted = _grant(item, at, problems)
        if granted is None:
            continue
        name, place, argument = granted
        known = next((kind for kind in shape.kinds if kind.name == name), None)
        if known is None:
            names = [kind.name for kind in shape.kinds]
            problems.add(place, at, f"unknown capability {show(name)}", listing(names), nearest(name, names))
            continue
        value = _argument(shape, name, known.line, place, argument, f"{at}.{name}", problems)
        if name in seen:
            line, column = seen[name]
            problems.add(place, at, f"{name} is granted twice, first at {line}:{column}, and one of the two has to go")
            continue
        seen[name] = place
        values[name] = value
    return values


def _grant(item: Node, path: str, problems: Problems) -> tuple[str, Place, Node | None] | None:
    """Take one item of the list apart: the capability's name, where it stands, and its argument's node."""
    if isinstance(item, Scalar) and item.kind == "str":
        return item.text, item.place, None
    if isinstance(item, Mapping) and len(item.entries) == 1:
        ((name, (place, argument)),) = item.entries.items()
        return name, place, argument
    if isinstance(item, Mapping):
        what = f"{len(item.entries)} capabilities in one item" if item.entries else "it is an empty mapping"
        problems.add(item.place, path, what, "one capability to each `-`")
    else:
        problems.add(item.place, path, f"it is {_describe(item)}", "the name of a capability, such as CAP_DMA_ALLOC")
    return None


def _argument(
    shape: Grants, name: str, line: str, place: Place, node: Node | None, path: str, problems: Problems
) -> Any:
    argument = shape.arguments.get(name)
    if argument is None:
        if node is not None and not isinstance(node, Refused):
            problems.add(node.place, path, f"it takes no value, and {_describe(node)} was given", f"`{line}`")
        return None
    if node is None or (isinstance(node, Scalar) and node.kind == "null"):
        if argument.required or node is not None:
            bare = "" if argument.required else f"`{line}`, or "
            problems.add(place, path, "it has no value", bare + _expected(argument.shape))
        return None
    return _check(argument.shape, node, path, place, problems)


# Scalars


def _scalar(shape: Text | Choice | Whole | Fraction, node: Node, path: str, problems: Problems) -> Any:
    if not isinstance(node, Scalar):
        problems.add(node.place, path, f"it is {_describe(node)}", _expected(shape))
        return ABSENT
    match shape:
        case Text():
            value = _text(shape, node)
        case Choice():
            value = node.text if node.kind == "str" and node.text in shape.words else ABSENT
        case Whole():
            value = _whole(shape, node)
        case Fraction():
            value = _fraction(node)
    if isinstance(shape, Choice) and node.kind == "str" and node.text in shape.never:
        problems.add(node.place, path, f"{node.text}: {shape.never[node.text]}")
    elif value is ABSENT:
        suggestion = nearest(node.text, shape.words) if isinstance(shape, Choice) else None
        problems.add(node.place, path, f"it is {_describe(node)}", _hint(shape, node), suggestion)
    return value


def _text(shape: Text, node: Scalar) -> Any:
    plain_number = shape.plain_numbers and node.kind in ("int", "float")
    if (node.kind != "str" and not plain_number) or len(node.text) > shape.longest:
        return ABSENT
    if re.fullmatch(shape.pattern, node.text) is None:
        return ABSENT
    try:
        return shape.convert(node.text)
    except ValueError:
        return ABSENT


def _whole(shape: Whole, node: Scalar) -> Any:
    # Only what every YAML reads alike: 011 is nine to YAML 1.1 and eleven to YAML 1.2, 1:30 is ninety or text.
    if not node.plain or len(node.text) > 20 or _DECIMAL.fullmatch(node.text) is None:
        return ABSENT
    number = int(node.text)
    return number if shape.least <= number <= shape.most else ABSENT


def _fraction(node: Scalar) -> Any:
    if not node.plain or len(node.text) > 40 or _REAL.fullmatch(node.text) is None:
        return ABSENT
    number = float(node.text)
    return number if 0 < number <= 1 else ABSENT


# Words


def _describe(node: Node) -> str:
    """What a node is, for "it is ..."."""
    match node:
        case Sequence():
            return "a list"
        case Mapping():
            return "a mapping"
        case Scalar(kind="null", plain=True):
            return "nothing"
        case Scalar(kind="bool"):
            return f"the truth value {show(node.text)[1:-1]}"
        case Scalar(kind="int" | "float"):
            return f"the number {show(node.text)[1:-1]}"
        case Scalar(kind="timestamp"):
            return f"the date {show(node.text)[1:-1]}"
        case Scalar():
            return f"the text {show(node.text)}"
        case Refused():
            return "refused"


def _hint(shape: Text | Choice | Whole | Fraction, node: Scalar) -> str:
    """What was expected, and how a value that is nearly right would be."""
    expected = _expected(shape)
    if isinstance(shape, Whole | Fraction):
        number = _DECIMAL if isinstance(shape, Whole) else _REAL
        if not node.plain and number.fullmatch(node.text):
            return f"{expected}, without the quotes"
        if node.plain and node.kind == "int" and _DECIMAL.fullmatch(node.text) is None:
            return f"{expected}, in plain decimal digits"
    elif isinstance(shape, Text) and node.kind not in ("str", "null") and re.fullmatch(shape.pattern, node.text):
        return f"{expected}, in quotes"
    return expected


def _expected(shape: Shape) -> str:
    match shape:
        case Text() | Either():
            return shape.expected
        case Choice():
            return listing(shape.words)
        case Whole():
            return f"{shape.noun} from {shape.least} to {shape.most}"
        case Fraction():
            return f"{shape.noun}, above 0 and at most 1"
        case ListOf() | Grants():
            return "a list"
        case Section():
            return f"a mapping with the keys {_names(shape)}"


def _names(shape: Section, *, required: bool = False) -> str:
    return listing((key.name for key in shape.keys if key.required or not required), "and" if required else "or")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# Where each key belongs, for one that stands in the wrong section.
_HOMES: Final[dict[str, str]] = {
    **{inner.name: key.name for key in MANIFEST.keys if isinstance(key.shape, Section) for inner in key.shape.keys},
    **{key.name: "" for key in MANIFEST.keys},
}
