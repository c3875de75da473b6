"""DPDK's testpmd as a process that is told what to do over its own prompt."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "dpdk-testpmd"
PROMPT = "testpmd> "
START_SECONDS = 60.0
COMMAND_SECONDS = 30.0
MEMORY_MIB = 192
_DRIVERS = "/usr/lib/*/dpdk/pmds-*/"


class TestpmdFailed(RuntimeError):
    """It ended, or did not answer; the message holds what it said."""


def missing(*drivers: str) -> str:
    """What keeps testpmd with these drivers (`net_vhost`, ...) from running here; empty when nothing does."""
    if shutil.which(PROGRAM) is None:
        return f"there is no {PROGRAM}"
    absent = [name for name in drivers if not list(Path("/").glob(f"{_DRIVERS[1:]}librte_{name}.so*"))]
    return f"DPDK here lacks {', '.join(absent)}" if absent else ""


class Testpmd:
    """Runs in the foreground of one processor. `vdevs` are its ports, in order. No huge pages, no PCI, no root."""

    __test__ = False  # not a test, for all its name

    def __init__(
        self,
        directory: Path,
        vdevs: Sequence[str],
        *options: str,
        processor: int = 0,
        memory_mib: int = MEMORY_MIB,
        urgent: bool = False,
        system: Sequence[str] = (),
    ) -> None:
        """`options` are testpmd's own, `system` more of those of DPDK's environment layer. `urgent`: before everything
        else that wants the processor, where this user may ask for that."""
        self.command_line = [
            *(("nice", "-n", "-20") if urgent and os.geteuid() == 0 else ()),
            # Its prompt goes out at once, but what it prints waits in a buffer unless it is told otherwise.
            *("stdbuf", "-oL"),
            PROGRAM,
            *("--lcores", f"(0,1)@{processor}"),
            *("--no-huge", "--single-file-segments", "-m", str(memory_mib)),
            *("--no-pci", "--no-telemetry", "--no-shconf", "--iova-mode", "va", "--file-prefix", directory.name),
            *("--log-level=lib.vhost*:error", *system),
            *(word for vdev in vdevs for word in ("--vdev", vdev)),
            *("--", "--interactive", "--total-num-mbufs=8192", "--mask-event=all", "--disable-link-check", *options),
        ]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory)}
        self.process = subprocess.Popen(
            self.command_line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment,
        )
        self.output = ""
        try:
            started = self._read_to_prompt(START_SECONDS)
            if "Start ports failed" in started or "failed to initialize" in started:
                raise TestpmdFailed(f"{' '.join(self.command_line)}\n{started}")
        except BaseException:
            self.kill()
            raise

    def tell(self, command: str) -> str:
        """Gives a command, and returns what was printed until the next prompt."""
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        return self._read_to_prompt(COMMAND_SECONDS)

    def await_link(self, port: int = 0, seconds: float = COMMAND_SECONDS) -> None:
        """Until a port's link is up: of a vhost port, until a front-end has its rings running."""
        deadline = time.monotonic() + seconds
        while "Link status: up" not in self.tell(f"show port info {port}"):
            if time.monotonic() >= deadline:
                raise TestpmdFailed(f"port {port} has no link after {seconds:g} s")

    def counts(self, port: int) -> dict[str, int]:
        """RX-packets, TX-packets and so on, of a port."""
        text = self.tell(f"show port stats {port}")
        return {name: int(number) for name, number in re.findall(r"([RT]X-[a-z]+): *(\d+)", text)}

    def await_count(self, port: int, name: str, count: int, seconds: float = COMMAND_SECONDS) -> None:
        """Until a port has counted so many. Raises TestpmdFailed, saying how far it got."""
        deadline = time.monotonic() + seconds
        while (seen := self.counts(port)[name]) < count:
            if time.monotonic() >= deadline:
                raise TestpmdFailed(f"port {port}: {name} is {seen} after {seconds:g} s, not {count}")

    def quit(self) -> None:
        """An orderly end, which is when it writes out its pcap files."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"quit\n")
        self.process.stdin.close()
        try:
            self.process.wait(COMMAND_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass

    def __enter__(self) -> Testpmd:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _read_to_prompt(self, seconds: float) -> str:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + seconds
        text = ""
        while PROMPT not in text:
            left = deadline - time.monotonic()
            ready = select.select([fd], [], [], max(left, 0))[0]
            piece = os.read(fd, 1 << 16) if ready else b""
            if not piece:
                why = "ended" if ready else f"said nothing for {seconds:g} s"
                raise TestpmdFailed(f"{' '.join(self.command_line)}\n{why}:\n{(self.output + text)[-3000:]}")
            text += piece.decode(errors="replace")
        self.output = (self.output + text)[-65536:]
        return text
