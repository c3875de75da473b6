"""`netbridge run --vhost-user` as a user starts it: a process, its port, and a back-end that comes and goes."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import netbridge
from netbridge import client
from netbridge.errors import UsageError
from netbridge.ipc.errors import PortClosed, Reason
from netbridge.ipc.offloads import ALL_OFFLOADS, NO_OFFLOADS, TX_OFFLOADS
from netbridge.vhost import parse_mac
from netbridge.virtio.features import MAC, RING_PACKED
from tests.unit import vhost_fakes as spec
from tests.unit.vhost_fakes import F_MRG_RXBUF, F_PROTOCOL_FEATURES, OFFERED, FakeBackEnd

DEADLINE_S = 20.0
EXAMPLE = Path(netbridge.__file__).parent / "vnode" / "net-bridge" / "vnode.yml"


class Run:
    def __init__(self, directory: Path, *options: str, manifest: str = "net-bridge") -> None:
        self.socket = directory / "port.sock"
        command = [sys.executable, "-m", "netbridge", "run", manifest, "--vhost-user", str(directory / "back-end")]
        command += ["--socket", str(self.socket), "--service-uid", str(os.getuid()), "--rx-buffers", "64", "--json"]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def connect(self, offloads: client.Offload = NO_OFFLOADS, name: str = "test") -> client.Client:
        return client.connect(self.socket, name=name, offloads=offloads, timeout=DEADLINE_S, wait=DEADLINE_S)

    def end(self, signal_: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(signal_)
        out, err = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, out, err


@contextmanager
def running(directory: Path, *options: str, manifest: str = "net-bridge") -> Iterator[Run]:
    run = Run(directory, *options, manifest=manifest)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
        run.process.communicate()


@contextmanager
def listening(directory: Path) -> Iterator[socket.socket]:
    path = directory / "back-end"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(DEADLINE_S)
        try:
            yield listener
        finally:
            path.unlink()


def accept(listener: socket.socket, offered: int = OFFERED) -> FakeBackEnd:
    """The connection that is made next, served by a back-end of its own."""
    back_end = FakeBackEnd(offered=offered)
    back_end.start(listener.accept()[0])
    return back_end


def test_session_ends_with_the_back_end_and_the_next_begins_with_the_next(tmp_path: Path) -> None:
    with running(tmp_path, "--mac", "52:54:00:12:34:56") as run:
        # It waits for a back-end that comes later than itself.
        with listening(tmp_path) as listener:
            first = accept(listener)
            with run.connect() as port:
                assert port.mac.hex(":") == "52:54:00:12:34:56"
                session = port.session
                first.await_kick(DEADLINE_S)
                first.die()
                with pytest.raises(PortClosed) as closed:
                    port.receive(timeout=DEADLINE_S)
                assert closed.value.reason is Reason.DEVICE_RESET
            second = accept(listener)
            with run.connect() as port:
                assert port.session != session
                second.await_kick(DEADLINE_S)
        code, out, err = run.end()
    second.join()
    assert code == 0
    assert "CAP_HARDWARE_IO_PCI and CAP_IRQ_REGISTER are not used" in err
    assert "Traceback" not in err
    assert json.loads(out)["sessions"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_what_was_agreed_is_shown_while_there_is_a_device(tmp_path: Path) -> None:
    """Features are turned off by the manifest and by the command line."""
    manifest = tmp_path / "vnode.yml"
    manifest.write_text(EXAMPLE.read_text() + "device:\n  without: [MRG_RXBUF]\n")
    mac = "52:54:00:12:34:56"
    with running(tmp_path, "--without", "ring_packed", "--mac", mac, manifest=str(manifest)) as run:
        show = [sys.executable, "-m", "netbridge", "features", "--json", "--counters", f"{run.socket}.counters"]
        with listening(tmp_path) as listener:
            back_end = accept(listener, OFFERED | RING_PACKED.mask)
            with run.connect() as port:
                back_end.await_kick(DEADLINE_S)
                told = json.loads(subprocess.run(show, check=True, capture_output=True, text=True).stdout)
                back_end.die()
                with pytest.raises(PortClosed):
                    port.receive(timeout=DEADLINE_S)
        # The session has ended, and the device with it as soon as the buffers are counted.
        deadline = time.monotonic() + DEADLINE_S
        while (gone := subprocess.run(show, check=False, capture_output=True, text=True)).returncode == 0:
            assert time.monotonic() < deadline, "a device that is gone is still shown"
        assert run.end()[0] == 0
    assert (told["mac"], told["queue_pairs"], told["link_up"]) == (mac, 1, True)
    # The MAC address is the front-end's part of the device, the protocol's own bit the back-end's.
    assert int(told["agreed"], 16) == MAC.mask | back_end.features & ~F_PROTOCOL_FEATURES
    rows = {row["name"]: row for row in told["features"]}
    for name in ("MRG_RXBUF", "RING_PACKED"):
        assert (rows[name]["offered"], rows[name]["agreed"], rows[name]["note"]) == (True, False, "turned off")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "no configured device at this moment" in gone.stderr


def test_each_client_gets_the_offloads_that_it_can_take(tmp_path: Path) -> None:
    """The device is negotiated anew between HELLO and WELCOME, for whoever wants a session unlike the last."""
    can = client.Offload.CSUM | client.Offload.HOST_TSO4 | client.Offload.GUEST_CSUM | client.Offload.GUEST_TSO6
    asked = [
        (NO_OFFLOADS, NO_OFFLOADS),
        (ALL_OFFLOADS, can),
        (ALL_OFFLOADS, can),
        (client.Offload.CSUM | client.Offload.HOST_USO, client.Offload.CSUM),
        # Without the checksum there is nothing to segment (virtio 1.3 §5.1.3.1).
        (client.Offload.HOST_TSO4, NO_OFFLOADS),
    ]
    with listening(tmp_path) as listener, running(tmp_path) as run:
        back_end = accept(listener, OFFERED | can)
        for number, (offloads, expected) in enumerate(asked):
            with run.connect(offloads, name=f"client-{number}") as port:
                assert port.offloads == expected
                assert back_end.features & ALL_OFFLOADS == expected
                segments = client.Offload.HOST_TSO4 in expected
                assert port.largest == (65557 if segments else port.room)
                port.send_bytes(
                    bytes(port.largest), header=client.VirtioNetHeader() if expected & TX_OFFLOADS else None
                )
        code, out, err = run.end()
    back_end.join()
    assert code == 0, err
    counters = json.loads(out)
    assert counters["sessions"] == len(asked)
    assert not any(counters["refused_handles"].values())
    assert counters["clients"] == {
        f"client-{number}": {"sessions": 1, "client_slow": 0} for number in range(len(asked))
    }


def test_frames_without_merged_buffers_get_buffers_that_hold_them(tmp_path: Path) -> None:
    """Where a received frame cannot span buffers, each is as large as the largest there can be, and there are fewer."""
    guest_tso = client.Offload.GUEST_CSUM | client.Offload.GUEST_TSO4
    offered = OFFERED & ~F_MRG_RXBUF | guest_tso
    with listening(tmp_path) as listener, running(tmp_path, "--rx-buffers", "256") as run:
        back_end = accept(listener, offered)
        with run.connect() as port:
            assert port.native.rx_stride == 2048
        with run.connect(guest_tso) as port:
            # 65,562 bytes and the headroom in front of the header, in multiples of 64.
            assert port.native.rx_stride == 65664
            assert port.native.rx_count == 256 * 2048 // 65664
        run.end()
    back_end.join()


def test_a_client_that_keeps_what_it_was_sent_keeps_no_memory(tmp_path: Path) -> None:
    """After its session the pages are the system's again, whoever still has the files; a driver that is held to a few
    mebibytes would otherwise die of it."""
    kept: list[int] = []
    with listening(tmp_path) as listener, running(tmp_path) as run:
        back_end = accept(listener)
        for _ in range(2):
            with run.connect() as port:
                kept += [os.dup(fd) for fd in port._fds[:3]]
                port.allocate(timeout=DEADLINE_S)[0].data[:] = b"x" * port.room
                assert all(os.fstat(fd).st_blocks > 0 for fd in (kept[-3], kept[-1]))
        with run.connect():
            pass
        assert [os.fstat(fd).st_blocks for fd in kept] == [0] * 6
        for fd in kept:
            os.close(fd)
        run.end()
    back_end.join()


def test_received_frames_can_be_shared_read_only(tmp_path: Path) -> None:
    """The device's mapping, and the driver's, are older than the seal; a client's is not."""
    manifest = tmp_path / "vnode.yml"
    manifest.write_text(EXAMPLE.read_text().replace("- CAP_MEM_SHARE #", "- CAP_MEM_SHARE: ro #"))
    with listening(tmp_path) as listener, running(tmp_path, manifest=str(manifest)) as run:
        back_end = accept(listener)
        with run.connect() as port:
            back_end.await_kick(DEADLINE_S)
            assert any(region.size == 64 * 2048 for region in back_end.regions)
            with pytest.raises(PermissionError):
                mmap.mmap(port._fds[1], 64 * 2048)
            mmap.mmap(port._fds[1], 64 * 2048, prot=mmap.PROT_READ).close()
        code, _, err = run.end()
    back_end.join()
    assert code == 0, err


def test_back_end_connects_to_us(tmp_path: Path) -> None:
    with running(tmp_path, "--vhost-user-listen") as run:
        path = tmp_path / "back-end"
        for _ in range(2):
            back_end = FakeBackEnd()
            stream = socket.socket(socket.AF_UNIX)
            _connect(stream, path)
            back_end.start(stream)
            with run.connect() as port:
                back_end.die()
                with pytest.raises(PortClosed):
                    port.receive(timeout=DEADLINE_S)
        code, _, err = run.end(signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert not path.exists()


def _connect(stream: socket.socket, path: Path) -> None:
    """There is no event for the first listen() at a path."""
    deadline = time.monotonic() + DEADLINE_S
    while stream.connect_ex(str(path)):
        assert time.monotonic() < deadline, f"nobody listens at {path}"
        time.sleep(0.01)


def test_nobody_there(tmp_path: Path) -> None:
    with running(tmp_path, "--back-end-timeout", "0.2") as run:
        _, err = run.process.communicate(timeout=DEADLINE_S)
    assert run.process.returncode == 4
    assert f"{tmp_path}/back-end: no vhost-user back-end within 0.2 s: there is no such socket; start one" in err
    assert "Traceback" not in err


def test_back_end_that_is_none(tmp_path: Path) -> None:
    with running(tmp_path) as run, listening(tmp_path) as listener:
        stream, _ = listener.accept()
        with stream:
            stream.recv(12)
            stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            _, err = run.process.communicate(timeout=DEADLINE_S)
    assert run.process.returncode == 4
    assert "GET_FEATURES: it answered request" in err
    assert "Traceback" not in err


def test_stops_while_nobody_is_there(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            _connect(probe, run.socket)
        code, _, err = run.end()
    assert code == 0
    assert "Traceback" not in err


@pytest.mark.parametrize("text", ["", "52:54:00:12:34", "01:00:5e:00:00:01", "00:00:00:00:00:00", "52:54:00:12:34:zz"])
def test_no_mac_address(text: str) -> None:
    with pytest.raises(UsageError, match="MAC address"):
        parse_mac(text)


def test_options_that_need_a_back_end() -> None:
    command = [sys.executable, "-m", "netbridge", "run", "net-bridge", "--mac", "52:54:00:12:34:56"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--vhost-user PATH" in done.stderr


# ---- A back-end that lies, once there was one


def rubbish(_answer: bytes) -> tuple[bytes, list[int]]:
    return b"HTTP/1.1 400 Bad Request\r\n\r\n", []


def serve_once(run: Run, listener: socket.socket, number: int) -> None:
    """A good back-end is found, and a client served with it."""
    back_end = accept(listener)
    with run.connect(name=f"client-{number}") as port:
        back_end.await_kick(DEADLINE_S)
        assert port.link_up
        back_end.die()
        with pytest.raises(PortClosed):
            port.receive(timeout=DEADLINE_S)


@pytest.mark.parametrize(
    "request_",
    [spec.GET_FEATURES, spec.GET_PROTOCOL_FEATURES, spec.GET_QUEUE_NUM, spec.SET_MEM_TABLE, spec.GET_STATUS],
    ids=["features", "protocol features", "pairs", "memory", "status"],
)
def test_one_that_talks_nonsense_is_hung_up_on_and_the_next_is_taken(tmp_path: Path, request_: int) -> None:
    with listening(tmp_path) as listener, running(tmp_path) as run:
        serve_once(run, listener, 1)
        liar = FakeBackEnd(lies={request_: rubbish})
        liar.start(listener.accept()[0])
        liar.join()
        serve_once(run, listener, 2)
        code, out, err = run.end()
    assert code == 0, err
    assert "Traceback" not in err
    assert json.loads(out)["sessions"] == 2


def test_chatter_in_service_ends_the_session_and_not_the_driver(tmp_path: Path) -> None:
    with listening(tmp_path) as listener, running(tmp_path) as run:
        back_end = accept(listener)
        with run.connect() as port:
            back_end.await_kick(DEADLINE_S)
            back_end.stream.send(b"anybody there?")
            with pytest.raises(PortClosed) as closed:
                port.receive(timeout=DEADLINE_S)
            assert closed.value.reason is Reason.DEVICE_RESET
        back_end.join()
        serve_once(run, listener, 2)
        code, _, err = run.end()
    assert code == 0, err
    assert "Traceback" not in err


def test_one_that_lies_when_it_is_stopped(tmp_path: Path) -> None:
    """The client is gone, the rings are stopped, and the answer names another ring: nobody knows what it still does."""
    with listening(tmp_path) as listener, running(tmp_path) as run:
        back_end = accept(listener)
        with run.connect():
            back_end.await_kick(DEADLINE_S)
            back_end.lies[spec.GET_VRING_BASE] = rubbish
        back_end.join()
        serve_once(run, listener, 2)
        code, out, err = run.end()
    assert code == 0, err
    assert "Traceback" not in err
    assert json.loads(out)["sessions"] == 2
