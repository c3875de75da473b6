"""From the bytes of a YAML file to a tree of plain nodes, each with its line and column.

It reads what SafeLoader reads, but builds no objects: scalars keep their text and the YAML type that a plain one
resolves to, and `checker` decides what they mean. What no manifest has a use for is refused where it stands: aliases
and anchors (with them goes the bomb of aliases to aliases), tags, a second document, a key given twice, deep nesting, a
file larger than `LARGEST`. This module is the only one of the V-Node's that needs a YAML parser.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import Protocol

import yaml

from netbridge.errors import ManifestError
from netbridge.vnode.wording import Problem, Problems, show

LARGEST = 64 * 1024  # bytes; the longest sensible manifest is a twentieth of that
DEEPEST = 12  # levels of nesting; the format has five

Place = tuple[int, int]  # line and column, counted from 1


@dataclass(slots=True)
class Scalar:
    """A single value: its text, and what a plain (unquoted) one is to YAML 1.1: "str", "int", "bool", "null" ..."""

    place: Place
    text: str
    kind: str
    plain: bool


@dataclass(slots=True)
class Sequence:
    """A list of nodes."""

    place: Place
    items: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class Mapping:
    """A mapping. Keys are scalars and each occurs once, because anything else has been refused already."""

    place: Place
    entries: dict[str, tuple[Place, Node]] = field(default_factory=dict)


@dataclass(slots=True)
class Refused:
    """Stands where something was refused and told of already, so that the checker says no more about it."""

    place: Place


Node = Scalar | Sequence | Mapping | Refused


def read_bytes(path: str) -> bytes:
    """Return the content of a manifest file; ManifestError when there is none that can be read."""

    def refuse(what: str, expected: str) -> ManifestError:
        return ManifestError(path, (Problem(None, None, "", what, expected),))

    try:
        # Non-blocking, because opening a FIFO that nobody writes to would wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise refuse(f"cannot be opened: {reason}", "the path of a manifest that can be read") from None
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind != stat.S_IFREG:
            hint = f", such as {path.rstrip('/')}/vnode.yml" if kind == stat.S_IFDIR else ""
            raise refuse(f"is {_KINDS.get(kind, 'a device')}", f"a regular file{hint}")
        data = _read_at_most(fd, LARGEST + 1)
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}", "the path of a manifest that can be read") from None
    finally:
        os.close(fd)
    if len(data) > LARGEST:
        raise refuse(f"is larger than {LARGEST} bytes", "a manifest")
    return data


_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO"}


def _read_at_most(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (chunk := os.read(fd, size - len(data))):
        data += chunk
    return bytes(data)


def parse(data: bytes, problems: Problems) -> Node | None:
    """Return the document's root node, or None when there is nothing to check. Adds all that is wrong to `problems`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line_start = before.rfind(b"\n") + 1
        place = (before.count(b"\n") + 1, len(before[line_start:].decode("utf-8")) + 1)
        problems.add(place, "", f"byte 0x{data[error.start]:02x} is not UTF-8", "a text file in UTF-8")
        return None
    builder = _Builder(text, problems)
    try:
        return builder.document()
    except yaml.reader.ReaderError as error:
        before_text = text[: error.position]
        place = (before_text.count("\n") + 1, len(before_text) - before_text.rfind("\n"))
        problems.add(place, "", f"character {show(text[error.position])} is not allowed in YAML", "printable text")
    except yaml.MarkedYAMLError as error:
        problems.add(_place(error.problem_mark or error.context_mark), "", *_syntax_error(error))
    except (ValueError, OverflowError):
        # PyYAML lets these through for an escape or a directive with a number that is none, such as "\UFFFFFFFF".
        problems.add(builder.reached, "", "not YAML: an escape or a directive holds an impossible number")
    return None


class _Builder:
    """Builds the tree from the parser's events, with no recursion, so that nesting is bounded by DEEPEST alone."""

    def __init__(self, text: str, problems: Problems) -> None:
        self._text = text
        self._problems = problems
        self._resolver = yaml.resolver.Resolver()
        self.reached: Place = (1, 1)  # the place of the last event: no parse error is before it

    def document(self) -> Node | None:
        """Return the root node, or None when there is none. Raises what PyYAML raises."""
        root: Node | None = None
        stack: list[_Open] = []
        for event in yaml.parse(self._text, Loader=yaml.SafeLoader):
            self.reached = _place(event.end_mark)
            if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                self._problems.add(_place(event.start_mark), "", "a second YAML document begins here", "one document")
                break
            if isinstance(event, yaml.NodeEvent):
                node = self._node(event)
                if isinstance(event, yaml.CollectionStartEvent):
                    if len(stack) == DEEPEST:
                        self._problems.add(node.place, "", f"nested more than {DEEPEST} levels deep", "a manifest")
                        return None
                    stack.append(_Open(node))
                    continue
            elif isinstance(event, yaml.CollectionEndEvent):
                node = stack.pop().node
            else:
                continue
            if stack:
                stack[-1].put(node, self._problems)
            else:
                root = node
        return root

    def _node(self, event: yaml.NodeEvent) -> Node:
        place = _place(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            self._problems.add(place, "", f"the alias {show('*' + str(event.anchor))} is refused", "the value itself")
            return Refused(place)
        if event.anchor is not None:
            self._problems.add(place, "", f"the anchor {show('&' + event.anchor)} is refused", "no anchors or aliases")
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag is not None:
            self._problems.add(place, "", f"the tag {show(event.tag)} is refused", "a plain value")
            if isinstance(event, yaml.ScalarEvent):
                return Refused(place)
        if isinstance(event, yaml.ScalarEvent):
            if any("\ud800" <= character <= "\udfff" for character in event.value):
                self._problems.add(place, "", f"{show(event.value)} holds half of a surrogate pair", "whole characters")
                return Refused(place)
            tag: str = self._resolver.resolve(yaml.ScalarNode, event.value, event.implicit)  # type: ignore[no-untyped-call]
            plain = event.style in (None, "")
            return Scalar(place, event.value, tag.rpartition(":")[2], plain)
        return Sequence(place) if isinstance(event, yaml.SequenceStartEvent) else Mapping(place)


class _Open:
    """A collection whose end has not come yet."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._key: tuple[Place, str | None] | None = None  # a key without a name is one that was refused

    def put(self, node: Node, problems: Problems) -> None:
        """Take in the next child: an item, or by turns a key and its value."""
        if isinstance(self.node, Sequence):
            self.node.items.append(node)
        elif isinstance(self.node, Mapping):
            if self._key is None:
                self._key = node.place, self._name(node, problems)
            else:
                place, name = self._key
                self._key = None
                if name is not None:
                    self.node.entries[name] = place, node

    def _name(self, node: Node, problems: Problems) -> str | None:
        assert isinstance(self.node, Mapping)
        if isinstance(node, Refused):
            return None
        if not isinstance(node, Scalar):
            what = "a list" if isinstance(node, Sequence) else "a mapping"
            problems.add(node.place, "", f"{what} stands where a key should", "a key of plain text")
            return None
        if node.text in self.node.entries:
            line, column = self.node.entries[node.text][0]
            problems.add(node.place, "", f"the key {show(node.text)} is given twice, first at {line}:{column}")
            return None
        return node.text


class _Mark(Protocol):
    line: int
    column: int


def _place(mark: _Mark | None) -> Place:
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)


def _syntax_error(error: yaml.MarkedYAMLError) -> tuple[str, str | None]:
    """What PyYAML's message means for someone who writes a manifest."""
    problem = error.problem or "unknown"
    what = f"not YAML: {problem}"
    if "mapping values are not allowed" in problem:
        return what, "quotes around a value that has a colon and a space in it, or {key: value}"
    if "'\\t'" in problem:
        return what, "spaces: YAML allows no tabs for indentation"
    if error.context is not None:
        what += f" {error.context}"
        if error.context_mark is not None:
            what += f" that begins at {error.context_mark.line + 1}:{error.context_mark.column + 1}"
    return what, None
