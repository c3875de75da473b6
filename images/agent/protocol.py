"""What the two ends say to each other: frames, requests and their refusal.

A frame is a fixed head (magic, length of the header, length of the payload), a JSON header and a binary payload. Every
request has an id that its answers repeat, so many run at once. Bytes that are not a frame are skipped until the next
magic. Output of commands and files is sent only as far as the other end has granted credit.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

PROTOCOL = 2
MAGIC = b"\xf7GA1"
HEAD = struct.Struct("<4sII")
MAX_HEADER = 1 << 20
MAX_PAYLOAD = 1 << 20
CHUNK = 1 << 15
"""Bytes of output, input or file per frame: what the kernel's virtio-serial driver takes in one write."""
WINDOW = 8 * CHUNK
"""Bytes that either side may have under way in one direction of one request before the other has acknowledged."""
BACKLOG = 8 * CHUNK
"""Bytes waiting for room in the port above which no more output is read from any command."""


class _Plain:
    """How JSON is read: what the scanner of the standard library wants to be told."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float


def _json_functions() -> tuple[Callable[[object], str], Callable[[str], object]]:
    # The core of the package json without the package: that imports regular expressions, a fifth of a second under
    # emulation, of which reading and writing compact JSON needs none.
    try:
        from _json import encode_basestring_ascii, make_encoder, make_scanner
    except ImportError:
        import json

        return lambda value: json.dumps(value, separators=(",", ":")), json.loads

    def refuse(value: object) -> None:
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")

    scan = make_scanner(_Plain)  # type: ignore[arg-type]

    def dumps(value: object) -> str:
        return "".join(make_encoder({}, refuse, encode_basestring_ascii, None, ":", ",", False, False, True)(value, 0))

    def loads(text: str) -> object:
        try:
            value, end = scan(text, 0)
        except StopIteration as error:
            raise ValueError(f"not JSON from character {error.value} on") from None
        if end != len(text):
            raise ValueError(f"something follows the JSON, from character {end} on")
        return value

    return dumps, loads


dumps, loads = _json_functions()


def encode(header: dict[str, Any], payload: bytes | memoryview = b"") -> bytes:
    """One frame. Raises ValueError when header or payload is longer than the other end would accept."""
    text = dumps(header).encode()
    if len(text) > MAX_HEADER or len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame takes at most {MAX_HEADER} bytes of header and {MAX_PAYLOAD} of payload")
    return b"".join((HEAD.pack(MAGIC, len(text), len(payload)), text, payload))


class Decoder:
    """Cuts a byte stream into frames; skips, and counts in `garbage`, whatever is not one."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._begun: tuple[dict[str, Any], int, int] | None = None  # a header, where its payload starts and ends
        self.garbage = 0

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        self._buffer += data
        while (frame := self._next()) is not None:
            yield frame

    def _skip(self, count: int) -> None:
        self.garbage += count
        del self._buffer[:count]

    def _next(self) -> tuple[dict[str, Any], bytes] | None:
        # The header is looked at before the payload is there, so that a false magic cannot hold up a true frame
        # behind it for longer than one header; and it is looked at once, however many pieces the payload comes in.
        if self._begun is None:
            self._begun = self._header()
        if self._begun is None:
            return None
        header, start, end = self._begun
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[start:end])
        del self._buffer[:end]
        self._begun = None
        return header, payload

    def _header(self) -> tuple[dict[str, Any], int, int] | None:
        buffer = self._buffer
        while True:
            start = buffer.find(MAGIC)
            if start < 0:
                begun = next((n for n in range(len(MAGIC) - 1, 0, -1) if buffer.endswith(MAGIC[:n])), 0)
                self._skip(len(buffer) - begun)
                return None
            if start:
                self._skip(start)
            if len(buffer) < HEAD.size:
                return None
            _, header_size, payload_size = HEAD.unpack_from(buffer)
            if header_size > MAX_HEADER or payload_size > MAX_PAYLOAD:
                self._skip(len(MAGIC))
                continue
            body = HEAD.size + header_size
            if len(buffer) < body:
                return None
            try:
                header = loads(buffer[HEAD.size : body].decode())
            except (ValueError, RecursionError):
                header = None
            if isinstance(header, dict):
                return header, body, body + payload_size
            self._skip(len(MAGIC))


class Request:
    """A frame from the host that asks for something."""

    def __init__(self, ident: int, header: dict[str, Any], payload: bytes):
        self.id = ident
        self.header = header
        self.payload = payload


class Refused(Exception):
    """A request that cannot be done; the text goes to the host."""
