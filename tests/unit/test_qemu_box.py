"""A box, played by a shell of this machine: what goes over ssh elsewhere goes over `sh -c` here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from coverage import CoverageData

from qemu.box import Box, BoxDescription
from qemu.errors import GuestLost, HarnessError, RecipeError, ToolMissing
from qemu.remote import RemoteTests
from tests.measure_coverage import counted, make_compiler

LOCAL = f"""
host = "here"
nic = "0000:03:00.0"
connect = ["sh", "-c"]
python = "{sys.executable}"
"""


def described(tmp_path: Path, more: str = "", text: str = LOCAL) -> BoxDescription:
    path = tmp_path / "box.toml"
    path.write_text(text + more)
    return BoxDescription.load(path)


@pytest.fixture(autouse=True)
def readable_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of this machine's kernel may be nobody's business."""
    monkeypatch.setattr(Box, "dmesg", lambda _: "[    0.000000] Linux version")


def test_a_box_does_what_a_guest_does(tmp_path: Path) -> None:
    with Box(described(tmp_path), tmp_path / "out") as box:
        assert box.lost is None
        assert box.run(["echo", "hello"]).stdout == "hello\n"
        assert box.eval("1 + 1") == 2
        box.put(b"x" * 100_000, str(tmp_path / "file"))
        assert box.get(str(tmp_path / "file")) == b"x" * 100_000
        with box.start(["sh", "-c", "echo ready; sleep 100"]) as process:
            process.wait_for_line("ready", 10)
        assert box.kernel_trouble() == []
        link, scratch = box._link.pid, Path(box.scratch)
        assert scratch.is_dir()
    assert "Linux version" in (tmp_path / "out" / "dmesg.log").read_text()
    assert not Path(f"/proc/{link}").exists()
    assert not scratch.exists()


@pytest.mark.thorough
def test_tests_run_on_a_box(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(): pass\ndef test_bad(): assert 0\n")
    with Box(described(tmp_path), tmp_path / "out") as box:
        options = ["-p", "no:cacheprovider", "-c", "/dev/null"]
        root = str(tmp_path)
        remote = RemoteTests(box, [root], root=root, log=tmp_path / "log", options=options)
        # The box's Python would be found by its name; here it is this one, which has pytest.
        box.start = lambda argv, **more: Box.start(box, [sys.executable, *argv[1:]], **more)  # type: ignore[method-assign]
        outcomes = {name: remote.run(f"test_it.py::{name}", None, 60)[1].outcome for name in ("test_it", "test_bad")}
        remote.close()
    assert outcomes == {"test_it": "passed", "test_bad": "failed"}


@pytest.mark.thorough
def test_what_was_measured_before_a_crash_is_kept(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "measured.py").write_text("def ran():\n    return 1\n\ndef lost():\n    return 2\n")
    (tmp_path / "code" / "test_it.py").write_text(
        "import ctypes, measured, os\n"
        "here = os.path.dirname(os.path.abspath(__file__))\n"
        "counted = ctypes.CDLL(os.path.join(here, 'counted.so'))\n"
        "def test_it(): assert measured.ran() and counted.ran()\n"
        "def test_crash(): measured.lost(); counted.lost(); os.kill(os.getpid(), 9)\n"
        "def test_after(): pass\n"
    )
    (tmp_path / "counted.c").write_text("int ran(void)\n{\nreturn 1;\n}\nint lost(void)\n{\nreturn 2;\n}\n")
    compiler = make_compiler(tmp_path)
    command = [str(compiler), "-fPIC", "-shared", "-o", "code/counted.so", "counted.c"]
    subprocess.run(command, check=True, cwd=tmp_path)
    kept = tmp_path / "coverage"
    kept.mkdir()
    with Box(described(tmp_path), tmp_path / "out") as box:
        root = str(tmp_path / "code")
        options = ["-p", "no:cacheprovider", "-c", "/dev/null"]
        remote = RemoteTests(
            box, [root], root=root, log=tmp_path / "log", options=options, coverage=kept, home=box.scratch
        )
        box.start = lambda argv, **more: Box.start(box, [sys.executable, *argv[1:]], **more)  # type: ignore[method-assign]
        assert remote.run("test_it.py::test_it", None, 60)[1].outcome == "passed"
        crash = remote.run("test_it.py::test_crash", None, 60)[-1]
        assert crash.outcome == "failed"
        assert "What ran in this test is not measured." in str(crash.longrepr)
        assert remote.run("test_it.py::test_after", None, 60)[1].outcome == "passed"
        remote.close()
    assert len(list(kept.glob("data.guest.*"))) == 2  # of each process its own
    lines: set[int] = set()
    for file in kept.glob("data.guest.*"):
        data = CoverageData(str(file))
        data.read()
        lines |= set(data.lines(f"{root}/measured.py") or ())
    assert 2 in lines
    assert 5 not in lines
    (notes,) = (tmp_path / "code").glob("*.gcno")
    counts = dict.fromkeys((3, 7), 0)
    for number, file in enumerate(kept.glob("gcov.guest.*/*.gcda")):
        (tmp_path / str(number)).mkdir()
        shutil.copy(file, tmp_path / str(number) / notes.with_suffix(".gcda").name)
        found = counted(Path(shutil.copy(notes, tmp_path / str(number))), Path.cwd())["counted.c"]
        counts = {line: count + found[line] for line, count in counts.items()}
    assert counts == {3: 1, 7: 0}


@pytest.mark.thorough
def test_a_box_that_goes_is_told(tmp_path: Path) -> None:
    with Box(described(tmp_path), tmp_path / "out") as box:
        sleeping = box.start(["sleep", "100"])
        scratch = box.scratch
        box._link.kill()
        with pytest.raises(GuestLost, match="the connection to box has ended"):
            sleeping.wait(20)
        assert "does not answer any more" in str(box.lost)
        box.reconnect(20)
        assert box.run(["echo", "again"]).stdout == "again\n"
        shutil.rmtree(scratch)  # its keeper was killed


def test_a_box_that_is_not_there_is_told(tmp_path: Path) -> None:
    text = LOCAL.replace('["sh", "-c"]', '["sh", "-c", "echo no route to {host} >&2; exit 255"]')
    with pytest.raises(GuestLost, match="the connection to box has ended: no route to here"):
        Box(described(tmp_path, text=text), tmp_path / "out")
    text = LOCAL.replace('["sh", "-c"]', '["no-such-program"]')
    with pytest.raises(ToolMissing, match="no-such-program is not installed"):
        Box(described(tmp_path, text=text), tmp_path / "out")


def test_console_and_power(tmp_path: Path) -> None:
    more = f"""
console = ["sh", "-c", "echo 'BUG: kernel NULL pointer dereference'; exec sleep 100"]
power = ["sh", "-c", "echo {{action}} >>{tmp_path}/power"]
"""
    with Box(described(tmp_path, more), tmp_path / "out") as box:
        assert box._console is not None
        assert box._console.wait_for("BUG", 10)
        assert box.kernel_trouble() == ["BUG: kernel NULL pointer dereference"]
        box.power("cycle")
        with pytest.raises(ValueError, match="one of on, off, cycle, not 'explode'"):
            box.power("explode")
    assert (tmp_path / "power").read_text() == "cycle\n"
    assert "BUG" in (tmp_path / "out" / "console.log").read_text()
    with Box(described(tmp_path), tmp_path / "out") as box, pytest.raises(HarnessError, match="has no power command"):
        box.power("off")
    more = 'power = ["sh", "-c", "echo {action} is not for us >&2; exit 3"]'
    with (
        Box(described(tmp_path, more), tmp_path / "out") as box,
        pytest.raises(HarnessError, match="is not for us"),
    ):
        box.power("off")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('host = "here"', "", "host: missing; expected whom ssh is to call"),
        ("0000:03:00.0", "03:00.0", 'nic: expected a PCI address such as "0000:03:00.0", found a string'),
        ("connect", "conect", "conect: unknown key; did you mean 'connect'"),
        ("[", 'power = ["reboot"]\n#[', "power: expected a command with {action} in it"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path: Path, before: str, after: str, said: str) -> None:
    text = 'power = ["reboot"]\n' + LOCAL if said.startswith("power") else LOCAL.replace(before, after)
    with pytest.raises(RecipeError) as caught:
        described(tmp_path, text=text)
    assert said in str(caught.value)


def test_ssh_is_what_connects_unless_told_otherwise(tmp_path: Path) -> None:
    made = described(tmp_path, text='host = "root@bench"\nnic = "0000:03:00.0"\n')
    assert made.words(made.connect) == ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "root@bench"]
    assert made.name == "box"
