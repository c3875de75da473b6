"""The connection to the agent in a guest: each frame that comes goes to the request that it answers.

It is any connected stream socket; in a guest it is the host's end of a virtio-serial port. A thread reads it, so that
any number of threads can have requests under way. What comes is always taken off, whoever it is for. The framing is
described, once, in images/agent/protocol.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from images.agent.protocol import CHUNK, PROTOCOL, Decoder, encode
from qemu.errors import AgentError, GuestLost, HarnessError

SEND_SECONDS = 60.0
BULK = ("output", "stdin", "data", "ack")
LONGEST_NOTE = 4096
ANSWER_SECONDS = 60.0
"""How long the agent may take over a request that only costs it milliseconds, on a host that has far too much to do."""


class Request:
    """One request under way; every field is guarded by the agent's condition."""

    def __init__(self, ident: int, what: str):
        self.id = ident
        self.what = what
        self.done = False
        self.answer: dict[str, Any] = {}
        self.error: Exception | None = None

    def on_event(self, header: dict[str, Any], payload: bytes) -> int:  # noqa: ARG002 - for those that take output
        """Take one frame; returns the bytes of output in it that may be acknowledged."""
        if header.get("event") == "error":
            trace = f"\n{header['trace']}" if header.get("trace") else ""
            self.error = AgentError(f"{self.what}: {header.get('message')}{trace}")
            self.done = True
        elif header.get("event") == "result":
            self.answer = header
            self.done = True
        return 0

    def lose(self, reason: str) -> None:
        """There will be no more frames."""
        self.error = GuestLost(reason)
        self.done = True


class Channel:
    """Owns the socket. Every method may be called from any thread."""

    def __init__(
        self,
        channel: socket.socket,
        on_hello: Callable[[], None] = lambda: None,
        why_closed: Callable[[], str] = lambda: "QEMU has closed the agent's port",
        transcript: Path | None = None,
    ):
        """`transcript` is a file that gets a line for each frame but those that only carry data."""
        self.changed = threading.Condition()
        self.hello: dict[str, Any] | None = None
        """What the agent said of itself: protocol, pid, python, kernel, uptime (s). None while it is not there."""
        self.garbage = 0
        """Bytes that one of the two ends could not make sense of."""
        self._transcript = transcript.open("w", encoding="utf-8") if transcript is not None else None
        self._channel = channel
        self._on_hello = on_hello
        self._why_closed = why_closed
        self._sending = threading.Lock()
        self._requests: dict[int, Request] = {}
        self._next = 1
        self._lost: str | None = None
        self._final = False
        self._closed = False
        self._reader = threading.Thread(target=self._read, name="agent reader", daemon=True)
        self._reader.start()

    # Life

    def wait_ready(self, timeout: float) -> dict[str, Any]:
        """Wait for the agent's greeting. Raises GuestLost when it does not come or speaks another protocol."""
        with self.changed:
            self.changed.wait_for(lambda: self.hello is not None or self._final, timeout)
            if self.hello is None:
                before = f" (before that: {self._lost})" if self._lost and not self._final else ""
                late = f"the guest's agent has not greeted within {timeout:g} s{before}"
                raise GuestLost(self._lost if self._lost and self._final else late)
            if self.hello.get("protocol") != PROTOCOL:
                raise HarnessError(
                    f"the guest's agent speaks protocol {self.hello.get('protocol')}, this harness {PROTOCOL}: "
                    "build the image anew"
                )
            return self.hello

    @property
    def ready(self) -> bool:
        return self.hello is not None and self._lost is None

    def lose(self, reason: str, final: bool = True) -> None:
        """The agent is known to be gone: every request under way fails with GuestLost and that reason.

        So does every later one, until an agent greets anew; unless `final`, there may be one that does.
        """
        with self.changed:
            self._final |= final
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        self.hello = None
        self._lost = reason
        for request in self._requests.values():
            request.lose(f"{request.what}: {reason}")
        self._requests.clear()
        self.changed.notify_all()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._channel.close()
        if self._transcript is not None:
            self._transcript.close()

    def _note(self, direction: str, header: Mapping[str, Any], payload: bytes | memoryview) -> None:
        if self._transcript is None or header.get("event", header.get("op")) in BULK:
            return
        # Of payloads only programs are text.
        text = payload[:LONGEST_NOTE] if header.get("op") in ("eval", "call") else b""
        shown = bytes(text).decode(errors="replace")
        line = json.dumps({**header, **({"payload": shown} if shown else {})})
        with contextlib.suppress(ValueError):  # it is closed, and what comes now interests nobody
            self._transcript.write(f"{time.time():.6f} {direction} {line}\n")
            self._transcript.flush()

    def _read(self) -> None:
        decoder = Decoder()
        while True:
            try:
                data = self._channel.recv(8 * CHUNK)
            except OSError:
                data = b""
            if not data:
                self.lose("the harness has closed the channel" if self._closed else self._why_closed())
                return
            acknowledge: dict[int, int] = {}
            with self.changed:
                for header, payload in decoder.feed(data):
                    count = self._dispatch(header, payload)
                    if count:
                        acknowledge[header["id"]] = acknowledge.get(header["id"], 0) + count
                self.garbage += decoder.garbage
                decoder.garbage = 0
                self.changed.notify_all()
            for ident, count in acknowledge.items():
                with contextlib.suppress(HarnessError):  # then nobody is there to be told
                    self.tell({"id": ident, "op": "ack", "count": count})

    def _dispatch(self, header: dict[str, Any], payload: bytes) -> int:
        ident, event = header.get("id"), header.get("event")
        self._note("<-", header, payload)
        if ident == 0:
            if event == "hello":
                if self._requests:
                    self._lose("the agent in the guest died and was started anew")
                if not self._final:
                    self.hello = header
                    self._lost = None
                self._on_hello()
            elif event == "garbage":
                self.garbage += int(header.get("bytes", 0))
            return 0
        request = self._requests.get(ident) if isinstance(ident, int) else None
        if request is None:
            return 0
        count = request.on_event(header, payload)
        if request.done:
            del self._requests[request.id]
        return count

    def summon(self) -> None:
        """Ask for the greeting: for a guest that is restored, whose agent has greeted somebody else long ago."""
        self.tell({"id": -1, "op": "hello"})

    def begin(self) -> list[str]:
        """Give a guest that has just greeted the time and randomness of its own; returns what it has mounted then.

        It may be a copy of one that others are copies of, too, with the clock and the random numbers of all of them.
        """
        header = {"op": "begin", "time_ns": time.time_ns()}
        return list(self.ask("begin", header, os.urandom(64))["mounted"])

    # Requests

    def tell(self, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        """Send one frame. Raises GuestLost when the guest takes nothing for SEND_SECONDS or is gone."""
        view = memoryview(encode(header, payload))
        deadline = time.monotonic() + SEND_SECONDS
        poll = select.poll()
        with self._sending:
            if self._lost is not None:
                raise GuestLost(self._lost)
            self._note("->", header, payload)
            try:
                poll.register(self._channel, select.POLLOUT)
                while view:
                    try:
                        view = view[self._channel.send(view, socket.MSG_DONTWAIT) :]
                    except BlockingIOError:
                        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                            # Half a frame may be under way: nothing sent after it would be understood.
                            self._channel.shutdown(socket.SHUT_RDWR)
                            raise GuestLost(f"the guest's agent has taken no data for {SEND_SECONDS:g} s") from None
            except OSError as error:
                raise GuestLost(f"the channel to the guest's agent is gone: {error}") from error

    def open(self, make: Callable[[int], Request]) -> Request:
        """The request that `make` makes of its id, from here on told what comes for it. Raises GuestLost."""
        with self.changed:
            if self._lost is not None or self.hello is None:
                raise GuestLost(self._lost or "the guest's agent has not greeted yet")
            request = make(self._next)
            self._requests[self._next] = request
            self._next += 1
            return request

    def await_answer(self, request: Request, timeout: float) -> dict[str, Any]:
        """The frame that has answered a request. Raises AgentError where that was a refusal, GuestLost."""
        with self.changed:
            if not self.changed.wait_for(lambda: request.done, timeout):
                self._requests.pop(request.id, None)
                raise GuestLost(f"{request.what}: the guest's agent has not answered within {timeout:g} s")
            if request.error is not None:
                raise request.error
            return request.answer

    def ask(
        self, what: str, header: dict[str, Any], payload: bytes = b"", timeout: float = ANSWER_SECONDS
    ) -> dict[str, Any]:
        """Send a request and wait for its answer: see await_answer()."""
        request = self.open(lambda ident: Request(ident, what))
        self.tell({"id": request.id, **header}, payload)
        return self.await_answer(request, timeout)
