"""Fragments of a kernel's configuration: read, laid over each other, and held against what came of them."""

from pathlib import Path

import pytest

from qemu.errors import RecipeError
from qemu.kconfig import read_fragment, render, unfulfilled

IMAGES = Path(__file__).parents[2] / "images"


def fragment(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.config"
    path.write_text(text)
    return path


def test_options_and_comments_are_told_apart(tmp_path: Path) -> None:
    text = """
# A comment, and an option below it
CONFIG_PCI=y
  CONFIG_NR_CPUS=8
CONFIG_BASE=0x1000
CONFIG_TUN=m
# CONFIG_BLK_DEV_NVME is not set
CONFIG_USB=n
CONFIG_LSM="landlock,yama"
"""
    assert read_fragment(fragment(tmp_path, text)) == {
        "PCI": "y",
        "NR_CPUS": "8",
        "BASE": "0x1000",
        "TUN": "m",
        "BLK_DEV_NVME": "n",
        "USB": "n",
        "LSM": '"landlock,yama"',
    }


@pytest.mark.parametrize(
    "line",
    [
        "CONFIG_PCI",
        "CONFIG_PCI=yes",
        "CONFIG_PCI = y",
        "PCI=y",
        'CONFIG_LSM="a',
        "# CONFIG_PCI is unset",
        "#CONFIG_PCI=y",
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    with pytest.raises(RecipeError) as refused:
        read_fragment(fragment(tmp_path, f"# first\nCONFIG_SMP=y\n{line}\n"))
    assert str(refused.value) == (
        f"{tmp_path}/mine.config:3: expected CONFIG_NAME=value or # CONFIG_NAME is not set, found {line!r}"
    )


def test_an_option_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine\.config:2: CONFIG_PCI is there a second time"):
        read_fragment(fragment(tmp_path, "CONFIG_PCI=y\n# CONFIG_PCI is not set\n"))


def test_a_fragment_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    fragment(tmp_path, "")
    with pytest.raises(RecipeError, match=r"mien\.config: no such file; what there is: .*/mine\.config$"):
        read_fragment(tmp_path / "mien.config")


def test_what_is_rendered_reads_the_same(tmp_path: Path) -> None:
    options = {"PCI": "y", "USB": "n", "NR_CPUS": "8", "LSM": '"landlock"'}
    assert read_fragment(fragment(tmp_path, render(options))) == options


CONFIG = """
CONFIG_PCI=y
# CONFIG_USB is not set
CONFIG_TUN=m
CONFIG_NR_CPUS=64
"""


@pytest.mark.parametrize(
    ("name", "value", "became"),
    [
        ("PCI", "y", None),
        ("USB", "n", None),
        ("NEVER_HEARD_OF", "n", None),
        ("PCI", "n", "y"),
        ("USB", "y", "n"),
        ("TUN", "y", "m"),
        ("NR_CPUS", "8", "64"),
        ("IOMMUFD", "y", "n"),
    ],
)
def test_every_wish_is_looked_at(name: str, value: str, became: str | None) -> None:
    expected = [] if became is None else [f"CONFIG_{name}: {value} was asked for, it became {became}"]
    assert unfulfilled({"PCI": "y", name: value}, CONFIG) == expected


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.config")), ids=lambda path: path.stem)
def test_shipped_fragments_are_read(path: Path) -> None:
    assert read_fragment(path)["LOCALVERSION"] == f'"-{path.stem}"', "so that a table tells the kernels apart"
