"""What a packet socket tells beside a frame: the VLAN tag that was taken off it, its time, its direction; packet(7)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

ETH_P_ALL = 3
SOL_PACKET = 263  # linux/socket.h; the rest is linux/if_packet.h
PACKET_STATISTICS, PACKET_AUXDATA = 6, 8
PACKET_OUTGOING = 4
SO_RCVBUFFORCE, SO_TIMESTAMPNS = 33, 35  # asm-generic/socket.h
TP_STATUS_VLAN_VALID, TP_STATUS_VLAN_TPID_VALID = 1 << 4, 1 << 6
ETH_P_8021Q = 0x8100
AUXDATA = struct.Struct("IIIHHHH")  # status, len, snaplen, mac, net, vlan_tci, vlan_tpid

Ancillary = Sequence[tuple[int, int, bytes]]
"""As recvmsg() has it: level, kind, value."""


def tag_of(ancillary: Ancillary) -> bytes:
    """The 802.1Q tag that came beside a frame, to be put behind its two addresses; empty when there was none."""
    for level, kind, value in ancillary:
        if level == SOL_PACKET and kind == PACKET_AUXDATA and len(value) >= AUXDATA.size:
            status, *_, tci, tpid = AUXDATA.unpack_from(value)
            if status & TP_STATUS_VLAN_VALID:
                return struct.pack(">HH", tpid if status & TP_STATUS_VLAN_TPID_VALID else ETH_P_8021Q, tci)
    return b""
