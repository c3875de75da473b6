"""An echo service that asks the device for what it is told to: `python3 -m tests.e2e.asking_echo`, in a guest.

Every line on its input is a JSON object: {"filter": {...}} with the fields of netbridge.client.Filter (addresses as
text, VLANs as a list), {"mac": "..."}, or {"facts": true}. It answers each with one line: {"verdict": "DONE"} or the
driver's verdict and words, or the client's facts. Frames go back to their sender meanwhile, MAC addresses exchanged.
"""

from __future__ import annotations

import json
import select
import sys
from typing import Any

from netbridge.client import Client, Filter, PortClosed, Reason, RequestRefused, connect

MODES = ("promiscuous", "all_multicast", "all_unicast", "no_multicast", "no_unicast", "no_broadcast")


def main() -> None:
    say(ready=True)
    while True:
        with connect(sys.argv[1], name="asking-echo", wait=30.0) as client:
            say(session=client.session)
            try:
                serve(client)
                return
            except PortClosed as error:
                say(closed=error.reason.name)
                if error.reason is Reason.SHUTDOWN:
                    return


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def serve(client: Client) -> None:
    """Until the end of its input, or of the session (PortClosed)."""
    with select.epoll() as poller:
        poller.register(client.fileno(), select.EPOLLIN)
        poller.register(sys.stdin.fileno(), select.EPOLLIN)
        while True:
            frames = client.receive(timeout=0)
            for frame in frames:
                addresses = frame.writable_data[:12]
                addresses[:] = bytes(addresses[6:]) + bytes(addresses[:6])
                addresses.release()
            client.forward(frames)
            if not client.arm():
                continue
            for fd, _ in poller.poll():
                if fd == sys.stdin.fileno():
                    line = sys.stdin.readline()
                    if not line:
                        return
                    say(**answer(client, json.loads(line)))


def answer(client: Client, asked: dict[str, Any]) -> dict[str, object]:
    try:
        if "filter" in asked:
            client.set_filter(as_filter(asked["filter"]))
        elif "mac" in asked:
            client.set_mac(bytes.fromhex(asked["mac"].replace(":", "")))
        else:
            return {
                "mac": client.mac.hex(":"),
                "mtu": client.mtu,
                "link_up": client.link_up,
                "speed_mbps": client.speed_mbps,
                "announcements": client.announcements,
                "session": client.session,
            }
    except RequestRefused as error:
        return {"verdict": error.verdict.name, "text": str(error)}
    return {"verdict": "DONE"}


def as_filter(fields: dict[str, Any]) -> Filter:
    addresses = {
        name: tuple(bytes.fromhex(text.replace(":", "")) for text in fields.get(name, ()))
        for name in ("unicast", "multicast")
    }
    modes = {name: bool(fields.get(name)) for name in MODES}
    return Filter(**modes, **addresses, vlans=frozenset(fields.get("vlans", ())))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
