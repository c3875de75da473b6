"""One selection of tests on several kernels, and what is told of each."""

import json
from pathlib import Path

import pytest

from qemu import kernels

PASSES = "def test_one(): pass\ndef test_two(pytestconfig): assert pytestconfig.getini('guest_patience') in '18'\n"
FAILS = "def test_kernel(pytestconfig): assert 'bookworm' not in pytestconfig.getini('guest_recipe')\n"


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "OUT", tmp_path / "out")


def test_each_kernel_s_outcome_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(PASSES + FAILS)
    words = ["--json", "trixie", "bookworm:8", "--", "-c", "pyproject.toml", "-p", "no:cacheprovider", str(test)]
    assert kernels.main(words) == 1
    lines = capfd.readouterr().out.splitlines()
    table = lines[lines.index("kernels:") + 1 :]
    assert table[0].split()[:2] == ["trixie", "ok"]
    assert table[0].endswith("3 passed")
    assert table[1].split()[:3] == ["bookworm", "exit", "1"]
    assert table[1].endswith("2 passed, 1 failed")
    told = json.loads(table[2])
    assert (told["trixie"]["exit"], told["bookworm"]["exit"], told["bookworm"]["failed"]) == (0, 1, 1)


def test_a_kernel_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["trixie", "hurd", "--", "tests"])
    said = capsys.readouterr().err
    assert "images/hurd.toml: no such file; what there is: " in said
    assert "images/trixie.toml" in said
