"""A guest that does not come up, a KVM that opens and cannot run one, a guest that is lost: each is told quickly, and
for what it is.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import qemu.guest
from qemu import accel
from qemu.errors import AcceleratorUnavailable, GuestLost, GuestNeverCameUp, GuestPanicked
from qemu.guest import Guest, Nic, boot
from qemu.images import Image
from qemu.session import Session
from tests.e2e.patience import ROOT, alive, patience, wait_gone

BUSYBOX = "/usr/lib/guest/busybox"


# A guest that does not come up


@pytest.fixture
def told_after(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[float], None]:
    """Trouble was told now that began then: within the time that there is for it."""

    def note(began: float) -> None:
        seconds = time.monotonic() - began
        record_property("told_after_s", round(seconds, 2))
        print(f"{request.node.name}: told after {seconds:.1f} s")
        assert seconds < patience()

    return note


def fails(guests: Session, artefacts: Path, *append: str) -> Exception:
    """What booting with these words on the command line ends in."""
    with pytest.raises((GuestNeverCameUp, GuestPanicked)) as caught:
        boot(guests.image(), artefacts=artefacts, accel="tcg", append=append)
    processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    assert [pid for pid in processes if str(artefacts) in command_line(pid)] == []
    return caught.value


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


INIT = (f"rdinit={BUSYBOX}", "--")


@pytest.mark.parametrize(
    ("words", "kind", "first", "more"),
    [
        pytest.param(
            ("rdinit=/nonexistent", "root=/dev/nowhere"),
            *(GuestPanicked, "Kernel panic - not syncing", "VFS"),
            id="a-kernel-that-panics",
        ),
        pytest.param((*INIT, "true"), GuestPanicked, "Attempted to kill init", "Kernel panic", id="an-init-that-ends"),
        pytest.param((*INIT, "sleep", "1000"), GuestNeverCameUp, "idle and silent", "", id="a-hang"),
        pytest.param(
            (*INIT, "awk", "BEGIN{while(1);}"), GuestNeverCameUp, "used 6 s of processor time", "", id="a-loop"
        ),
        pytest.param(
            (*INIT, "yes", "a-flood-" * 20), GuestNeverCameUp, "flooded its console", "a-flood-a-flood", id="a-flood"
        ),
        pytest.param((*INIT, "poweroff", "-f"), GuestNeverCameUp, "ended with exit code 0", "", id="a-power-off"),
    ],
)
def test_at_boot(
    guests: Session,
    artefacts: Path,
    monkeypatch: pytest.MonkeyPatch,
    told_after: Callable[[float], None],
    words: Sequence[str],
    kind: type[Exception],
    first: str,
    more: str,
) -> None:
    monkeypatch.setattr(qemu.guest, "SPIN_SECONDS", 6.0)  # half of what there is: twice what a boot takes
    began = time.monotonic()
    failure = fails(guests, artefacts, *words)
    told_after(began)
    assert type(failure) is kind
    assert first in str(failure).splitlines()[0]
    assert more in str(failure)
    assert "end of" in str(failure) or "its console is empty" in str(failure)


def test_a_machine_that_qemu_refuses(guests: Session, artefacts: Path, told_after: Callable[[float], None]) -> None:
    began = time.monotonic()
    with pytest.raises(GuestNeverCameUp, match=r"ended with exit code 1 and said .*no-such-device"):
        boot(guests.image(), artefacts=artefacts, accel="tcg", extra_args=["-device", "no-such-device"])
    told_after(began)


# The accelerator


# A QEMU that does under KVM what it is told to in its first line, and is itself otherwise.
BAD_QEMU = """\
#!{python}
import json, os, re, signal, socket, sys, time
if "kvm" not in sys.argv:
    os.execv({real!r}, sys.argv)
how = {how!r}
if how == "abort":
    print({words!r}, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
control = next(word for word in sys.argv if word.endswith("id=control"))
qmp = socket.socket(fileno=int(re.search("fd=([0-9]+)", control)[1]))
def tell(**what):
    qmp.sendall(json.dumps(what).encode() + b"\\n")
version = {{"qemu": {{"major": 7, "minor": 2, "micro": 0}}, "package": ""}}
tell(QMP={{"version": version, "capabilities": []}})
while asked := qmp.recv(65536):  # one at a time: the next comes when this one is answered
    asked = json.loads(asked)
    tell(**{{"return": {{"status": "internal-error"}}, "id": asked.get("id")}})
    if asked["execute"] == "qmp_capabilities":
        if how == "internal-error":
            print({words!r}, file=sys.stderr, flush=True)
            tell(event="STOP", timestamp={{"seconds": 0, "microseconds": 0}})
        while how == "spin":
            pass
"""


@pytest.fixture
def kvm_that(artefacts: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a /dev/kvm that opens, with a QEMU that cannot run a guest with it: aborts, stops, spins, or does nothing.
    Gives what that QEMU says on its stderr."""
    words = "error: failed to set MSR 0x48f to 0x7fffff00036dfb"
    real = shutil.which("qemu-system-x86_64")
    device = artefacts / "kvm"
    device.touch()
    fake = artefacts / "bin" / "qemu-system-x86_64"
    fake.parent.mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(accel, "KVM", device)
    monkeypatch.setattr(accel, "cache_root", lambda: artefacts / "cache")
    monkeypatch.setattr(qemu.guest, "TRIAL_SECONDS", 3.0)  # of processor time, of which there may be little
    monkeypatch.delenv(accel.VARIABLE, raising=False)

    def make(how: str) -> str:
        fake.write_text(BAD_QEMU.format(python=sys.executable, real=real, how=how, words=words))
        fake.chmod(0o755)
        return words

    return make


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("abort", 'ended by SIGABRT and said "{}"'),
        ("internal-error", 'QEMU stopped the virtual machine for internal-error: "{}"'),
        ("spin", "it has used 3 s of processor time without a word on the console"),
        ("sleep", "it has been idle and silent for 4 s"),
    ],
)
def test_a_kvm_that_opens_and_cannot_run(
    guest_image: Image,
    artefacts: Path,
    kvm_that: Callable[[str], str],
    told_after: Callable[[float], None],
    how: str,
    said: str,
) -> None:
    words = kvm_that(how)
    reason = said.format(words)
    told: list[str] = []
    with boot(guest_image, artefacts=artefacts, nics=[Nic()], say=told.append) as guest:
        assert guest.accel.name == "tcg"
        assert "kvm opens, but" in guest.accel.reason
        assert reason in guest.accel.reason
        guest.wire.send(b"\xff" * 60)  # the wire has survived the change of QEMU
        assert guest.run(["true"]).returncode == 0
    assert len(told) == 1
    assert "trying tcg" in told[0]
    if words in reason:
        assert (artefacts / "qemu-kvm.log").read_text().strip() == words
    again = accel.choose_accelerator(kernel=guest_image.kernel, device=accel.KVM)
    assert (again.name, again.reason) == ("tcg", guest.accel.reason)
    began = time.monotonic()
    with pytest.raises(AcceleratorUnavailable, match=f"KVM was demanded, but under it: .*{re.escape(reason)}"):
        boot(guest_image, artefacts=artefacts, accel="kvm")
    told_after(began)


# A guest that is lost


def test_an_agent_that_dies_is_told_at_once_and_started_anew(
    guests: Session, told_after: Callable[[float], None]
) -> None:
    guest = guests.guest()
    assert guest.agent.hello is not None
    began = time.monotonic()
    sleeping = guest.start(["sleep", "1000"])
    guest.start(["kill", "-9", str(guest.agent.hello["pid"])])
    with pytest.raises(GuestLost, match=r"sleep 1000.*agent in the guest (has ended|died)"):
        sleeping.wait(60)
    told_after(began)
    guest.agent.wait_ready(patience(60))
    assert guest.run(["echo", "again"]).stdout == "again\n"
    assert guest.lost is None
    guest.run(["pkill", "-9", "-x", "sleep"], check=False)


def test_an_agent_that_is_stuck_is_told(guest: Guest, told_after: Callable[[float], None]) -> None:
    assert guest.agent.hello is not None
    began = time.monotonic()
    pid = guest.agent.hello["pid"]
    guest.start(["sh", "-c", f"kill -STOP {pid}; sleep 3; kill -CONT {pid}"])
    with pytest.raises(GuestLost, match=r"has not answered within 1 s"):
        for _ in range(1000):
            guest.agent.ping(timeout=1.0)
    told_after(began)
    assert guest.agent.ping(timeout=patience(60)) < patience(60)


def test_a_panic_of_a_guest_that_was_up(guests: Session, told_after: Callable[[float], None]) -> None:
    guest = guests.guest()
    began = time.monotonic()
    sleeping = guest.start(["sleep", "1000"])
    guest.start(["sh", "-c", "echo c >/proc/sysrq-trigger"])
    with pytest.raises(GuestLost, match=r"guest panicked: .*sysrq triggered crash"):
        sleeping.wait(60)
    told_after(began)
    assert isinstance(guest.lost, GuestPanicked)
    with pytest.raises(GuestLost, match="guest panicked"):
        guest.run(["true"])
    with pytest.raises((GuestPanicked, GuestLost)):
        guest.qmp("query-status")


def test_a_qemu_that_is_killed(guests: Session, told_after: Callable[[float], None]) -> None:
    guest = guests.guest()  # a new one: the last test has broken the one before
    assert guest.lost is None
    began = time.monotonic()
    sleeping = guest.start(["sleep", "1000"])
    assert guest._process.pid is not None
    os.kill(guest._process.pid, signal.SIGKILL)
    with pytest.raises(GuestLost, match=r"was ended by SIGKILL|has closed the agent's port"):
        sleeping.wait(60)
    told_after(began)
    deadline = time.monotonic() + 5
    while guest.lost is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "SIGKILL" in str(guest.lost)


ORPHAN = """
import sys, time
from pathlib import Path
from qemu.guest import Nic, boot
from qemu.images import Recipe, ensure_image
image = ensure_image(Recipe.load(Path("images/trixie.toml")))
guest = boot(image, artefacts=Path(sys.argv[1]), nics=[Nic()], accel="tcg")
print(guest._process.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_qemu_is_left_when_its_parent_goes(artefacts: Path, number: int) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(artefacts)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.send_signal(number)
    parent.communicate(timeout=60)
    wait_gone(pid)
