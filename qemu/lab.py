"""A box out of a labgrid farm: reserved, powered, and connected to, as the environment file says.

`--target lab:tests/lab/farm.yaml` takes the target "main" of that file, `#NAME` behind it another one. The target has

- a RemotePlace, if it is to be reserved: that waits until nobody else has it, locks it, and lets it go at the end. One
  that this user has locked already is used, and stays locked.
- a strategy (tests/lab/strategy.py has one) that knows the states "on" and "off", and an SSHDriver.
- a console, if it has one: what comes by it is kept, and looked through for complaints of the kernel.
- in `options` of the file, or on the command line: `nic` and `wire`, as for any box.

labgrid is an extra of this project (`pip install '.[lab]'`); its own options for pytest, such as --lg-env, may be used
beside.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qemu.box import ADDRESS, BoxDescription
from qemu.errors import HarnessError, ToolMissing

RESERVE_SECONDS = 3600.0
CLIENT_SECONDS = 60.0
READ_SECONDS = 0.5
TOKEN = re.compile(r"^Reservation '([A-Z0-9]+)':|\bLG_TOKEN=([A-Z0-9]+)", re.MULTILINE)
DEFAULT_COORDINATOR = "127.0.0.1:20408"


def _labgrid() -> Any:
    try:
        import labgrid
    except ImportError as error:
        raise ToolMissing("a target lab:… needs labgrid: pip install '.[lab]'") from error
    return labgrid


class Lab:
    """A target of an environment file. Raises ValueError on what is wrong in it, ToolMissing without labgrid."""

    def __init__(self, target: str, nic: str | None = None, wire: str | None = None):
        path, _, role = target.removeprefix("lab:").partition("#")
        role = role or "main"
        if not Path(path).is_file():
            raise ValueError(f"--target {target}: there is no file {path}")
        try:
            self._environment = _labgrid().Environment(config_file=path)
        except Exception as error:  # of several kinds, for YAML, imports and what they refer to
            raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
        config = self._environment.config
        targets = config.get_targets()
        if role not in targets:
            raise ValueError(f"{path} has no target {role!r}, only {', '.join(targets) or 'none'}")
        self.path = path
        self.role = role
        self.name = f"{role} of {path}"
        self.nic = nic or str(_option(config, "nic"))
        self.wire = wire or _option(config, "wire") or None
        if not ADDRESS.fullmatch(self.nic):
            raise ValueError(f'{path}: options: nic: expected a PCI address such as "0000:03:00.0", found {self.nic!r}')
        self.coordinator = os.environ.get("LG_COORDINATOR") or _option(config, "coordinator_address")
        places = (targets[role].get("resources") or {}).get("RemotePlace") or {}
        self.place: str | None = places.get("name") if isinstance(places, dict) else None
        self._target: Any = None

    @contextlib.contextmanager
    def acquired(self, artefacts: Path, say: Callable[[str], None]) -> Iterator[BoxDescription]:
        """The box, reserved and switched on. Raises HarnessError with what labgrid said."""
        with contextlib.ExitStack() as stack:
            if self.place is not None:
                stack.enter_context(self._reserved(say))
            try:
                self._target = self._environment.get_target(self.role)
                stack.callback(self._environment.cleanup)
                strategy = self._target.get_driver("Strategy", activate=False)
                stack.enter_context(self._listening(artefacts, strategy))
                say(f"switching {self.name} on")
                strategy.transition("on")
                description = self._described()
            except HarnessError:
                raise
            except Exception as error:
                raise HarnessError(f"{self.name}: {_reason(error)}") from error
            yield description

    def cycle(self) -> BoxDescription:
        """Off and on again: there is a new connection to describe."""
        try:
            strategy = self._target.get_driver("Strategy", activate=False)
            strategy.transition("off")
            strategy.transition("on")
        except Exception as error:
            raise HarnessError(f"{self.name}: {_reason(error)}") from error
        return self._described()

    def _described(self) -> BoxDescription:
        ssh = self._target.get_driver("SSHDriver")
        host = ssh.networkservice.address
        user = ssh.username or ssh.networkservice.username
        # By the connection that labgrid holds open, so that its passwords and proxies serve us, too.
        connect = ["ssh", "-x", *ssh.ssh_prefix, "-p", str(ssh.networkservice.port), "-l", user, host]
        return BoxDescription(name=self.place or self.role, host=host, nic=self.nic, connect=tuple(connect))

    @contextlib.contextmanager
    def _listening(self, artefacts: Path, strategy: Any) -> Iterator[None]:
        """What comes by the console goes to a file meanwhile."""
        console = getattr(strategy, "console", None)
        if console is None:
            yield
            return
        artefacts.mkdir(parents=True, exist_ok=True)
        self._target.activate(console)
        over = threading.Event()

        def read() -> None:
            with (artefacts / "serial.log").open("wb") as log:
                while not over.is_set():
                    try:
                        log.write(console.read(timeout=READ_SECONDS))
                        log.flush()
                    except Exception as error:  # nothing came; or the line has gone, which is no trouble of a test
                        if type(error).__name__ != "TIMEOUT":
                            return

        reader = threading.Thread(target=read, name="serial console", daemon=True)
        reader.start()
        try:
            yield
        finally:
            over.set()
            reader.join()

    @contextlib.contextmanager
    def _reserved(self, say: Callable[[str], None]) -> Iterator[None]:
        who = f"{socket.gethostname()}/{os.environ.get('LG_USERNAME') or _user()}"
        if f"acquired: {who}" in self._client("-p", str(self.place), "show"):
            yield
            return
        say(f"waiting for the place {self.place}")
        said = self._client("reserve", "--wait", f"name={self.place}", seconds=RESERVE_SECONDS)
        found = TOKEN.search(said)
        if found is None:
            raise HarnessError(f"labgrid-client reserve gave no token: {said.strip()}")
        token = found[1] or found[2]
        try:
            self._client("-p", str(self.place), "lock")
            try:
                yield
            finally:
                self._client("-p", str(self.place), "unlock")
        finally:
            self._client("cancel-reservation", token)

    def _client(self, *words: str, seconds: float = CLIENT_SECONDS) -> str:
        beside = Path(sys.executable).with_name("labgrid-client")
        program = str(beside) if beside.exists() else shutil.which("labgrid-client")
        if program is None:
            raise ToolMissing("labgrid-client is not installed: pip install '.[lab]'")
        command = [program, "-x", self.coordinator or DEFAULT_COORDINATOR, *words]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise HarnessError(f"labgrid-client {' '.join(words)}: not done within {seconds:g} s") from error
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise HarnessError(f"labgrid-client {' '.join(words)}: {last[0] if last else done.returncode}")
        return done.stdout


def _option(config: Any, name: str) -> Any:
    return config.get_option(name, "")


def _user() -> str:
    import getpass

    return getpass.getuser()


def _reason(error: BaseException) -> str:
    """What labgrid's own error stands for: a strategy that broke hides it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
