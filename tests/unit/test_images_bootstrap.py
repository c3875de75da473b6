"""mmdebstrap as it is called here: whose mirror it gets, and what becomes of it when something goes wrong.

A script stands in for mmdebstrap.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qemu import apt, bootstrap
from qemu.apt import Mirrors, host_mirrors, keyring, network_settings, source_lines
from qemu.errors import ImageBuildFailed, ToolMissing
from qemu.recipe import RootPart, Source, User

ROOT = Path(__file__).parents[2]
TRIXIE = Source("trixie", ("updates", "security"))
PART = RootPart(TRIXIE, ("python3", "kmod"), ("/usr/share/man/*",), (), (User("aethernet", 1000),))


@pytest.fixture
def mmdebstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where to write the script; the machine's own package configuration is out of the game."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("apt-get", "apt-config"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o755)
    keys = tmp_path / "keys.gpg"
    keys.touch()
    monkeypatch.setattr(apt, "KEYRINGS", (keys,))
    monkeypatch.setattr(apt.keyring, "__defaults__", ((keys,),))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.delenv("VFIO_GUESTS_MIRROR", raising=False)
    return programs / "mmdebstrap"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_arguments_say_it_all(mmdebstrap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(mmdebstrap, f'printf "%s\\n" "$@" >{tmp_path}/arguments')
    monkeypatch.setenv("VFIO_GUESTS_MIRROR", "http://mirror.example/debian")
    bootstrap.build_root(PART, "amd64", tmp_path, print)
    text = (tmp_path / "arguments").read_text()
    arguments = text.splitlines()
    assert f"--mode={'root' if os.geteuid() == 0 else 'unshare'}" in arguments
    assert "--include=python3,kmod" in arguments
    assert "--dpkgopt=path-exclude=/usr/share/man/*" in arguments
    assert "echo aethernet:x:1000:1000::/nonexistent:/usr/sbin/nologin >>etc/passwd" in text
    assert f"--customize-hook=download /image-root.ext4 {tmp_path}/root.ext4" in arguments
    assert arguments[-4:] == [
        "trixie",
        "/dev/null",
        f"deb [signed-by={apt.KEYRINGS[0]}] http://mirror.example/debian trixie main",
        f"deb [signed-by={apt.KEYRINGS[0]}] http://mirror.example/debian trixie-updates main",
    ]


def test_a_failure_ends_with_what_it_said(mmdebstrap: Path, tmp_path: Path) -> None:
    script(mmdebstrap, "seq 1000; echo 'E: mirror unreachable' >&2; exit 25")
    with pytest.raises(ImageBuildFailed) as failed:
        bootstrap.build_root(PART, "amd64", tmp_path, print)
    lines = str(failed.value).splitlines()
    assert lines[0].startswith("mmdebstrap ended with 25 after ")
    assert lines[-2:] == ["    1000", "    E: mirror unreachable"]
    assert len(lines) <= 21


def test_the_hooks_texts_do_not_crowd_out_what_they_said(mmdebstrap: Path, tmp_path: Path) -> None:
    script(
        mmdebstrap, 'printf "%s\n" "I: running hook:" "$@"; echo "mkfs.ext4: no room"; printf "E: %s\n" "$@"; exit 1'
    )
    with pytest.raises(ImageBuildFailed) as failed:
        bootstrap.build_root(PART, "amd64", tmp_path, print)
    assert "    mkfs.ext4: no room" in str(failed.value).splitlines()
    assert "mount --bind" not in str(failed.value)


def test_progress_is_told_in_plain_words(mmdebstrap: Path, tmp_path: Path) -> None:
    script(
        mmdebstrap,
        "echo 'I: running apt-get update...'; echo 'I: using /tmp/x as tempdir'; echo 'I: extracting archives...'",
    )
    lines: list[str] = []
    bootstrap.build_root(PART, "amd64", tmp_path, lines.append)
    assert [line.partition(" (")[0] for line in lines] == [
        "root: reading the lists of packages",
        "root: unpacking packages",
    ]


def test_fetched_packages_arrive_and_nothing_else(mmdebstrap: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("libc6_2.41_amd64.deb", "lock", "linux-image-6.12_amd64.deb"):
        (packages / name).write_text(name)
    out = tmp_path / "out"
    out.mkdir()
    script(
        mmdebstrap,
        "for argument; do case $argument in *tar-out*) archive=${argument##* } ;; esac; done\n"
        f"tar -C {tmp_path} -cf $archive packages",
    )
    fetched = bootstrap.fetch_packages(TRIXIE, ["libc6", "linux-image-cloud-amd64"], "amd64", out, print)
    assert fetched == [out / "libc6_2.41_amd64.deb", out / "linux-image-6.12_amd64.deb"]
    assert sorted(out.iterdir()) == fetched


def test_interrupting_a_build_lets_mmdebstrap_clear_up(mmdebstrap: Path, tmp_path: Path) -> None:
    # A build in a process of its own, which gets the Ctrl-C that a terminal would send.
    script(mmdebstrap, f"trap 'touch {tmp_path}/cleared; exit 1' INT\ntouch {tmp_path}/started\nsleep 60 & wait")
    build = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from pathlib import Path\n"
            "from qemu import bootstrap\n"
            "try: bootstrap._run(['mmdebstrap'], print)\n"
            "except KeyboardInterrupt: print('interrupted')\n",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    _await(tmp_path / "started")
    build.send_signal(signal.SIGINT)
    output, _ = build.communicate(timeout=20)
    assert output == b"interrupted\n"
    assert (tmp_path / "cleared").exists()


def test_mmdebstrap_ends_with_a_builder_that_is_killed(mmdebstrap: Path, tmp_path: Path) -> None:
    script(mmdebstrap, f"trap 'touch {tmp_path}/cleared; exit 1' INT\ntouch {tmp_path}/started\nsleep 60 & wait")
    build = subprocess.Popen(
        [sys.executable, "-c", "from qemu import bootstrap\nbootstrap._run(['mmdebstrap'], print)"], cwd=ROOT
    )
    _await(tmp_path / "started")
    build.kill()
    build.wait()
    _await(tmp_path / "cleared")


def test_an_error_elsewhere_does_not_leave_mmdebstrap_running(mmdebstrap: Path, tmp_path: Path) -> None:
    script(
        mmdebstrap, f"trap 'touch {tmp_path}/cleared; exit 1' INT\necho 'I: extracting archives...'\nsleep 60 & wait"
    )

    def broken(_line: str) -> None:
        raise RuntimeError("the reader of progress has gone")

    with pytest.raises(RuntimeError):
        bootstrap.build_root(PART, "amd64", tmp_path, broken)
    assert (tmp_path / "cleared").exists()


def test_a_missing_mmdebstrap_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qemu.tools.shutil.which", lambda name, path=None: None)
    with pytest.raises(ToolMissing, match=r"mkfs\.ext4 is needed .*: apt-get install e2fsprogs"):
        bootstrap.build_root(PART, "amd64", tmp_path, print)


def _await(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear within 20 s"
        threading.Event().wait(0.01)


DEBIAN = """\
http://mirror.example/debian/ bookworm main Debian
http://mirror.example/debian/ bookworm-updates main Debian
http://mirror.example/debian/ bookworm contrib Debian
http://mirror.example/security/ bookworm-security main Debian
http://node.example/ nodistro main Node
"""


def test_a_debian_host_s_own_mirror_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFIO_GUESTS_MIRROR", raising=False)
    found = host_mirrors(lambda *argv: DEBIAN if argv[0] == "apt-get" else "")
    assert found == Mirrors("http://mirror.example/debian/", "http://mirror.example/security/")
    assert source_lines(TRIXIE, found, Path("/keys")) == [
        "deb [signed-by=/keys] http://mirror.example/debian/ trixie main",
        "deb [signed-by=/keys] http://mirror.example/debian/ trixie-updates main",
        "deb [signed-by=/keys] http://mirror.example/security/ trixie-security main",
    ]
    assert len(source_lines(Source("trixie", ()), found, Path("/keys"))) == 1


@pytest.mark.parametrize(("system", "expected"), [("debian", "http://mirror.example/debian/"), ("ubuntu", None)])
def test_before_the_first_apt_get_update_the_system_s_name_decides(
    monkeypatch: pytest.MonkeyPatch, system: str, expected: str | None
) -> None:
    monkeypatch.delenv("VFIO_GUESTS_MIRROR", raising=False)
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": system})
    assert host_mirrors(lambda *_: DEBIAN.replace(" Debian", "")).main == expected


def test_another_system_s_archive_is_no_mirror_of_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFIO_GUESTS_MIRROR", raising=False)
    found = host_mirrors(lambda *_: "http://archive.example/ubuntu/ noble main Ubuntu\n")
    assert found == Mirrors(None, None)
    assert source_lines(TRIXIE, found, Path("/keys")) == []


def test_settings_for_the_network_are_taken_over_and_no_others() -> None:
    dump = """\
APT::Install-Recommends "1";
Acquire::http::Proxy "http://user:secret@proxy.example:3128/";
Acquire::https::packages.example::CAInfo "/etc/ssl/mine.pem";
Acquire::Check-Valid-Until "false";
Acquire::Languages "de";
DPkg::Post-Invoke "rm x";
"""
    assert network_settings(lambda *_: dump) == [
        'Acquire::http::Proxy "http://user:secret@proxy.example:3128/";',
        'Acquire::https::packages.example::CAInfo "/etc/ssl/mine.pem";',
        'Acquire::Check-Valid-Until "false";',
    ]


def test_a_proxy_s_password_is_not_on_the_command_line(mmdebstrap: Path, tmp_path: Path) -> None:
    (mmdebstrap.parent / "apt-config").write_text("#!/bin/sh\necho 'Acquire::http::Proxy \"http://u:secret@p/\";'\n")
    script(
        mmdebstrap,
        f'printf "%s\\n" "$@" >{tmp_path}/arguments\n'
        "for argument; do case $argument in --aptopt=*) file=${argument#--aptopt=} ;; esac; done\n"
        f"cp -p $file {tmp_path}/settings",
    )
    bootstrap.build_root(PART, "amd64", tmp_path, print)
    assert "secret" not in (tmp_path / "arguments").read_text()
    assert "secret" in (tmp_path / "settings").read_text()
    assert (tmp_path / "settings").stat().st_mode & 0o077 == 0


def test_missing_archive_keys_are_named_with_their_package(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="apt-get install debian-archive-keyring"):
        keyring((tmp_path / "none.gpg",))
