"""One end of a conversation between two guests: `python3 -m tests.e2e.peer serve ADDRESS`, or with other verbs the end
that asks (they print JSON). What is asked for goes over a TCP connection; see `serve`."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import sys
import time

PORT, UDP_PORT = 7777, 7778
CHUNK = 1 << 16
SECONDS = 60.0


def pattern(count: int) -> bytes:
    """Bytes that repeat nowhere near."""
    return random.Random(count).randbytes(count)


def take(connection: socket.socket, count: int) -> str:
    """Receives so many bytes; their SHA-256."""
    digest = hashlib.sha256()
    while count:
        data = connection.recv(min(count, CHUNK))
        if not data:
            raise EOFError(f"the connection ended {count} bytes early")
        digest.update(data)
        count -= len(data)
    return digest.hexdigest()


def serve(address: str) -> None:
    """Obeys one line for each connection: `take N` (answers with the SHA-256 of N bytes), `give N` (sends N bytes), or
    `datagrams` (what has come to the UDP port since the last such line: how many, and how many different)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.socket(family, socket.SOCK_DGRAM) as datagrams,
        socket.create_server((address, PORT), family=family) as server,
    ):
        datagrams.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE (asm-generic/socket.h)
        datagrams.bind((address, UDP_PORT))
        datagrams.setblocking(False)
        print("serving", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(SECONDS)
                verb, number = read_line(connection).split()
                if verb == "take":
                    connection.sendall(take(connection, int(number)).encode() + b"\n")
                elif verb == "give":
                    connection.sendall(pattern(int(number)))
                else:
                    connection.sendall(json.dumps(waiting(datagrams)).encode() + b"\n")


def read_line(connection: socket.socket) -> str:
    """A line and nothing of what follows it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise EOFError("the connection ended within a line")
        line += byte
    return line.decode()


def waiting(datagrams: socket.socket) -> list[int]:
    came = []
    while True:
        try:
            came.append(datagrams.recv(CHUNK)[:4])
        except BlockingIOError:
            return [len(came), len(set(came))]


def ask(address: str, verb: str, number: int) -> socket.socket:
    connection = socket.create_connection((address, PORT), timeout=SECONDS)
    connection.sendall(f"{verb} {number}\n".encode())
    return connection


def send_datagrams(address: str, count: int, length: int) -> dict[str, object]:
    """Sends datagrams as fast as they go, and asks how many came: TCP comes behind them on the same way."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        for number in range(count):
            sender.sendto(number.to_bytes(4, "big") + bytes(length - 4), (address, UDP_PORT))
    with ask(address, "datagrams", 0) as connection:
        came, different = json.loads(read_line(connection))
    return {"sent": count, "came": came, "different": different}


def transfer(address: str, verb: str, count: int) -> dict[str, object]:
    """`take`: the other end takes; `give`: it gives. Both ends' checksums have to agree."""
    began = time.monotonic()
    data = pattern(count)
    with ask(address, verb, count) as connection:
        if verb == "take":
            connection.sendall(data)
            theirs = read_line(connection).strip()
        else:
            theirs = take(connection, count)
    seconds = time.monotonic() - began
    return {"equal": theirs == hashlib.sha256(data).hexdigest(), "mbit_per_s": round(8e-6 * count / seconds, 1)}


def main() -> None:
    verb, address, *numbers = sys.argv[1:]
    if verb == "serve":
        serve(address)
    elif verb == "datagrams":
        print(json.dumps(send_datagrams(address, *map(int, numbers))))
    else:
        print(json.dumps(transfer(address, verb, *map(int, numbers))))


if __name__ == "__main__":
    main()
