"""One end of a conversation between two guests: `python3 -m tests.e2e.peer serve ADDRESS` for TCP, `count ADDRESS` for
datagrams, or with other verbs the end that begins (they print JSON)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import socket
import sys
import time
from collections.abc import Iterator

PORT, UDP_PORT = 7777, 7778
CHUNK = 1 << 16
SECONDS = 60.0


def pattern(count: int) -> Iterator[bytes]:
    """So many bytes, in chunks of which no two are alike."""
    noise = random.Random(count).randbytes(CHUNK)
    for number, start in enumerate(range(0, count, CHUNK)):
        yield (number.to_bytes(8, "big") + noise[8:])[: count - start]


def give(connection: socket.socket, count: int) -> str:
    """Sends so many bytes; their SHA-256."""
    digest = hashlib.sha256()
    for chunk in pattern(count):
        connection.sendall(chunk)
        digest.update(chunk)
    return digest.hexdigest()


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
    """Obeys one line for each connection: `take N` (answers with the SHA-256 of N bytes) or `give N` (sends N bytes and
    their SHA-256)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, PORT), family=family) as server:
        print("serving", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(SECONDS)
                verb, number = read_line(connection).split()
                digest = (take if verb == "take" else give)(connection, int(number))
                connection.sendall(digest.encode() + b"\n")


def read_line(connection: socket.socket) -> str:
    """A line and nothing of what follows it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise EOFError("the connection ended within a line")
        line += byte
    return line.decode()


def count(address: str) -> None:
    """Says how many datagrams have come, and how many different ones, for each line on standard input."""
    came: list[bytes] = []
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as datagrams:
        datagrams.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE (asm-generic/socket.h)
        datagrams.bind((address, UDP_PORT))
        datagrams.setblocking(False)
        print("counting", flush=True)
        for _ in sys.stdin:
            with contextlib.suppress(BlockingIOError):
                while True:
                    came.append(datagrams.recv(CHUNK)[:4])
            print(json.dumps({"came": len(came), "different": len(set(came))}), flush=True)


def ask(address: str, verb: str, number: int) -> socket.socket:
    connection = socket.create_connection((address, PORT), timeout=SECONDS)
    connection.sendall(f"{verb} {number}\n".encode())
    return connection


def send_datagrams(address: str, number: int, length: int) -> dict[str, int]:
    """Sends datagrams as fast as they go."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        for each in range(number):
            sender.sendto(each.to_bytes(4, "big") + bytes(length - 4), (address, UDP_PORT))
    return {"sent": number}


def transfer(address: str, verb: str, count: int) -> dict[str, object]:
    """`take`: the other end takes; `give`: it gives. Both ends' checksums have to agree."""
    began = time.monotonic()
    with ask(address, verb, count) as connection:
        ours = give(connection, count) if verb == "take" else take(connection, count)
        theirs = read_line(connection).strip()
    seconds = time.monotonic() - began
    return {"equal": ours == theirs, "mbit_per_s": round(8e-6 * count / seconds, 1)}


def main() -> None:
    verb, address, *numbers = sys.argv[1:]
    if verb == "serve":
        serve(address)
    elif verb == "count":
        count(address)
    elif verb == "datagrams":
        print(json.dumps(send_datagrams(address, *map(int, numbers))))
    else:
        print(json.dumps(transfer(address, verb, *map(int, numbers))))


if __name__ == "__main__":
    main()
