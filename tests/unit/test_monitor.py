"""The monitor's parts that need no device: who the driver is, its command, the pauses, and the words on the channel."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from netbridge.errors import UsageError
from netbridge.vnode import handover, supervisor
from netbridge.vnode.backoff import Backoff
from netbridge.vnode.identity import FIRST_DYNAMIC_UID, LAST_DYNAMIC_UID, driver_identity
from netbridge.vnode.manifest import Manifest
from netbridge.vnode.process import driver_command


def user(name: str, uid: int) -> pwd.struct_passwd:
    return pwd.struct_passwd((name, "x", uid, uid, "", "/", "/bin/false"))


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> dict[str, pwd.struct_passwd]:
    known = {"root": user("root", 0), "aethernet": user("aethernet", 1000)}
    monkeypatch.setattr(pwd, "getpwnam", lambda name: known[name])
    monkeypatch.setattr(pwd, "getpwall", lambda: list(known.values()))
    return known


def test_pauses_grow_and_begin_anew_after_a_calm_time() -> None:
    backoff = Backoff(first=0.1, most=1.0, calm=30.0)
    assert [backoff.after(0.0) for _ in range(5)] == [0.1, 0.2, 0.4, 0.8, 1.0]
    assert backoff.after(29.9) == 1.0
    assert backoff.after(30.0) == 0.1
    assert backoff.after(0.0) == 0.2


def test_the_system_user_is_taken_where_there_is_one(users: dict[str, pwd.struct_passwd]) -> None:
    users["netbridge"] = user("netbridge", 321)
    assert driver_identity(None, [1000], "x") == (321, 321, "netbridge")


def test_else_a_uid_that_nobody_has_and_always_the_same(users: dict[str, pwd.struct_passwd]) -> None:
    first = driver_identity(None, [1000], "net-bridge 0000:00:1f.0")
    assert FIRST_DYNAMIC_UID <= first.uid <= LAST_DYNAMIC_UID
    assert driver_identity(None, [1000], "net-bridge 0000:00:1f.0") == first
    assert driver_identity(None, [1000], "net-bridge 0000:00:1e.0") != first
    users["intruder"] = user("intruder", first.uid)
    assert driver_identity(None, [1000], "net-bridge 0000:00:1f.0").uid != first.uid
    assert driver_identity(None, [first.uid + 1], "net-bridge 0000:00:1f.0").uid == first.uid + 2


@pytest.mark.parametrize(
    ("name", "said"),
    [("root", "root"), ("0", "root"), ("1000", "service"), ("aethernet", "service"), ("none", "no user")],
)
def test_users_that_will_not_do(users: dict[str, pwd.struct_passwd], name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        driver_identity(name, [1000], "x")


# ---- The command ----------------------------------------------------------------------------------------------------


def manifest(directory: Path, entrypoint: str = "bin/net-bridge.vnode") -> Manifest:
    return Manifest.find("net-bridge")._replace(path=str(directory / "vnode.yml"), entrypoint=entrypoint)


def test_the_packaged_program_is_there_and_started_in_isolation(tmp_path: Path) -> None:
    packaged = Manifest.find("net-bridge")
    command = driver_command(packaged)
    assert command[1:3] == ["-I", "-S"]
    assert packaged.entrypoint_path in command
    assert driver_command(manifest(tmp_path)) == command, "for a manifest that brings no program along"


def test_a_manifest_may_bring_its_program(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir(mode=0o755)
    program = tmp_path / "bin" / "net-bridge.vnode"
    program.write_text("")
    program.chmod(0o755)
    assert str(program) in driver_command(manifest(tmp_path))


@pytest.mark.parametrize("what", ["file", "directory"])
def test_but_not_one_that_others_may_change(tmp_path: Path, what: str) -> None:
    (tmp_path / "bin").mkdir(mode=0o755)
    program = tmp_path / "bin" / "net-bridge.vnode"
    program.write_text("")
    (program if what == "file" else program.parent).chmod(0o777)
    with pytest.raises(UsageError, match="nobody but root can change it"):
        driver_command(manifest(tmp_path))


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"bin/other\.vnode"):
        driver_command(manifest(tmp_path, "bin/other.vnode"))


def test_started_by_hand_the_driver_says_how_it_is_started() -> None:
    import subprocess

    command = driver_command(Manifest.find("net-bridge"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "netbridge run" in done.stderr
    assert "Traceback" not in done.stderr


# ---- The channel ----------------------------------------------------------------------------------------------------


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_the_start_arrives_with_its_files(channel: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = channel
    start = {"manifest": Manifest.find("net-bridge").as_dict(), "confinement": (1, 2, b"\0\1", ())}
    with Path(os.devnull).open("rb") as null:
        handover.tell(ours, start, [null.fileno()])
    received = handover.await_told(theirs)
    assert received is not None
    assert received[0] == start
    (fd,) = received[1]
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_words_arrive(channel: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = channel
    with pytest.raises(BlockingIOError):
        handover.hear(ours)
    handover.say(theirs, handover.UP)
    handover.say(theirs, handover.FAILED, "4\nwhat it was\nand more")
    assert handover.hear(ours) == ("up", "", [])
    assert handover.hear(ours) == ("failed", "4\nwhat it was\nand more", [])
    theirs.close()
    assert handover.hear(ours) is None


@pytest.mark.parametrize("data", [b"", b"rubbish", b"\xff\xfe", b"up" * 20000, b"confined"])
def test_nonsense_is_as_good_as_the_end(channel: tuple[socket.socket, socket.socket], data: bytes) -> None:
    ours, theirs = channel
    theirs.send(data)
    assert handover.hear(ours) is None


def test_files_that_nobody_asked_for_are_closed(channel: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = channel
    before = set(Path("/proc/self/fd").iterdir())
    socket.send_fds(theirs, [b"up"], [0, 0, 0])
    assert handover.hear(ours) is None
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_a_driver_without_a_monitor_says_nothing(channel: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = channel
    ours.close()
    handover.say(theirs, handover.UP)
    assert handover.await_told(theirs) is None


def test_the_constants_agree_with_the_documented_range() -> None:
    assert (FIRST_DYNAMIC_UID, LAST_DYNAMIC_UID) == (61184, 65519), "systemd.exec(5), DynamicUser="
    assert supervisor.MOST_FAILED_STARTS > 1
