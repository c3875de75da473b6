"""The package as pip installs it, used from elsewhere: the packaged manifest, its program, the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where it is installed: built from a copy, since building leaves things behind."""
    place = tmp_path_factory.mktemp("installed")
    source, target = place / "source", place / "site"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    skip = shutil.ignore_patterns("__pycache__", "*.so", "_core.c", "*.o")
    for name in ("netbridge", "vfio"):
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    run(*command, "--no-build-isolation", "--target", str(target), str(source))
    yield target


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done  # type: ignore[no-any-return]


def test_the_packaged_manifest_is_found_by_name_and_is_the_same(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    told = run(sys.executable, "-m", "netbridge", "check", "net-bridge", cwd=tmp_path, env=environment).stdout
    packaged = installed / "netbridge/vnode/net-bridge/vnode.yml"
    assert told.startswith(f"{packaged}: net-bridge 0.1.0, nothing wrong\n")
    assert packaged.read_bytes() == (ROOT / "netbridge/vnode/net-bridge/vnode.yml").read_bytes()


def test_the_program_can_be_started_and_is_what_the_monitor_starts(installed: Path, tmp_path: Path) -> None:
    program = installed / "netbridge/vnode/net-bridge/bin/net-bridge.vnode"
    assert os.access(program, os.X_OK)
    by_hand = subprocess.run([program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (by_hand.returncode, by_hand.stderr) == (
        2,
        "this is the driver process of a V-Node; start it with: netbridge run\n",
    )
    ask = (
        "from netbridge.vnode.manifest import Manifest; from netbridge.vnode.process import driver_command; "
        "print(*driver_command(Manifest.find('net-bridge')), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = run(sys.executable, "-c", ask, cwd=tmp_path, env=environment).stdout.splitlines()
    assert str(program) in command
    # All its modules are found without the environment: without the channel to a monitor it says what it is.
    driver = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env={})
    assert driver.returncode == 2
    assert driver.stderr.startswith("this is the driver process")


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    assert "run" in run(str(installed / "bin/netbridge"), "--help", cwd=tmp_path, env=environment).stdout
