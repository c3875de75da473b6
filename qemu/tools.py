"""The host's programs that images are built with, and what to install when one is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from qemu.errors import ImageBuildFailed, ToolMissing

PACKAGES = {
    "apt-get": "apt",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "gcc": "gcc",
    "make": "make",
    "lz4": "lz4",
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "nice": "coreutils",
    "readelf": "binutils",
    "setpriv": "util-linux",
    "tar": "tar",
    "zstd": "zstd",
}
"""The Debian and Ubuntu package that brings each program."""

TAIL_LINES = 20


def find_tool(name: str) -> str:
    """The program's path. Raises ToolMissing, with the package to install."""
    # Some of them live where only root's PATH leads.
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        package = PACKAGES.get(os.path.basename(name))  # noqa: PTH119 - a name, not a path
        hint = f"install it: apt-get install {package}" if package else "is the path right?"
        raise ToolMissing(f"{name} is needed to build a guest and is not installed; {hint}")
    return path


def run_tool(argv: Sequence[str], *, doing: str, input_data: bytes | None = None) -> bytes:
    """Run a program that takes seconds at most, and return its output.

    Raises ToolMissing, or ImageBuildFailed with `doing` and the end of what it said.
    """
    done = subprocess.run([find_tool(argv[0]), *argv[1:]], input=input_data, capture_output=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise ImageBuildFailed(f"{doing}: {argv[0]} ended with {done.returncode}:\n{last_lines(said)}")
    return done.stdout


def last_lines(text: str, count: int = TAIL_LINES) -> str:
    """The end of a program's output, indented for an error message."""
    lines = text.strip().splitlines()[-count:]
    return "\n".join(f"    {line}" for line in lines) or "    (it said nothing)"
