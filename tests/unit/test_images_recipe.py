"""Recipes: the shipped ones load, and a wrong one is refused by file, key and what was expected."""

import subprocess
from pathlib import Path

import pytest

from qemu.errors import RecipeError
from qemu.recipe import Recipe, Source

IMAGES = Path(__file__).parents[2] / "images"

GOOD = """
architecture = "amd64"
[root]
suite = "trixie"
pockets = ["updates"]
packages = ["python3"]
[kernel]
package = "linux-image-cloud-amd64"
[kernel.modules]
early = ["virtio_blk"]
[sysroot]
packages = ["libc6-dev"]
"""


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return Recipe.load(path)


def recipes() -> list[Path]:
    return [path for path in sorted(IMAGES.glob("*.toml")) if path.name != "code.toml"]


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.name == path.stem
    assert "virtio_blk" in recipe.kernel.early, "without it no guest sees its root disk"
    assert "busybox-static" in recipe.root.packages, "the initramfs is made of it"


def test_kernel_and_sysroot_come_from_the_root_s_suite_unless_they_say_otherwise(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.kernel.source == recipe.sysroot.source == Source("trixie", ("updates",))
    other = load(tmp_path, GOOD.replace("[kernel]", '[kernel]\nsuite = "trixie-backports"\npockets = []'))
    assert other.kernel.source == Source("trixie-backports", ())
    assert other.sysroot.source == recipe.sysroot.source


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('suite = "trixie"', "", 'root.suite: missing; expected a Debian suite such as "trixie"'),
        (
            'suite = "trixie"',
            "suite = 13",
            'root.suite: expected a Debian suite such as "trixie", found an integer: 13',
        ),
        ('suite = "trixie"', 'suite = "../x"', "root.suite: expected a Debian suite"),
        ('"python3"', "true", "root.packages: expected a list of Debian package names, found true or false: True"),
        ('"python3"', '"a b"', "root.packages: expected a list of Debian package names, found a string: 'a b'"),
        ('"python3"', '"python3", "python3"', "root.packages: 'python3' is there 2 times"),
        (
            '"updates"',
            '"update"',
            "root.pockets: expected a list of some of updates, security, found a string: 'update'",
        ),
        (
            'architecture = "amd64"',
            'architecture = "arm64"',
            "architecture: expected \"amd64\", found a string: 'arm64'",
        ),
        ("[kernel.modules]", "[kernel.module]", "kernel.modules: missing; expected a table with the lists"),
        ("early = ", "erly = ", "kernel.modules.early: missing; expected a list of kernel module names"),
        (
            "linux-image-cloud-amd64",
            "bash",
            'kernel.package: expected a kernel package such as "linux-image-cloud-amd64", or a kernel\'s source',
        ),
        (
            "linux-image-cloud-amd64",
            "linux-source-6.12",
            'kernel.config: missing; expected a list of files beside the recipe such as "iommufd.config"',
        ),
        (
            'package = "linux-image-cloud-amd64"',
            'package = "linux-image-cloud-amd64"\nconfig = ["iommufd.config"]',
            "kernel.config: unknown key",
        ),
        ('architecture = "amd64"', 'architecture = "amd64"\nlike = "../x.toml"', "like: expected a recipe beside"),
        ("[sysroot]", "[sysroot]\npackges = []", "sysroot.packges: unknown key; did you mean 'packages'?"),
        ("[sysroot]", "[sysroot]\nzzz = []", "sysroot.zzz: unknown key; known here: packages, pockets, suite"),
        (
            "[kernel]",
            "[[root.users]]\nname = 'x'\nuid = 0\n[kernel]",
            "root.users[0].uid: expected an integer from 1000",
        ),
        (
            "[kernel]",
            "[[root.users]]\nname = 'x y'\nuid = 1000\n[kernel]",
            "root.users[0].name: expected a user's name",
        ),
        ("[kernel]", "[kernel", "not TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError) as refused:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert str(refused.value).startswith(f"{tmp_path}/mine.toml: {message}")
    assert "\n" not in str(refused.value)


def test_a_recipe_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "trixie.toml").touch()
    with pytest.raises(RecipeError, match=r"trixi\.toml: no such file; what there is: .*/trixie\.toml"):
        Recipe.load(tmp_path / "trixi.toml")


def test_a_recipe_takes_what_it_does_not_say_from_the_one_that_it_is_like(tmp_path: Path) -> None:
    base = load(tmp_path, GOOD)
    (tmp_path / "a.config").write_text('CONFIG_PCI=y\nCONFIG_LOCALVERSION="-a"\n')
    (tmp_path / "b.config").write_text('CONFIG_LOCALVERSION="-b"\n')
    other = tmp_path / "other.toml"
    other.write_text('like = "mine.toml"\n[kernel]\npackage = "linux-source-6.12"\nconfig = ["a.config", "b.config"]\n')
    recipe = Recipe.load(other)
    assert (recipe.name, recipe.root, recipe.sysroot) == ("other", base.root, base.sysroot)
    assert (recipe.kernel.early, recipe.kernel.source) == (base.kernel.early, base.kernel.source)
    assert recipe.kernel.compiled
    assert not base.kernel.compiled
    # The later fragment counts.
    assert recipe.kernel.options == (("PCI", "y"), ("LOCALVERSION", '"-b"'))
    other.write_text('like = "mine.toml"\n')
    assert Recipe.load(other).kernel == base.kernel


def test_recipes_that_are_like_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('like = "b.toml"\n')
    (tmp_path / "b.toml").write_text('like = "a.toml"\n')
    with pytest.raises(RecipeError, match=r"a\.toml: like: leads back to itself: .*a\.toml is like .*b\.toml$"):
        Recipe.load(tmp_path / "a.toml")


@pytest.mark.parametrize("name", ["init", "initrd.sh"])
def test_the_guest_s_scripts_are_ones_that_a_shell_can_read(name: str) -> None:
    subprocess.run(["sh", "-n", str(IMAGES / name)], check=True)


@pytest.mark.parametrize(
    ("uptime", "hundredths"), [("0.00", 0), ("0.08", 8), ("0.98", 98), ("1.09", 109), ("9.99", 999), ("10.05", 1005)]
)
def test_the_time_since_boot_is_a_decimal_number(tmp_path: Path, uptime: str, hundredths: int) -> None:
    """A guest that is up in its first second has zeroes in front."""
    (tmp_path / "uptime").write_text(f"{uptime} 12.34\n")
    script = (IMAGES / "initrd.sh").read_text()
    function = script[script.index("hundredths() {") : script.index("# Disks are known")]
    function = function.replace("/proc/uptime", str(tmp_path / "uptime"))
    command = ["sh", "-euc", f'{function}\nhundredths; echo "$now $((now + 800))"']
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == f"{hundredths} {hundredths + 800}\n"
