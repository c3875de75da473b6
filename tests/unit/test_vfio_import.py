"""Importing vfio is fast, light, and does nothing."""

from __future__ import annotations

import subprocess
import sys

import vfio

# What a driver process must not pay for just because it uses this package.
HEAVY = {"typing", "dataclasses", "inspect", "asyncio", "ctypes", "cffi", "json", "subprocess", "socket", "re", "enum"}


def python(code: str) -> str:
    # -I and -S: neither what PYTHON* variables ask for nor what site-packages import by themselves.
    path = [entry for entry in sys.path if entry]
    code = f"import sys; sys.path[:] = {path!r}\n{code}"
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True).stdout


def test_it_takes_less_than_50_ms() -> None:
    # Of the processor: what else the machine does meanwhile is not the package's doing.
    code = "import time; t = time.process_time(); import vfio; print(time.process_time() - t)"
    assert min(float(python(code)) for _ in range(5)) < 0.050


def test_it_drags_nothing_heavy_in() -> None:
    loaded = set(python("import vfio; print(*sys.modules)").split())
    assert "vfio.device" in loaded
    assert loaded & HEAVY == set()


def test_it_stays_under_two_mebibytes() -> None:
    code = """
def resident():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1])
before = resident()
import vfio
print(resident() - before)
"""
    # The first one may have to compile it.
    assert min(int(python(code)) for _ in range(2)) < 2048


def test_it_has_no_side_effects() -> None:
    code = """
import os, threading, warnings
def state():
    return sorted(os.listdir("/proc/self/fd")), threading.active_count(), dict(os.environ), os.umask(0o022)
before = state()
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and args[1] not in ("r", "rb") else None)
import vfio
assert state() == before
print(*[path for path in opened if ".pyc" not in str(path)])
"""
    assert python(code).split() == []


def test_everything_public_is_documented() -> None:
    for name in vfio.__all__:
        thing = getattr(vfio, name)
        if isinstance(thing, (int, tuple)) and not isinstance(thing, type):
            continue
        assert thing.__doc__, name
        if isinstance(thing, type) and thing.__module__.startswith("vfio"):
            for method, value in vars(thing).items():
                if method.startswith("_") or not (callable(value) or isinstance(value, (property, classmethod))):
                    continue
                assert getattr(value, "__doc__", None), f"{name}.{method}"
