"""Both ends of the agent, joined by a socket pair: the guest's end runs here as an ordinary process."""

import itertools
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from images.agent.machine import find_port
from images.agent.protocol import HEAD, MAGIC, MAX_PAYLOAD, PROTOCOL, Decoder, encode
from qemu.agent import Agent
from qemu.completed import CommandFailed, CommandTimedOut
from qemu.errors import AgentError, GuestLost

IMAGES = Path(__file__).parents[2] / "images"
START = f"import sys; sys.path.insert(0, {str(IMAGES)!r}); from agent.main import main; sys.exit(main(sys.argv[1:]))"


class Local:
    """The guest's end as a process of this machine, and the host's end connected to it."""

    def __init__(self, *prefix: str) -> None:
        here, there = socket.socketpair()
        self.raw = here
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-I", "-S", "-c", START, "--fd", str(there.fileno())], pass_fds=[there.fileno()]
        )
        there.close()
        self.agent = Agent(here)

    def close(self) -> None:
        self.agent.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def local() -> Iterator[Local]:
    ends = Local()
    ends.agent.wait_ready(10)
    yield ends
    ends.close()


@pytest.fixture
def agent(local: Local) -> Agent:
    return local.agent


# Framing


def test_frames_survive_any_cut() -> None:
    stream = encode({"id": 1, "op": "a"}, b"xyz") + encode({"id": 2}) + encode({"id": 3}, bytes(1000))
    for step in (1, 2, 7, 100):
        decoder = Decoder()
        frames = [frame for at in range(0, len(stream), step) for frame in decoder.feed(stream[at : at + step])]
        assert frames == [({"id": 1, "op": "a"}, b"xyz"), ({"id": 2}, b""), ({"id": 3}, bytes(1000))]
        assert decoder.garbage == 0


@pytest.mark.parametrize(
    "garbage",
    [
        b"login: root\r\n",
        MAGIC[:3],
        MAGIC + b"\xff" * 8,
        HEAD.pack(MAGIC, 3, 5) + b"{{{",
        HEAD.pack(MAGIC, 2, 5) + b"[]",
        bytes(range(256)) * 3,
    ],
)
def test_garbage_is_skipped_and_counted(garbage: bytes) -> None:
    decoder = Decoder()
    frames = list(decoder.feed(garbage + encode({"id": 7}, b"ok")))
    assert frames == [({"id": 7}, b"ok")]
    assert decoder.garbage == len(garbage)


def test_a_frame_too_large_to_be_accepted_is_not_sent() -> None:
    with pytest.raises(ValueError, match="at most"):
        encode({}, bytes(MAX_PAYLOAD + 1))


# Commands


def test_a_command_gives_its_output_and_code(agent: Agent) -> None:
    done = agent.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)


def test_a_failed_command_raises_with_its_last_words(agent: Agent) -> None:
    with pytest.raises(CommandFailed, match=r"ended with exit code 3.*\n.*stderr\nsorry") as caught:
        agent.run(["sh", "-c", "echo sorry >&2; exit 3"])
    assert caught.value.completed.returncode == 3


def test_a_signal_is_told_as_subprocess_does(agent: Agent) -> None:
    done = agent.run(["sh", "-c", "kill -SEGV $$"], check=False)
    assert done.returncode == -signal.SIGSEGV
    with pytest.raises(CommandFailed, match="was ended by SIGSEGV"):
        agent.run(["sh", "-c", "kill -SEGV $$"])


def test_standard_input_larger_than_every_buffer_on_the_way(agent: Agent) -> None:
    data = os.urandom(1 << 20).hex()
    assert agent.run(["cat"], stdin=data).stdout == data


def test_a_command_that_does_not_read_its_input_still_ends(agent: Agent) -> None:
    assert agent.run(["true"], stdin=bytes(4 << 20)).returncode == 0
    assert agent.run(["sh", "-c", "exec <&-; sleep 0.2"], stdin=bytes(4 << 20)).returncode == 0


def test_without_input_there_is_end_of_file(agent: Agent) -> None:
    assert agent.run(["cat"]).stdout == ""


def test_environment_and_directory(agent: Agent, tmp_path: Path) -> None:
    done = agent.run(["sh", "-c", "echo $WORD; pwd"], env={"WORD": "héllo"}, cwd=str(tmp_path))
    assert done.stdout == f"héllo\n{tmp_path}\n"


def test_what_cannot_start_is_named(agent: Agent) -> None:
    with pytest.raises(AgentError, match="no such command in the guest: '/no/such'"):
        agent.run(["/no/such"])
    with pytest.raises(AgentError, match="working directory '/no/such'"):
        agent.run(["true"], cwd="/no/such")
    with pytest.raises(AgentError, match="no such user in the guest: 'nemo-no'"):
        agent.run(["true"], user="nemo-no")
    with pytest.raises(TypeError, match="list of words"):
        agent.run("true")


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user takes root")
def test_another_user_has_that_users_ids_and_groups(agent: Agent) -> None:
    nobody = pwd.getpwnam("nobody")
    done = agent.run(["sh", "-c", "id -u; id -g; id -G; echo $USER"], user="nobody", cwd="/")
    assert done.stdout.split() == [str(nobody.pw_uid), str(nobody.pw_gid), str(nobody.pw_gid), "nobody"]
    assert agent.run(["id", "-u"], user=4321, cwd="/").stdout == "4321\n"


def test_a_command_past_its_deadline_is_killed_with_its_children(agent: Agent, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    began = time.monotonic()
    with pytest.raises(
        CommandTimedOut, match=r"`sh -c .*has not ended within 0.5 s and was killed(.|\n)*so far"
    ) as caught:
        agent.run(["sh", "-c", f"echo so far; sleep 100 & echo $! > {pids}; wait"], timeout=0.5)
    assert time.monotonic() - began < 5
    assert "stdout" in str(caught.value)
    child = int(pids.read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}/fd/0").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}/fd/0").exists()


def test_many_at_once(agent: Agent) -> None:
    processes = [agent.start(["sh", "-c", f"sleep 0.2; echo {n}; exit {n}"]) for n in range(20)]
    began = time.monotonic()
    assert [process.wait() for process in processes] == list(range(20))
    assert [process.stdout for process in processes] == [f"{n}\n" for n in range(20)]
    assert time.monotonic() - began < 4


def test_lines_arrive_while_it_runs(agent: Agent) -> None:
    with agent.start(["sh", "-c", "echo one; echo noise >&2; echo two; read word; echo got $word"], stdin=True) as it:
        lines = it.lines()
        assert [next(lines), next(lines)] == ["one", "two"]
        assert it.running
        it.write(b"that\n")
        assert next(lines) == "got that"
        assert list(lines) == []
        assert it.wait() == 0
        assert it.stderr == "noise\n"


def test_waiting_for_a_line(agent: Agent) -> None:
    with agent.start(["sh", "-c", "echo a1; echo a2; echo b1 >&2; sleep 100"]) as it:
        assert it.wait_for_line(r"a(\d)")[1] == "1"
        assert it.wait_for_line(r"a(\d)")[1] == "2"
        assert it.wait_for_line(r"b(\d)")[1] == "1"
        with pytest.raises(CommandTimedOut, match=r"no line with /c/ within 0.1 s(.|\n)*a2"):
            it.wait_for_line("c", timeout=0.1)
    assert it.returncode == -signal.SIGKILL


def test_a_line_that_never_comes_because_it_ended(agent: Agent) -> None:
    it = agent.start(["sh", "-c", "echo no; exit 4"])
    with pytest.raises(CommandFailed, match="ended with exit code 4"):
        it.wait_for_line("yes")


def test_a_last_line_without_newline_counts(agent: Agent) -> None:
    it = agent.start(["printf", "a\nready"])
    assert it.wait_for_line("ready")
    assert list(it.lines()) == ["a", "ready"]


def test_commands_obey_the_keys_of_a_terminal_whatever_the_agent_was_started_by() -> None:
    ends = Local("sh", "-c", 'trap "" INT QUIT HUP; exec "$@"', "sh")
    ends.agent.wait_ready(10)
    status = ends.agent.run(["cat", "/proc/self/status"]).stdout
    # Others may have been ignored all the way from whoever started this test.
    keys = sum(1 << (number - 1) for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP))
    assert int(status.split("SigIgn:")[1].split()[0], 16) & keys == 0
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        with ends.agent.start(["sleep", "100"]) as it:
            it.kill(number)
            assert it.wait() == -number
    ends.close()


def test_a_daemon_left_behind_is_not_waited_for(agent: Agent) -> None:
    began = time.monotonic()
    done = agent.run(["sh", "-c", "sleep 30 & echo $!"])
    assert time.monotonic() - began < 5
    os.kill(int(done.stdout), signal.SIGKILL)


def test_a_flood_neither_wedges_the_agent_nor_fills_memory(local: Local, tmp_path: Path) -> None:
    agent = local.agent
    log = tmp_path / "log"
    with agent.start(["sh", "-c", "yes 'a line of the flood'"], keep=1 << 20, log=log) as flood:
        deadline = time.monotonic() + 20
        while flood.dropped() < 20 << 20 and time.monotonic() < deadline:
            assert agent.ping() < 5
            assert agent.run(["echo", "alive"]).stdout == "alive\n"
        assert flood.dropped() >= 20 << 20
        assert len(flood.stdout) < 2 << 20
    status = Path(f"/proc/{local.process.pid}/status").read_text()
    assert int(status.split("VmHWM:")[1].split()[0]) < 64 << 10
    content = log.read_bytes()
    assert len(content) > 20 << 20
    assert set(content[: content.rindex(b"\n")].split(b"\n")) == {b"a line of the flood"}


def test_output_is_whole_however_much_there_is_at_the_exit(agent: Agent) -> None:
    # More than the credit of one request, and a pipe still full when the process has gone.
    done = agent.run(["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x; head -c 60000 /dev/zero | tr '\\0' y"])
    assert done.stdout == "x" * 3000000 + "y" * 60000


def test_a_run_that_prints_more_than_is_kept_is_no_answer(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu.agent.KEEP", 1 << 16)
    it = agent.start(["head", "-c", "1000000", "/dev/zero"], keep=1 << 16)
    it.wait()
    assert it.dropped() > 0
    assert it.dropped() + len(it.stdout) == 1000000


def test_a_terminal(agent: Agent) -> None:
    with agent.start(["sh", "-c", "tty; stty size; read word; echo $word"], stdin=True, pty=(33, 99)) as it:
        assert it.wait_for_line(r"/dev/pts/\d+")
        assert it.wait_for_line("33 99")
        it.write(b"hello\n")
        assert it.wait() == 0
        assert it.stdout.count("hello") == 2  # the echo and the answer


# The resident interpreter


def test_eval_keeps_names_and_returns_the_last_expression(agent: Agent) -> None:
    assert agent.eval("import os; x = 20") is None
    assert agent.eval("x += 1\n[x, {'y': None}]") == [21, {"y": None}]


def test_eval_gives_the_traceback(agent: Agent) -> None:
    with pytest.raises(AgentError, match=r"ZeroDivisionError(.|\n)*<eval>"):
        agent.eval("1/0")
    with pytest.raises(AgentError, match="SyntaxError"):
        agent.eval("1 +")
    with pytest.raises(AgentError, match="SystemExit"):
        agent.eval("raise SystemExit")
    with pytest.raises(AgentError, match="not JSON serializable"):
        agent.eval("object()")
    assert agent.eval("1") == 1


def test_eval_that_hangs_is_broken_off(agent: Agent) -> None:
    with pytest.raises(AgentError, match=r"not done after 0\.2 s"):
        agent.eval("while True: pass", timeout=0.2)
    assert agent.eval("2") == 2


def test_call(agent: Agent) -> None:
    assert agent.call("os.path:join", "a", "b") == "a/b"
    with pytest.raises(AgentError, match="ModuleNotFoundError"):
        agent.call("no_such_module:f")


# Files


@pytest.mark.parametrize("size", [0, 1, 1 << 15, 3_000_001])
def test_files_there_and_back(agent: Agent, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    agent.put(data, f"{tmp_path}/new/dir/file", mode=0o750)
    assert (tmp_path / "new/dir/file").stat().st_mode & 0o7777 == 0o750
    assert agent.get(f"{tmp_path}/new/dir/file") == data
    assert [path.name for path in (tmp_path / "new/dir").iterdir()] == ["file"]


def test_a_file_and_a_directory_of_the_host(agent: Agent, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_text("A")
    (source / "a").chmod(0o700)
    (source / "sub" / "b").write_text("B")
    agent.put(source, f"{tmp_path}/target")
    assert (tmp_path / "target/a").read_text() == "A"
    assert (tmp_path / "target/a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "target/sub/b").read_text() == "B"
    assert agent.get(f"{tmp_path}/target/a", to=tmp_path / "back") == b""
    assert (tmp_path / "back").read_text() == "A"


def test_what_cannot_be_moved_is_named(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match=r"get /no/such.*No such file"):
        agent.get("/no/such")
    with pytest.raises(AgentError, match="is a directory"):
        agent.get(str(tmp_path))
    with pytest.raises(AgentError, match="is a directory"):
        agent.put(b"", str(tmp_path))
    with pytest.raises(AgentError, match=r"put /proc/version/x"):
        agent.put(b"x" * 100_000, "/proc/version/x")
    with pytest.raises(TypeError, match="Path for a file"):
        agent.put("text", "/tmp/x")  # type: ignore[arg-type]
    with pytest.raises(AgentError, match="more than the 10 asked for"):
        (tmp_path / "large").write_bytes(bytes(11))
        agent.get(str(tmp_path / "large"), limit=10)
    assert agent.get("/proc/version") == Path("/proc/version").read_bytes()  # its size reads as 0


def test_a_fifo_does_not_hold_the_agent_up(agent: Agent, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert agent.get(str(tmp_path / "fifo")) == b""
    assert agent.ping() < 5


# Trouble


def test_the_agents_death_fails_what_is_under_way_at_once(local: Local) -> None:
    it = local.agent.start(["sleep", "100"])
    began = time.monotonic()
    local.process.kill()
    with pytest.raises(GuestLost, match=r"sleep 100.*closed the agent's port"):
        it.wait(30)
    assert time.monotonic() - began < 2
    with pytest.raises(GuestLost):
        local.agent.ping()
    assert it.pid is not None
    os.kill(it.pid, signal.SIGKILL)


def test_an_agent_that_never_greets() -> None:
    here, there = socket.socketpair()
    agent = Agent(here)
    with pytest.raises(GuestLost, match=r"not greeted within 0\.1 s"):
        agent.wait_ready(0.1)
    agent.close()
    there.close()


def test_a_second_greeting_means_that_the_first_agent_died() -> None:
    here, there = socket.socketpair()
    agent = Agent(here)
    there.sendall(encode({"id": 0, "event": "hello", "protocol": PROTOCOL}))
    agent.wait_ready(5)
    failures = []

    def ask() -> None:
        try:
            agent.ping()
        except GuestLost as error:
            failures.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    there.recv(1000)
    there.sendall(encode({"id": 0, "event": "hello", "protocol": PROTOCOL}))
    asking.join(5)
    assert failures == ["ping: the agent in the guest died and was started anew"]
    assert agent.ready
    agent.close()
    there.close()


def test_the_guests_end_survives_garbage_and_nonsense(local: Local) -> None:
    local.raw.sendall(b"\x00\xffgarbage" + MAGIC + b"\xff\xff\xff\xff\xff\xff\xff\xff")
    for header in (
        {},
        {"id": "x", "op": 1},
        {"id": 5, "op": "no-such"},
        {"id": 6, "op": "run"},
        {"id": 7, "op": "ack"},
    ):
        local.raw.sendall(encode(header))
    assert local.agent.run(["echo", "alive"]).stdout == "alive\n"
    assert local.agent.garbage == 9 + 12


def test_unknown_and_malformed_answers_do_not_stop_the_hosts_end(local: Local) -> None:
    headers: list[dict[str, Any]] = [{"id": 999, "event": "output"}, {"id": None}, {"id": []}, {"event": 5}]
    for header in headers:
        local.agent._dispatch(header, b"")
    assert local.agent.ping() < 5


def test_the_port_is_found_by_name(tmp_path: Path) -> None:
    for entry, name in (("vport0p1", "console.0"), ("vport1p1", "agent.0")):
        (tmp_path / entry).mkdir()
        (tmp_path / entry / "name").write_text(name + "\n")
    assert find_port("agent.0", str(tmp_path)) == "/dev/vport1p1"
    with pytest.raises(FileNotFoundError, match=r"'other'.*console.0.*agent.0"):
        find_port("other", str(tmp_path))


def test_ping_is_quick(agent: Agent) -> None:
    times = sorted(agent.ping() for _ in itertools.repeat(None, 50))
    assert times[25] < 0.05


def test_a_halted_command_halts_what_it_started_in_another_session(local: Local) -> None:
    script = "setsid sh -c 'echo $$; sleep 1000 & wait' & read word"
    with local.agent.start(["sh", "-c", script], halt_at="\n", stdin=True) as process:
        process.wait_halted(10)
        child = int(process.stdout)
        assert Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        process.go_on()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(child, signal.SIGKILL)


def test_a_command_is_halted_where_it_prints_a_line(local: Local) -> None:
    script = "echo one; echo two half; echo three; echo four; exec sleep 100"
    with local.agent.start(["sh", "-c", script], halt_at="three") as process:
        process.wait_halted(10)
        assert process.pid is not None
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "T"
        process.go_on()
        process.wait_for_line("four", 10)
    with pytest.raises(CommandFailed):
        local.agent.start(["true"], halt_at="never").wait_halted(10)
