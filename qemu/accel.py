"""Which accelerator a guest gets, and why.

A /dev/kvm that opens proves nothing: nested or restricted hosts have one on which no guest runs. So KVM is believed
only once a guest's own kernel has reached its user space under it; the first boot is the trial. The verdict holds
for this boot of the host, this kernel and this QEMU, and is remembered as one small file in the cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qemu.cache import cache_root
from qemu.errors import AcceleratorUnavailable

VARIABLE = "QEMU_GUEST_ACCEL"
NAMES = ("auto", "kvm", "tcg")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
KVM = Path("/dev/kvm")


@dataclass(frozen=True)
class Accelerator:
    """The choice; str() of it has the reason in brief.

    `proven` is false for a KVM that no guest has run under yet: then a failed boot is to be expected.
    """

    name: Literal["kvm", "tcg"]
    reason: str
    proven: bool = True

    def __str__(self) -> str:
        return f"{self.name} ({in_brief(self.reason)})"


def in_brief(reason: str) -> str:
    """A reason for one line: of what QEMU said, quoted in it, only the first thing, and not its name once more."""
    before, quoted, words = reason.replace("guest never came up: ", "").partition(' and said "')
    if not quoted:
        return before
    first = words.removesuffix('"').partition("; ")[0]
    return f"{before}: {re.sub(r'^[^ ]*qemu[^ ]*: (error: )?', '', first)}"


def wanted_accelerator(argument: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """What was asked for: the argument, else the environment, else "auto". Raises ValueError on any other word."""
    given = argument if argument not in (None, "auto") else environ.get(VARIABLE) or "auto"
    if given not in NAMES:
        raise ValueError(f"the accelerator is one of {', '.join(NAMES)}, not {given!r} (argument or {VARIABLE})")
    return given


def choose_accelerator(
    wanted: str | None = None,
    *,
    kernel: Path,
    program: str = "qemu-system-x86_64",
    cache: Path | None = None,
    device: Path = KVM,
    environ: Mapping[str, str] = os.environ,
) -> Accelerator:
    """Choose for a guest with that kernel. Raises AcceleratorUnavailable when KVM is demanded and cannot be opened."""
    word = wanted_accelerator(wanted, environ)
    forced = f"demanded by {VARIABLE}" if wanted in (None, "auto") and word != "auto" else "demanded"
    if word == "tcg":
        return Accelerator("tcg", forced)
    obstacle = _cannot_open(device)
    if word == "kvm":
        if obstacle:
            raise AcceleratorUnavailable(f"KVM was {forced}, but {obstacle}")
        return Accelerator("kvm", forced)
    if obstacle:
        return Accelerator("tcg", f"kvm: {obstacle}")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        verdict = json.loads(_verdict(kernel, program, cache).read_text())
        if verdict["name"] in ("kvm", "tcg"):
            return Accelerator(verdict["name"], str(verdict["reason"]))
    return Accelerator("kvm", f"{device} opens; no guest has run under it yet", proven=False)


def expectation(
    wanted: str | None = None,
    *,
    cache: Path | None = None,
    device: Path = KVM,
    environ: Mapping[str, str] = os.environ,
) -> str:
    """What can be said of the choice before it is known which kernel it is for: for a line at the start of a run."""
    word = wanted_accelerator(wanted, environ)
    if word != "auto":
        return f"{word} (demanded)"
    if obstacle := _cannot_open(device):
        return f"tcg (kvm: {obstacle})"
    verdicts = sorted(_verdicts(cache).glob(f"{_boot()}-*.json"), key=lambda path: path.stat().st_mtime)
    for path in verdicts[-1:]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            verdict = json.loads(path.read_text())
            return str(Accelerator(verdict["name"], str(verdict["reason"])))
    return f"auto ({device} opens; the first guest will show whether it runs guests)"


def remember(
    accelerator: Accelerator, *, kernel: Path, program: str = "qemu-system-x86_64", cache: Path | None = None
) -> None:
    """Keep the verdict until the host is booted again. That it cannot be kept costs time, not correctness."""
    path = _verdict(kernel, program, cache)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"name": accelerator.name, "reason": accelerator.reason}))
        partial.rename(path)


def _cannot_open(device: Path) -> str | None:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EACCES:
            return f"{device} may not be opened by this user (add it to the group kvm)"
        return f"{device} cannot be opened ({error.strerror})"
    return None


def _verdicts(cache: Path | None) -> Path:
    return (cache or cache_root()) / "accel"


def _boot() -> str:
    """What tells this boot of the host from any other."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"


def _verdict(kernel: Path, program: str, cache: Path | None) -> Path:
    digest = hashlib.sha256()
    digest.update(kernel.read_bytes())
    binary = shutil.which(program)
    if binary is not None:
        status = Path(binary).stat()
        digest.update(f"{Path(binary).resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return _verdicts(cache) / f"{_boot()}-{digest.hexdigest()[:24]}.json"
