"""In a guest: the driver with its work in its own process, without pump and port, as DPDK's applications have theirs.

    inprocess.py LOAD.so PCI receive|transmit|echo LENGTH TALLY

The function is vfio-pci's already. Says "serving" on stderr when it is ready, and polls until it is killed.
"""

import mmap
import os
import sys

from load import BUFFERS, STRIDE, Load  # type: ignore[import-not-found]  # beside this file, in the guest

import vfio
from netbridge.datapath._core import ffi, lib
from netbridge.virtio import features
from netbridge.virtio.dma import VfioDma
from netbridge.virtio.net import NetDevice
from netbridge.virtio.pci import VirtioPci


def main(program: str, address: str, kind: str, length: int, tally: str) -> None:
    counted = os.open(tally, os.O_RDWR)
    page = mmap.mmap(counted, 8)
    count = ffi.cast("uintptr_t", ffi.from_buffer(page))
    with (
        vfio.open_device(address) as device,
        NetDevice(VirtioPci(device), VfioDma(device.iommu), tx_slots=1 + BUFFERS) as net,
        vfio.Memory.anonymous(BUFFERS * STRIDE) as frames,
        device.iommu.map(frames) as mapping,
    ):
        net.configure()
        queues = [int(ffi.cast("uintptr_t", queue.handle)) for queue in (net.rx, net.tx)]
        load = Load(
            program,
            (queues[0], queues[1]),
            (frames.address, mapping.iova),
            (net.tx_slots.address, net.tx_slots.iova),
            int(count),
            copied=lib.NB_TX_MOST_COPIED,
            merges=net.negotiation.has(features.MRG_RXBUF),
            exchanges=True,
        )
        net.start()
        print("in process: serving frames", file=sys.stderr, flush=True)
        raise SystemExit(f"in process: fault {-1 - load.run(kind, length)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
