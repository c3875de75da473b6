"""A machine of metal in place of a guest: the same agent and the same verbs, over ssh or any other command.

A box is described by a TOML file (paths and addresses are examples):

    name = "bench-3"
    host = "root@bench-3"                 # for ssh
    nic = "0000:03:00.0"                  # the function that tests may take
    connect = ["ssh", "-o", "BatchMode=yes", "{host}"]
    console = ["conserver", "-M", "hub", "bench-3"]   # optional: prints what comes by the serial port
    power = ["fence", "{host}", "{action}"]           # optional: action is on, off or cycle

`connect` is a command that takes one more argument, a line for the shell of the box, and joins its standard streams
with ours. Nothing is installed there: the agent travels over it, and ends with it; what tests need is put into a new
directory below /var/tmp, and removed at the end. The box needs Python 3.9 or later.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import signal as signals
import socket
import subprocess
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from qemu.agent import Agent
from qemu.console import TROUBLE, Console
from qemu.errors import GuestLost, HarnessError, ToolMissing
from qemu.inside import Inside
from qemu.settings import read_toml

AGENT = Path(__file__).parents[1] / "images" / "agent"
GREET_SECONDS = 30.0
POWER_SECONDS = 60.0
LEAVE_SECONDS = 10.0
RETRY_SECONDS = 2.0
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "{host}")
ACTIONS = ("on", "off", "cycle")
ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")

# Runs there: reads the agent from its input, gives it a socket, and carries bytes between that and the two streams.
# When they end, however that came about, the directory goes. In /var/tmp, as /run may be mounted noexec.
BOOTSTRAP = """
import os, select, shutil, socket, sys, tempfile
def exactly(count):
    data = b""
    while len(data) < count:
        part = os.read(0, count - len(data))
        if not part:
            sys.exit(1)
        data += part
    return data
archive = exactly(int.from_bytes(exactly(4), "big"))
scratch = tempfile.mkdtemp(prefix="harness-", dir="/var/tmp")
os.chmod(scratch, 0o755)
with open(scratch + "/agent.zip", "wb") as file:
    file.write(archive)
os.environ.update(HARNESS_SCRATCH=scratch, PYTHONPATH=scratch + "/code")
def end():
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)
ours, theirs = socket.socketpair()
child = os.fork()
if not child:
    ours.close()
    os.setsid()
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.path.insert(0, scratch + "/agent.zip")
    from agent.main import main
    os._exit(main(["--fd", str(theirs.fileno())]))
theirs.close()
ends = {0: ours.fileno(), ours.fileno(): 1}
poll = select.poll()
for fd in ends:
    poll.register(fd, select.POLLIN)
while True:
    for fd, _ in poll.poll():
        try:
            data = os.read(fd, 1 << 16)
            if not data:
                end()
            while data:
                data = data[os.write(ends[fd], data):]
        except OSError:
            end()
"""


@dataclass(frozen=True)
class BoxDescription:
    """What there is to know about a box. Empty commands are those it does not have."""

    name: str
    host: str
    nic: str
    connect: tuple[str, ...]
    console: tuple[str, ...] = ()
    power: tuple[str, ...] = ()
    python: str = "python3"

    @classmethod
    def load(cls, path: Path) -> BoxDescription:
        """Raises RecipeError, naming file, key and what was expected."""
        table = read_toml(path)
        made = cls(
            name=table.string("name", "a name", default=path.stem),
            host=table.string("host", 'whom ssh is to call, such as "root@bench-3"'),
            nic=table.string("nic", 'a PCI address such as "0000:03:00.0"', valid=ADDRESS.fullmatch),
            connect=table.strings("connect", "a command", default=SSH, repeated=True),
            console=table.strings("console", "a command that prints the serial console", default=(), repeated=True),
            power=table.strings("power", "a command with {action} in it", default=(), repeated=True),
            python=table.string("python", "the name of Python there", default=cls.python),
        )
        if made.power and not any("{action}" in word for word in made.power):
            table.refuse("power", "a command with {action} in it")
        table.finish()
        return made

    def words(self, command: Sequence[str], action: str = "") -> list[str]:
        """A command with what stands in braces filled in."""
        return [word.replace("{host}", self.host).replace("{action}", action) for word in command]


class Box(Inside):
    """A box that is connected. Ended by close() or by leaving the with block; the box itself goes on running."""

    def __init__(self, description: BoxDescription, artefacts: Path):
        """Raises ToolMissing, or GuestLost with what the connecting command said."""
        self.description = description
        self.artefacts = artefacts
        artefacts.mkdir(parents=True, exist_ok=True)
        self.scratch = ""
        """A directory of the box that goes with the connection; Python there looks for modules in `code` below it."""
        self._console: Console | None = None
        self._log_before = 0
        with contextlib.ExitStack() as stack:
            if description.console:
                self._listen(stack)
            self._connect()
            stack.callback(self._hang_up)
            self._stack = stack.pop_all()
        self._log_before = len(self.dmesg().splitlines())

    def _listen(self, stack: contextlib.ExitStack) -> None:
        ours, theirs = socket.socketpair()
        self._console = Console(ours)
        stack.callback(self._console.close)
        command = self.description.words(self.description.console)
        with theirs:
            tail = _start(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
        stack.callback(_end, tail)

    def _connect(self) -> None:
        line = shlex.join(["exec", self.description.python, "-I", "-S", "-c", BOOTSTRAP])
        command = [*self.description.words(self.description.connect), line]
        ours, theirs = socket.socketpair()
        words = self.artefacts / "connect.log"
        try:
            with theirs, words.open("ab") as log:
                self._link = _start(command, stdin=theirs, stdout=theirs, stderr=log)
        except BaseException:
            ours.close()
            raise
        archive = agent_archive()
        try:
            ours.sendall(len(archive).to_bytes(4, "big") + archive)
        except OSError:
            pass  # it has ended already: the agent's channel tells
        ended = f"the connection to {self.description.name} has ended"
        self.agent = Agent(ours, why_closed=lambda: f"{ended}: {_last(words)}")
        try:
            self.agent.wait_ready(GREET_SECONDS)
            self.scratch = str(self.eval("import os; os.environ['HARNESS_SCRATCH']"))
        except BaseException:
            self._hang_up()
            raise

    def _hang_up(self) -> None:
        self.agent.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._link.wait(LEAVE_SECONDS)  # the other end tidies up, and then ends it
        _end(self._link)

    @property
    def lost(self) -> HarnessError | None:
        if self.agent.ready:
            return None
        return GuestLost(f"{self.description.name} does not answer any more")

    def kernel_trouble(self) -> list[str]:
        if self._console is not None:
            return list(self._console.trouble)
        return [line for line in self.dmesg().splitlines()[self._log_before :] if TROUBLE.search(line)]

    def power(self, action: str) -> None:
        """Switch it on, off, or off and on. Raises HarnessError when the box has no such command or it fails."""
        if action not in ACTIONS:
            raise ValueError(f"a power action is one of {', '.join(ACTIONS)}, not {action!r}")
        if not self.description.power:
            raise HarnessError(f"{self.description.name}: its description has no power command")
        command = self.description.words(self.description.power, action)
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=POWER_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HarnessError(f"{shlex.join(command)}: {error}") from error
        if done.returncode != 0:
            raise HarnessError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}")

    def reconnect(self, timeout: float) -> None:
        """Connect anew, as to a box that has just been switched on. Raises GuestLost when it does not answer."""
        self._hang_up()
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._connect()
                break
            except GuestLost as error:
                if time.monotonic() + RETRY_SECONDS > deadline:
                    raise GuestLost(f"{self.description.name} did not answer within {timeout:g} s: {error}") from error
                time.sleep(RETRY_SECONDS)  # there is nothing to wait for: it is not there
        self._log_before = 0

    def close(self) -> None:
        """Keep what is to be kept, and hang up. May be called again."""
        if self.agent.ready:
            with contextlib.suppress(HarnessError, OSError):
                (self.artefacts / "dmesg.log").write_text(self.dmesg() + "\n")
        if self._console is not None:
            (self.artefacts / "console.log").write_text("\n".join(self._console.lines()) + "\n")
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def agent_archive() -> bytes:
    """The guest's agent as a zip file that Python imports from; not compressed, as the box may lack zlib."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(AGENT.glob("*.py")):
            archive.write(file, f"agent/{file.name}")
    return made.getvalue()


def _start(command: Sequence[str], **streams: object) -> subprocess.Popen[bytes]:
    if shutil.which(command[0]) is None:
        raise ToolMissing(f"{command[0]} is not installed; the description of the box names it")
    return subprocess.Popen(command, start_new_session=True, **streams)  # type: ignore[call-overload,no-any-return]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signals.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
