"""QEMU's machine protocol for callers that are not asynchronous: one client, in the event loop of one thread.

Everything that passes is written to a file, one JSON message a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from qemu.qmp import ExecInterruptedError, QMPClient, QMPError
from qemu.qmp.message import Message
from qemu.qmp.protocol import StateError
from qemu.qmp.qmp_client import ExecuteError

from qemu.errors import GuestLost, HarnessError

CONNECT_SECONDS = 20.0


class _Client(QMPClient):  # type: ignore[misc]
    """The client with its two hooks, meant for subclasses, used to log and to pass events on."""

    def __init__(self, log: Path, on_event: Callable[[dict[str, Any]], None]):
        super().__init__("qemu")
        self._log = log.open("w", encoding="utf-8")
        self._on_event = on_event

    def _write(self, direction: str, message: Message) -> None:
        if not self._log.closed:
            self._log.write(f"{time.time():.6f} {direction} {json.dumps(dict(message))}\n")
            self._log.flush()

    def _cb_outbound(self, msg: Message) -> Message:
        self._write("->", msg)
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        self._write("<-", msg)
        if "event" in msg:
            self._on_event(dict(msg))
        return msg

    def close_log(self) -> None:
        self._log.close()


class Control:
    """QMP on a connected socket, which it owns. `on_event` gets every event, from this object's own thread."""

    def __init__(self, channel: socket.socket, log: Path, on_event: Callable[[dict[str, Any]], None] = lambda _: None):
        self._loop = asyncio.new_event_loop()
        self._client = _Client(log, on_event)
        self._channel = channel
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        self._connected: Future[None] = asyncio.run_coroutine_threadsafe(self._connect(), self._loop)

    async def _connect(self) -> None:
        await asyncio.wait_for(self._client.connect(self._channel), CONNECT_SECONDS)

    def wait_connected(self) -> None:
        """Wait for QEMU's greeting. Raises GuestLost when QEMU ends, or says nothing, before it."""
        try:
            self._connected.result(CONNECT_SECONDS + 5)
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            raise GuestLost(f"QEMU does not answer on its control channel: {error}") from error

    def execute(self, command: str, arguments: dict[str, Any] | None = None, timeout: float = 20.0) -> Any:
        """The return value of a QMP command.

        Raises HarnessError with QEMU's own words when it refuses, GuestLost when QEMU is gone or does not answer.
        """
        self.wait_connected()
        try:
            return self._sync(self._client.execute(command, arguments or {}), timeout)
        except ExecuteError as error:
            raise HarnessError(f"QMP {command} {json.dumps(arguments or {})}: {error.error_class}: {error}") from error
        except TimeoutError as error:
            raise GuestLost(f"QMP {command}: no answer within {timeout:g} s") from error
        except (ExecInterruptedError, StateError, QMPError, OSError, EOFError) as error:
            raise GuestLost(f"QMP {command}: QEMU is gone ({error})") from error

    def _sync(self, coroutine: Coroutine[Any, Any, Any], timeout: float) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(coroutine, timeout)

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result(timeout + 5)

    def close(self) -> None:
        """Hang up. QEMU goes on running."""

        async def hang_up() -> None:
            with contextlib.suppress(Exception):
                # Also where an error of the reader would come out once more; QEMU's end is told elsewhere.
                await asyncio.wait_for(self._client.disconnect(), 5)
            current = asyncio.current_task()
            rest = [task for task in asyncio.all_tasks() if task is not current]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        self._connected.cancel()
        asyncio.run_coroutine_threadsafe(hang_up(), self._loop).result(15)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._client.close_log()
        self._channel.close()
