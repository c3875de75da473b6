"""The life of one QEMU process: started under a supervisor, watched, ended. It never outlives this one.

See supervise.py for how that is made sure of.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal as signals
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from qemu.errors import HarnessError, ToolMissing

KILL_SECONDS = 10.0


class Process:
    """A running program. `on_exit` is called, from a thread, as soon as it has ended for whatever reason.

    `fds` are inherited under their own numbers; `log` gets its stdout and stderr. Raises ToolMissing when there is
    no such program.
    """

    def __init__(
        self, argv: Sequence[str], *, log: Path, fds: Sequence[int] = (), on_exit: Callable[[], None] = lambda: None
    ):
        program = shutil.which(argv[0])
        if program is None:
            raise ToolMissing(f"{argv[0]} is not installed: apt-get install qemu-system-x86")
        self.argv = (program, *argv[1:])
        self.log = log
        self.pid: int | None = None
        self.returncode: int | None = None
        """Once it has ended: its exit code, negative for a signal."""
        self._on_exit = on_exit
        self._changed = threading.Condition()
        self._gone = False
        self._lifeline, theirs = socket.socketpair()
        script = Path(__file__).with_name("supervise.py")
        try:
            with log.open("wb") as output:
                self._supervisor = subprocess.Popen(
                    # In a session of its own: Ctrl-C is for us, and we end it in good order.
                    [sys.executable, "-I", "-S", str(script), str(os.getpid()), str(theirs.fileno()), *self.argv],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(theirs.fileno(), *fds),
                    start_new_session=True,
                )
        except BaseException:
            self._lifeline.close()
            raise
        finally:
            theirs.close()
        self._watcher = threading.Thread(target=self._watch, name="qemu watcher", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        with self._lifeline.makefile("rb") as reports:
            for report in reports:
                word, _, number = report.partition(b" ")
                with self._changed:
                    if word == b"pid":
                        self.pid = int(number)
                    elif word == b"exit":
                        self.returncode = int(number)
                    self._changed.notify_all()
        self._supervisor.wait()
        with self._changed:
            if self.returncode is None:  # the supervisor itself was killed, and the kernel took the program with it
                self.returncode = -signals.SIGKILL
            self._gone = True
            self._changed.notify_all()
        self._on_exit()

    @property
    def running(self) -> bool:
        return self.returncode is None

    def wait(self, timeout: float) -> bool:
        """Whether it has ended within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._gone, timeout)

    def kill(self) -> None:
        """End it, by force, and return when it is gone; nothing happens when it is gone already."""
        with contextlib.suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_WR)
        if not self.wait(KILL_SECONDS):
            self._supervisor.kill()
            if not self.wait(KILL_SECONDS):
                raise HarnessError(f"{self.argv[0]} (process {self.pid}) survives SIGKILL: stuck in the host's kernel?")
        self._watcher.join()
        self._lifeline.close()

    def ending(self) -> str:
        """How it ended, in words, with the last it had to say."""
        if self.returncode is None:
            return f"{Path(self.argv[0]).name} is running"
        name = Path(self.argv[0]).name
        if self.returncode >= 0:
            how = f"{name} ended with exit code {self.returncode}"
        else:
            try:
                how = f"{name} was ended by {signals.Signals(-self.returncode).name}"
            except ValueError:
                how = f"{name} was ended by signal {-self.returncode}"
        words = self.last_words()
        return f'{how} and said "{words}"' if words else how

    def last_words(self, lines: int = 2) -> str:
        """The end of its stdout and stderr, in one line."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 8192))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "; ".join(text.strip().splitlines()[-lines:])

    def first_words(self) -> str:
        """The first line of its stdout and stderr: what comes before a dump of registers, for one."""
        try:
            with self.log.open("rb") as file:
                return file.readline(1000).decode(errors="replace").strip()
        except OSError:
            return ""

    def effort(self) -> tuple[float, float]:
        """Seconds of processor time that it has used, and seconds it has waited for a processor, of all threads.

        From their sum one can tell a process that does nothing from one that gets no turn on a busy machine.
        """
        used = waited = 0
        if self.pid is not None:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{self.pid}/task").iterdir():
                    with contextlib.suppress(OSError):
                        on, off, _ = (task / "schedstat").read_text().split()
                        used += int(on)
                        waited += int(off)
        return used / 1e9, waited / 1e9
