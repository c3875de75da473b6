"""The code disk: what is on it, and what a wrong specification is told."""

import subprocess
from pathlib import Path

import pytest

from qemu.codedisk import CodeSpecification, build_code_disk
from qemu.errors import ImageBuildFailed, RecipeError, ToolMissing
from qemu.images import Image

ROOT = Path(__file__).parents[2]

SPECIFICATION = """
base = ".."
trees = ["package", "data"]
exclude = ["package/native/*"]
[[files]]
from = "tools/agent.py"
to = ".guest/agent.py"
"""


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """Enough of an image: one whose sysroot has neither compiler's needs nor Python."""
    sysroot = tmp_path / "sysroot-0123456789abcdef"
    sysroot.mkdir()
    none = tmp_path / "none"
    return Image(none, None, none, none, sysroot, none, key="0" * 16, recipe="test", release="6.99", cmdline=())


@pytest.fixture
def project(tmp_path: Path) -> Path:
    top = tmp_path / "project"
    files = {
        "package/__init__.py": "",
        "package/main.py": "answer = 42\n",
        "package/_core.cpython-311-x86_64-linux-gnu.so": "for the host",
        "package/__pycache__/main.cpython-311.pyc": "for the host",
        "package/.hidden": "",
        "package/native/core.c": "int x;",
        "data/deep/er/table.yml": "a: 1\n",
        "data/run.sh": "#!/bin/sh\n",
        "tools/agent.py": "print('agent')\n",
        "secret.txt": "not for the guest",
        "images/code.toml": SPECIFICATION,
    }
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    (top / "data/run.sh").chmod(0o700)
    (top / "package/main.py").chmod(0o600)
    (top / "data/deep").chmod(0o700)
    return top


def debugfs(disk: Path, command: str) -> str:
    return subprocess.run(
        ["/sbin/debugfs", "-R", command, str(disk)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    ).stdout.decode()


def listing(disk: Path, directory: str = "") -> dict[str, int]:
    """Paths and modes of all files on the disk."""
    found: dict[str, int] = {}
    for line in debugfs(disk, f"ls -p /{directory}").split():
        _, _inode, mode, _uid, _gid, name, *_ = line.split("/")
        path = f"{directory}/{name}".removeprefix("/")
        if name in (".", "..", "lost+found"):
            continue
        if mode.startswith("04"):
            found.update(listing(disk, path))
            assert mode == "040755", path
        else:
            found[path] = int(mode, 8) & 0o777
    return found


def test_it_holds_the_trees_and_files_and_nothing_of_the_host(tmp_path: Path, project: Path, image: Image) -> None:
    disk = build_code_disk(image, project / "images/code.toml", tmp_path / "new/code.img")
    assert disk == tmp_path / "new/code.img"
    assert listing(disk) == {
        ".guest/agent.py": 0o644,
        "data/deep/er/table.yml": 0o644,
        "data/run.sh": 0o755,
        "package/__init__.py": 0o644,
        "package/main.py": 0o644,
    }
    assert debugfs(disk, "cat /package/main.py") == "answer = 42\n"
    subprocess.run(["/sbin/e2fsck", "-fn", str(disk)], check=True, stdout=subprocess.PIPE)


def test_a_new_one_takes_the_place_of_the_old_one_and_leaves_that_to_whoever_has_it_open(
    tmp_path: Path, project: Path, image: Image
) -> None:
    out = tmp_path / "code.img"
    spec = project / "images/code.toml"
    with build_code_disk(image, spec, out).open("rb") as old:
        before = old.read()
        (project / "package/main.py").write_text("answer = 43\n")
        build_code_disk(image, spec, out)
        old.seek(0)
        assert old.read() == before
    assert debugfs(out, "cat /package/main.py") == "answer = 43\n"
    assert [path.name for path in tmp_path.iterdir() if "code.img" in path.name] == ["code.img"]


@pytest.mark.thorough
def test_a_large_tree_fits(tmp_path: Path, project: Path, image: Image) -> None:
    for number in range(800):
        (project / f"data/{number:05}.txt").write_text("x" * (number % 7))
    (project / "data/large").write_bytes(b"x" * 30_000_000)
    disk = build_code_disk(image, project / "images/code.toml", tmp_path / "code.img")
    assert len(listing(disk)) == 806


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"data"]', '"dta"]', "trees: expected a list of directories below {base}, found a string: 'dta'"),
        ("tools/agent.py", "tools/agnt.py", "files[0].from: expected a file below {base}, found a string"),
        (".guest/agent.py", "../agent.py", "files[0].to: expected a path on the disk, relative to its top"),
        (".guest/agent.py", "/agent.py", "files[0].to: expected a path on the disk, relative to its top"),
        ("exclude", "exclud", "exclud: unknown key; did you mean 'exclude'?"),
        ("[[files]]", "[files]", "files: expected tables with from and to, found a table"),
        ("[[files]]", "[[extensions]]\nmodule = 'a-b'\n[[files]]", "extensions[0].module: expected a module such as"),
        (
            "[[files]]",
            "[[extensions]]\nmodule = 'a'\ncffi = 'package/main.py'\n[[files]]",
            "extensions[0].cffi: expected a build script below {base} and the cffi.FFI object in it",
        ),
    ],
)
def test_a_wrong_specification_is_refused_by_file_and_key(project: Path, old: str, new: str, message: str) -> None:
    path = project / "images/code.toml"
    assert old in SPECIFICATION
    path.write_text(SPECIFICATION.replace(old, new, 1))
    with pytest.raises(RecipeError) as refused:
        CodeSpecification.load(path)
    assert str(refused.value).startswith(f"{path}: {message.format(base=project)}")


def test_the_shipped_specification_loads() -> None:
    spec = CodeSpecification.load(ROOT / "images/code.toml")
    assert spec.base == ROOT
    assert [entry.module for entry in spec.extensions] == ["netbridge.datapath._core"]


def test_an_extension_of_another_name_than_announced_is_refused(tmp_path: Path, project: Path, image: Image) -> None:
    (project / "build.py").write_text(
        "import cffi\nffi = cffi.FFI()\nffi.cdef('extern int x;')\nffi.set_source('package._other', 'int x;')\n"
    )
    text = SPECIFICATION + '[[extensions]]\nmodule = "package._core"\ncffi = "build.py:ffi"\n'
    (project / "images/code.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"the builder of package\._core is for package\._other"):
        build_code_disk(image, project / "images/code.toml", tmp_path / "code.img")
    assert not (tmp_path / "code.img").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, project: Path, image: Image) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageBuildFailed, match=r"file/code\.img: "):
        build_code_disk(image, project / "images/code.toml", tmp_path / "file/code.img")


def test_a_missing_mkfs_is_named_with_its_package(
    tmp_path: Path, project: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qemu.tools.shutil.which", lambda name, path=None: None)
    with pytest.raises(ToolMissing, match=r"mkfs\.ext4 is needed .* apt-get install e2fsprogs"):
        build_code_disk(image, project / "images/code.toml", tmp_path / "code.img")
