"""Stand-ins for what the tests of guest images would otherwise have to fetch."""

import subprocess
from pathlib import Path


def package(directory: Path, name: str, files: dict[str, bytes]) -> Path:
    """A Debian package with these files, in `directory`."""
    tree = directory / name
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: A <a@b.c>\nDescription: x\n"
    )
    for path, data in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "-b", str(tree)], check=True, stdout=subprocess.PIPE)
    return directory / f"{name}.deb"
