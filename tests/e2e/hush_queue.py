"""Has a device seem to want no notifications of a queue, as root, in a guest:
`python3 -m tests.e2e.hush_queue PID RECEIVE USED`.

PID is that of a driver whose rings are split ones without EVENT_IDX; RECEIVE is where the device sees the descriptors
of its receive queue, USED the used ring of the queue to hush. What the driver publishes there lies until the device
looks of its own accord, which it does not.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from tests.e2e.break_ring import find_receive_queue

NO_NOTIFY = 1  # VRING_USED_F_NO_NOTIFY


def main() -> None:
    pid, receive, used = (int(word) for word in sys.argv[1:])
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        at = find_receive_queue(pid, memory)
        if at is None:
            sys.exit("no receive queue was found in the driver's memory")
        memory.seek(at + used - receive)
        memory.write(struct.pack("<H", NO_NOTIFY))


if __name__ == "__main__":
    main()
