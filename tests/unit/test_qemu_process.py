"""The life of a process under the supervisor, with other programs in QEMU's place."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qemu.errors import ToolMissing
from qemu.process import Process
from tests.e2e.patience import ROOT, alive, wait_gone


def wait_pid(process: Process) -> int:
    deadline = time.monotonic() + 10
    while process.pid is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process.pid


def test_exit_code_output_and_callback(tmp_path: Path) -> None:
    ended = threading.Event()
    process = Process(["sh", "-c", "echo out; echo err >&2; exit 3"], log=tmp_path / "log", on_exit=ended.set)
    assert process.wait(10)
    assert ended.wait(10)
    assert process.returncode == 3
    assert process.ending() == 'sh ended with exit code 3 and said "out; err"'
    process.kill()


def test_a_signal_is_named(tmp_path: Path) -> None:
    process = Process(["sh", "-c", "kill -ABRT $$"], log=tmp_path / "log")
    assert process.wait(10)
    assert process.returncode == -signal.SIGABRT
    assert "was ended by SIGABRT" in process.ending()
    process.kill()


def test_kill(tmp_path: Path) -> None:
    process = Process(["sleep", "100"], log=tmp_path / "log")
    pid = wait_pid(process)
    assert alive(pid)
    assert process.running
    process.kill()
    assert not alive(pid)
    assert process.returncode == -signal.SIGKILL


def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="no-such-qemu is not installed: apt-get install"):
        Process(["no-such-qemu"], log=tmp_path / "log")


def test_descriptors_are_inherited_under_their_numbers(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    code = f"import os; os.write({there.fileno()}, b'hello')"
    process = Process([sys.executable, "-c", code], log=tmp_path / "log", fds=[there.fileno()])
    there.close()
    here.settimeout(10)
    assert here.recv(100) == b"hello"
    assert here.recv(100) == b""  # nobody else holds the other end
    process.kill()
    here.close()


def test_idle_and_busy_can_be_told_apart(tmp_path: Path) -> None:
    idle = Process(["sleep", "100"], log=tmp_path / "idle")
    busy = Process(["sh", "-c", "while :; do :; done"], log=tmp_path / "busy")
    wait_pid(idle)
    wait_pid(busy)
    deadline = time.monotonic() + 20
    used = [1.0, 0.0]
    while not (used[0] < 0.03 and used[1] > 0.15):  # at first even the idle one has to start
        assert time.monotonic() < deadline, f"idle {used[0]:.3f} s, busy {used[1]:.3f} s of 0.3 s"
        before = [sum(process.effort()) for process in (idle, busy)]
        time.sleep(0.3)
        used = [sum(process.effort()) - was for process, was in zip((idle, busy), before, strict=True)]
    idle.kill()
    busy.kill()


OWNER = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from qemu.process import Process
from tests.e2e.patience import ROOT, alive, wait_gone
process = Process(["sleep", "1000"], log=Path({log!r}))
while process.pid is None:
    time.sleep(0.01)
{more}
print(process.pid, flush=True)
time.sleep(1000)
"""


def owner(tmp_path: Path, more: str = "") -> tuple[subprocess.Popen[str], int]:
    code = OWNER.format(root=str(ROOT), log=str(tmp_path / "log"), more=more)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline().split()[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV])
def test_nothing_is_left_however_the_owner_ends(tmp_path: Path, number: int) -> None:
    parent, pid = owner(tmp_path)
    assert alive(pid)
    parent.send_signal(number)
    parent.communicate()
    wait_gone(pid)


def test_nothing_is_left_when_a_child_of_the_owner_holds_its_descriptors(tmp_path: Path) -> None:
    forked = tmp_path / "forked"
    parent, pid = owner(
        tmp_path, f"if os.fork() == 0: Path({str(forked)!r}).write_text(str(os.getpid())); time.sleep(100)"
    )
    while not (forked.exists() and forked.read_text()):
        time.sleep(0.01)
    child = int(forked.read_text())
    parent.kill()
    parent.wait()
    wait_gone(pid)
    assert alive(child)
    os.kill(child, signal.SIGKILL)
    assert parent.stdout is not None
    parent.stdout.close()


def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    process = Process(["sleep", "100"], log=tmp_path / "log")
    pid = wait_pid(process)
    process._supervisor.kill()
    wait_gone(pid)
    assert process.wait(5)
    assert process.returncode == -signal.SIGKILL
    process.kill()


def test_a_thread_that_ends_does_not_take_the_program_with_it(tmp_path: Path) -> None:
    made: list[Process] = []
    starter = threading.Thread(target=lambda: made.append(Process(["sleep", "100"], log=tmp_path / "log")))
    starter.start()
    starter.join()
    pid = wait_pid(made[0])
    time.sleep(0.1)
    assert alive(pid)
    made[0].kill()
