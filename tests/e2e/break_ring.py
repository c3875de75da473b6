"""Breaks the receive queue of a running driver: `python3 -m tests.e2e.break_ring PID`, as root, in a guest.

Stops the driver, and writes into its available ring (a split one) that it had made more buffers available than the
queue has entries, which no driver may do. A device that looks at the ring asks for a reset (virtio 1.3 §2.1.2). Whoever
continues the driver does so after the device has looked.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO

PAGE = 4096
SIZE = 256  # entries
WRITABLE = 2  # VRING_DESC_F_WRITE


def looks_like_descriptors(page: bytes) -> bool:
    """Whether these are descriptors of receive buffers: all writable, all of one length, none of them linked."""
    descriptors = [struct.unpack_from("<QIHH", page, 16 * number) for number in range(SIZE)]
    lengths = {length for _, length, _, _ in descriptors}
    return (
        len(lengths) == 1 and 1500 < lengths.pop() <= 2048 and all(flags == WRITABLE for _, _, flags, _ in descriptors)
    )


def find_receive_queue(pid: int, memory: BinaryIO) -> int | None:
    """Where its descriptors are in the process's memory."""
    areas = re.findall(r"^(\w+)-(\w+) rw", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
    for area in areas:
        start, end = (int(text, 16) for text in area)
        if end - start < 3 * PAGE:
            continue
        memory.seek(start)
        try:
            page = memory.read(PAGE)
        except OSError:
            continue  # memory of a device
        if len(page) == PAGE and looks_like_descriptors(page):
            return start
    return None


def main() -> None:
    pid = int(sys.argv[1])
    os.kill(pid, signal.SIGSTOP)
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        at = find_receive_queue(pid, memory)
        if at is not None:
            memory.seek(at + PAGE + 2)
            (index,) = struct.unpack("<H", memory.read(2))
            memory.seek(at + PAGE + 2)
            memory.write(struct.pack("<H", (index + 0x4000) % (1 << 16)))
            print(f"available index {index} moved on by {0x4000}")
            return
    os.kill(pid, signal.SIGCONT)
    sys.exit("no receive queue was found in the driver's memory")


if __name__ == "__main__":
    main()
