"""Asks an NVMe drive who it is, from user space: resets it, gives it an admin queue in DMA memory, sends one Identify.

    python3 vfio/examples/nvme_identify.py 0000:02:00.0

Needs root and a drive that nothing uses. Numbers are from the NVM Express Base Specification 2.0, §3.1.3 (registers),
§4.1 and 4.2 (queue entries) and §5.17 (Identify).
"""

import struct
import sys
import time

import vfio

CAP, CC, CSTS, AQA, ASQ, ACQ, DOORBELLS = 0x00, 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
ENABLE = 1 | 6 << 16 | 4 << 20  # CC: on, submission entries of 2^6 bytes, completion entries of 2^4
IDENTIFY, CONTROLLER, ENTRIES = 0x06, 1, 16


def wait_ready(registers: vfio.Bar, ready: int) -> None:
    """Wait until CSTS.RDY is `ready`; how long that may take, CAP.TO says in units of 500 ms."""
    deadline = time.monotonic() + (registers.read64(CAP) >> 24 & 0xFF) * 0.5
    while registers.read32(CSTS) & 1 != ready:
        if time.monotonic() > deadline:
            raise SystemExit(f"the drive did not become {'ready' if ready else 'idle'} in time")
        time.sleep(0.001)


def identify(address: str) -> tuple[str, str]:
    """Serial number and model of the drive."""
    with vfio.bind(address), vfio.open_device(address) as device, vfio.Memory.memfd(3 * 4096, "nvme") as memory:
        registers = device.bar(0)
        registers.write32(CC, 0)
        wait_ready(registers, 0)
        dma = device.iommu.map(memory)
        submission, completion, answer = (dma.iova + 4096 * page for page in range(3))
        registers.write32(AQA, (ENTRIES - 1) << 16 | ENTRIES - 1)
        registers.write64(ASQ, submission)
        registers.write64(ACQ, completion)
        with vfio.EventFd() as interrupt:
            device.irqs.enable_msix([interrupt])
            device.set_bus_master(True)
            registers.write32(CC, ENABLE)
            wait_ready(registers, 1)
            # Opcode and command id, namespace, then the address of the answer (PRP1) and what to identify (CDW10).
            struct.pack_into("<IIQQQQI", memory.view, 0, IDENTIFY | 7 << 16, 0, 0, 0, answer, 0, CONTROLLER)
            registers.write32(DOORBELLS, 1)
            if not interrupt.wait(timeout=5):
                raise SystemExit("the drive did not answer within 5 s")
        command, status = struct.unpack_from("<HH", memory.view, 4096 + 12)
        if command != 7 or status >> 1:
            raise SystemExit(f"the drive refused: status {status >> 1:#x}")
        serial, model = struct.unpack_from("<20s40s", memory.view, 2 * 4096 + 4)
        return serial.decode("ascii").strip(), model.decode("ascii").strip()


if __name__ == "__main__":
    print("serial {}, model {}".format(*identify(sys.argv[1])))
