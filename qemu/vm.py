"""A virtual machine: one QEMU with its console, its control channel and the agent's port, watched from all sides.

While it comes up everything that can go wrong is looked for at once: QEMU ending, a panic on the console, the machine
stopped by an error, and a guest that does nothing, or nothing that can be seen. Afterwards the same watchers make every
call on a lost guest fail at once, with the reason and the end of its console. What one does with one is in guest.py.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from qemu.accel import Accelerator
from qemu.agent import Agent
from qemu.command import Channels, Machine, build, netdev_id, script
from qemu.console import Console
from qemu.control import Control
from qemu.errors import GuestLost, GuestNeverCameUp, GuestPanicked, HarnessError
from qemu.process import Process
from qemu.stuck import LOOK_SECONDS, Stuck
from qemu.wire import Wire

QUIT_SECONDS = 3.0
PANIC_SECONDS = 2.0
MOVE_SECONDS = 60.0
CONSOLE_LINES = 30


class VirtualMachine:
    """A QEMU that runs, with all that belongs to it. Ended by close() or by leaving the with block.

    With `state`, a file that save() has written, the guest goes on from there instead of booting.
    """

    def __init__(
        self,
        machine: Machine,
        accelerator: Accelerator,
        wires: Mapping[str, Wire],
        artefacts: Path,
        state: Path | None = None,
    ):
        self.machine = machine
        self.accel = accelerator
        self.wires = dict(wires)
        """The wires that booting has made, by the id of their NIC; they are closed with the guest."""
        self.artefacts = artefacts
        self.console = artefacts / "console.log"
        self.boot_seconds = 0.0
        """From the start of QEMU until the agent was at work."""
        self._state = threading.Condition()
        self._failure: HarnessError | None = None
        self._panic: str | None = None
        self._up = False
        self._closing = False
        self._closed = False
        self._migration = ""
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._source: BinaryIO | None = None
        with contextlib.ExitStack() as stack:
            self._start(stack, state)
            self._stack = stack.pop_all()

    def _start(self, stack: contextlib.ExitStack, state: Path | None) -> None:
        ends = {}
        theirs = {}
        for name in ("console", "agent", "control"):
            ends[name], theirs[name] = socket.socketpair()
            stack.callback(ends[name].close)
            stack.callback(theirs[name].close)
        netdevs = {nic.id: nic.wire for nic in self.machine.nics if nic.wire is not None}
        channels = Channels(
            console=f"socket,fd={theirs['console'].fileno()},logfile={_escape(self.console)},logappend=off",
            agent=f"socket,fd={theirs['agent'].fileno()}",
            control=f"socket,fd={theirs['control'].fileno()}",
            netdevs={nic.id: nic.wire.netdev(netdev_id(nic)) for nic in self.machine.nics if nic.wire is not None},
        )
        self.argv = build(self.machine, channels)
        again = self.artefacts / "qemu.sh"
        again.write_text(script(self.machine, self.argv))
        again.chmod(0o755)
        fds = [end.fileno() for end in theirs.values()] + [fd for netdev in netdevs.values() for fd in netdev.fds()]
        if state is not None:
            self._source = stack.enter_context(state.open("rb"))
            fds.append(self._source.fileno())
            self.argv += ["-incoming", "defer"]
        # The watchers are there before there is anything to see, and stay until there is nothing more.
        self._console = Console(ends["console"], self._on_panic)
        stack.callback(self._console.close)
        self.agent = Agent(ends["agent"], self._on_hello, self._why_closed, self.artefacts / "agent.log")
        stack.callback(self.agent.close)
        self._control = Control(ends["control"], self.artefacts / "qmp.log", self._on_event)
        stack.callback(self._control.close)
        self._began = time.monotonic()
        self._process = Process(self.argv, log=self.artefacts / "qemu.log", fds=fds, on_exit=self._on_exit)
        stack.callback(self._process.kill)
        for end in theirs.values():
            end.close()

    # What the watchers see

    def _fail(self, failure: HarnessError) -> None:
        with self._state:
            if self._failure is None and not self._closing:
                self._failure = failure
            up = self._up
            self._state.notify_all()
        if up and self._failure is not None:
            self.agent.lose(str(self._failure))

    def _with_console(self, text: str) -> str:
        tail = self._console.tail(CONSOLE_LINES)
        return f"{text}\n--- end of {self.console}\n{tail}" if tail.strip() else f"{text}\nits console is empty"

    def _on_hello(self) -> None:
        with self._state:
            self._state.notify_all()

    def _on_exit(self) -> None:
        if self._closing:
            return
        # What the console has to say last may tell more than QEMU's exit code.
        self._console.wait_ended(1.0)
        if self._panic is not None:
            self._fail(GuestPanicked(self._with_console(f"guest panicked: {self._panic}")))
            return
        what = "guest is gone" if self._up else "guest never came up"
        kind = GuestLost if self._up else GuestNeverCameUp
        self._fail(kind(self._with_console(f"{what}: {self._process.ending()}")))

    def _on_panic(self, line: str) -> None:
        if self._panic is None:
            self._panic = line.strip()
            # panic=-1 ends QEMU right after the last line of the report, which belongs into the message; if it does
            # not, the guest has panicked all the same.
            threading.Thread(target=self._after_panic, name="panic", daemon=True).start()

    def _after_panic(self) -> None:
        with self._state:
            self._state.wait_for(lambda: self._failure is not None, PANIC_SECONDS)
        self._fail(GuestPanicked(self._with_console(f"guest panicked: {self._panic}")))

    def _why_closed(self) -> str:
        """Why the agent's port was closed: QEMU's end is told a moment later than it is felt there."""
        with self._state:
            self._state.wait_for(lambda: self._failure is not None or self._closing, 2 * PANIC_SECONDS)
            return str(self._failure) if self._failure is not None else "the guest is being closed"

    def _on_event(self, event: dict[str, Any]) -> None:
        name = event.get("event")
        data = event.get("data") or {}
        with self._state:
            self._events.append((str(name), data))
            self._state.notify_all()
        if name == "STOP":
            # Asked from a thread of its own: this one is the one that would bring the answer.
            threading.Thread(target=self._look_at_stop, name="stop", daemon=True).start()
        elif name == "MIGRATION":
            with self._state:
                self._migration = str(data.get("status"))
                self._state.notify_all()
        elif name == "GUEST_PANICKED":
            self._on_panic("GUEST_PANICKED reported by the panic device")
        elif name == "VSERPORT_CHANGE" and data.get("id") == "agent-port" and not data.get("open") and self._up:
            self.agent.lose("the agent in the guest has ended", final=False)

    def _look_at_stop(self) -> None:
        try:
            status = self._control.execute("query-status").get("status")
        except HarnessError:
            return  # QEMU ends: that is told elsewhere
        if status in ("internal-error", "io-error", "guest-panicked", "watchdog"):
            words = self._process.first_words()
            said = f': "{words}"' if words else ""
            kind = GuestLost if self._up else GuestNeverCameUp
            self._fail(kind(self._with_console(f"QEMU stopped the virtual machine for {status}{said}")))

    def wait_up(self, timeout: float, spin: float) -> None:
        """Return when the agent has greeted; raise as soon as it is clear that it will not.

        `timeout` is in seconds, `spin` in seconds of processor time without a word on the console.
        """
        watch = Stuck(self._began, timeout, spin)
        while True:
            with self._state:
                self._state.wait_for(lambda: self._failure is not None or self.agent.ready, LOOK_SECONDS)
                if self._failure is not None:
                    break
            if self.agent.ready:
                self.agent.wait_ready(0)
                with self._state:
                    self._up = True
                return
            console = self._console
            reason = watch.look(time.monotonic(), *self._process.effort(), console.last_activity, console.size)
            if reason is not None:
                self._fail(GuestNeverCameUp(self._with_console(f"guest never came up: {reason}")))
                break
        assert self._failure is not None
        raise self._failure

    @property
    def lost(self) -> HarnessError | None:
        """Why this guest is gone, or None while it is there."""
        return self._failure

    # Control and console

    def qmp(self, command: str, **arguments: Any) -> Any:
        """A command to QEMU; an underscore in an argument's name stands for a hyphen."""
        if self._failure is not None and not self._process.running:
            raise self._failure
        return self._control.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    def event_mark(self) -> int:
        """What wait_event() counts from, to see only events that come after this moment."""
        with self._state:
            return len(self._events)

    def wait_event(
        self, name: str, wanted: Callable[[dict[str, Any]], bool], timeout: float, since: int = 0
    ) -> dict[str, Any]:
        """The data of the first QMP event of that name for which `wanted` holds, past or to come.

        Raises HarnessError when none comes in time, GuestLost when the guest goes meanwhile.
        """
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found.extend(data for event, data in self._events[since:] if event == name and wanted(data))
            return bool(found) or self._failure is not None

        with self._state:
            self._state.wait_for(look, timeout)
        if found:
            return found[0]
        if self._failure is not None:
            raise self._failure
        raise HarnessError(f"QEMU told of no {name} within {timeout:g} s")

    def console_tail(self, lines: int = CONSOLE_LINES) -> str:
        return self._console.tail(lines)

    def wait_for_console(self, pattern: str, timeout: float = 10.0) -> re.Match[str]:
        """The first console line with `pattern`, past or to come. Raises GuestLost when there is none in time."""
        match = self._console.wait_for(pattern, timeout)
        if match is None:
            raise GuestLost(self._with_console(f"no line with /{pattern}/ on the console within {timeout:g} s"))
        return match

    def kernel_trouble(self) -> list[str]:
        """Lines of the console that tell of an oops, a warning, a stall or a panic."""
        return list(self._console.trouble)

    # The state of the machine, kept

    def save(self, path: Path) -> None:
        """Write the machine's state to a file and go on; the guest notices nothing but the time that has passed.

        Raises HarnessError with QEMU's own words when one of the devices cannot be saved.
        """
        self._speak_of_migration()
        self.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        self.qmp("stop")
        try:
            self.qmp("migrate", uri=f"exec:cat >{shlex.quote(str(path))}")
            self._await_migration("saved")
            # It is over a moment later than it is told.
            deadline = time.monotonic() + MOVE_SECONDS
            while self.qmp("query-status")["status"] == "finish-migrate":
                if time.monotonic() > deadline:
                    raise HarnessError(f"QEMU has not finished saving its state within {MOVE_SECONDS:g} s")
        finally:
            if self._failure is None:
                self.qmp("cont")

    def resume(self) -> None:
        """Go on from the state that this machine was started with. Raises HarnessError."""
        assert self._source is not None
        try:
            self._speak_of_migration()
            # QEMU announces a machine that has moved, with a frame that nobody sent, as soon as it runs: here at a
            # closed door. Once, as "never" makes QEMU crash when the NIC is reset.
            self.qmp("migrate-set-parameters", announce_rounds=1)
            self._set_links(up=False)
            self.qmp("migrate-incoming", uri=f"fd:{self._source.fileno()}")
            self._await_migration("read")
            self._source.close()
            self.qmp("cont")
            self._set_links(up=True)
            self.agent.summon()
        except GuestLost as error:
            self._process.wait(PANIC_SECONDS)
            raise GuestNeverCameUp(f"{error}; {self._process.ending()}") from error

    def _set_links(self, up: bool) -> None:
        for nic in self.machine.nics:
            self.qmp("set_link", name=netdev_id(nic), up=up)

    def _speak_of_migration(self) -> None:
        self._migration = ""
        self.qmp("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])

    def _await_migration(self, done: str) -> None:
        with self._state:
            ended = self._state.wait_for(
                lambda: self._failure is not None or self._migration in ("completed", "failed", "cancelled"),
                MOVE_SECONDS,
            )
        if self._failure is not None:
            raise self._failure
        if not ended:
            raise HarnessError(f"the state of the machine was not {done} within {MOVE_SECONDS:g} s")
        if self._migration != "completed":
            why = self.qmp("query-migrate").get("error-desc") or self._process.last_words() or "no reason given"
            raise HarnessError(f"the state of the machine could not be {done}: {why}")

    # The end

    def close(self) -> None:
        """Collect what is to be kept, end QEMU, politely first, and close all there is. May be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            self._collect()
            self._closing = True
            if self._process.running:
                with contextlib.suppress(HarnessError):
                    self._control.execute("quit", timeout=QUIT_SECONDS)
                    self._process.wait(QUIT_SECONDS)
        finally:
            with self._state:
                self._closing = True
                self._state.notify_all()
            self._stack.close()
            for wire in self.wires.values():
                wire.close()

    def _collect(self) -> None:
        """Called before the end, while the guest may still answer."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _escape(path: Path) -> str:
    """A path inside one of QEMU's comma-separated values."""
    return str(path).replace(",", ",,")
