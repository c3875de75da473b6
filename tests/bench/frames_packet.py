"""AF_PACKET as Python has it, a system call a frame: frames_packet.py receive|transmit|echo LENGTH TALLY INTERFACE"""

import mmap
import os
import socket
import sys

ETH_P_ALL, PACKET_IGNORE_OUTGOING, SO_RCVBUFFORCE, SOL_PACKET = 3, 23, 33, 263


def main(what: str, length: int, tally: str, interface: str) -> None:
    with mmap.mmap(os.open(tally, os.O_RDWR), 8) as page, memoryview(page).cast("Q") as counted:
        port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # nothing comes before it is bound
        port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        port.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        port.bind((interface, 0 if what == "transmit" else ETH_P_ALL))
        print("frames_packet: serving frames", file=sys.stderr, flush=True)
        frame = bytearray(2048)
        room = memoryview(frame)
        frame[:14] = b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\2\x88\xb5"
        while True:
            if what != "transmit":
                length = port.recv_into(frame)
            if what == "echo":
                frame[:12] = frame[6:12] + frame[:6]
            if what != "receive":
                try:
                    port.send(room[:length])
                except OSError as error:
                    if error.errno != 105:  # ENOBUFS: the interface's queue is full, and has dropped it
                        raise
            counted[0] += 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
