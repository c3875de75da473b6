"""A service that hands headers and frames over as they are: `python3 -m tests.e2e.offload_service SOCKET OFFLOADS`, in
a guest. OFFLOADS is a mask of what it can take.

Each line on its input is a JSON object. {"send": [[frame, header], ...]} sends frames (base64), each with the six
numbers of its virtio header or null. {"receive": N, "from": ADDRESS} waits for the next N frames from that address,
whatever else comes meanwhile, and answers with them and their headers, and in how many buffers each came.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

from netbridge.client import Client, Frame, Offload, VirtioNetHeader, connect

SECONDS = 60.0


def main() -> None:
    with connect(sys.argv[1], name="offloads", offloads=Offload(int(sys.argv[2])), wait=SECONDS) as client:
        say(offloads=int(client.offloads), largest=client.largest)
        for line in sys.stdin:
            asked = json.loads(line)
            if "send" in asked:
                send(client, asked["send"])
                say(sent=len(asked["send"]))
            else:
                source = bytes.fromhex(asked["from"].replace(":", ""))
                say(frames=receive(client, asked["receive"], source))


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def send(client: Client, frames: list[Any]) -> None:
    for data, header in frames:
        client.send_bytes(
            base64.b64decode(data), timeout=SECONDS, header=None if header is None else VirtioNetHeader(*header)
        )


def receive(client: Client, count: int, source: bytes) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    while len(found) < count:
        frames = client.receive(timeout=SECONDS)
        if not frames:
            break  # who asked sees that some are missing
        found += [as_dict(frame) for frame in frames if bytes(frame)[6:12] == source]
        client.release(frames)
    return found


def as_dict(frame: Frame) -> dict[str, object]:
    header = frame.header
    return {
        "frame": base64.b64encode(bytes(frame)).decode(),
        "header": None if header is None else list(header),
        "buffers": len(frame.pieces),
    }


if __name__ == "__main__":
    main()
