"""vhost_load.c, the load in C on two virtqueues of the core, as Python has it: in a process on the host, or in a guest.

Needs nothing but the standard library, so that it can be put into a guest beside the script that uses it.
"""

from __future__ import annotations

import ctypes
import os
import threading

BUFFERS, STRIDE = 1024, 2048
KINDS = ("transmit", "receive", "echo")


class _Load(ctypes.Structure):
    """struct load"""

    _fields_ = (
        ("rx", ctypes.c_void_p),
        ("tx", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("iova", ctypes.c_uint64),
        ("stride", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
        ("slots", ctypes.c_void_p),
        ("slots_iova", ctypes.c_uint64),
        ("copied", ctypes.c_uint32),
        ("with_frame", ctypes.c_int32),
        ("merges", ctypes.c_int32),
        ("exchanges", ctypes.c_int32),
        ("stop", ctypes.c_int32),
        ("moved", ctypes.c_void_p),
        ("free_count", ctypes.c_uint32),
        ("free", ctypes.c_uint32 * 4096),
    )


class Load:
    """`queues`: addresses of the receive and the transmit queue's `struct nb_virtqueue`. `frames`: address and IOVA of
    BUFFERS buffers of STRIDE bytes; `slots`: of as many slots of sent frames and one more, zeroed; frames up to
    `copied` bytes are copied there. `merges`: MRG_RXBUF was agreed. `exchanges`: the echo exchanges MAC addresses.
    `tally`: address of eight bytes that count frames. All of it stays the caller's, and must outlive this."""

    def __init__(
        self,
        program: str,
        queues: tuple[int, int],
        frames: tuple[int, int],
        slots: tuple[int, int],
        tally: int,
        *,
        copied: int,
        merges: bool,
        exchanges: bool,
    ) -> None:
        self._lib = ctypes.CDLL(program)
        self._load = _Load(
            rx=queues[0],
            tx=queues[1],
            memory=frames[0],
            iova=frames[1],
            stride=STRIDE,
            slots=slots[0],
            slots_iova=slots[1],
            copied=copied,
            merges=merges,
            exchanges=exchanges,
            moved=tally,
        )
        self._thread: threading.Thread | None = None
        self._result = 0
        self._lib.load_start(ctypes.byref(self._load), BUFFERS)

    def run(self, kind: str, length: int) -> int:
        """Until `stop` is called in another thread: the frames moved, or -1 - the device's fault. `length` is of the
        frames that are generated, in bytes."""
        self._load.stop, self._load.length = 0, length
        call = getattr(self._lib, f"load_{kind}")
        call.restype = ctypes.c_int64
        return int(call(ctypes.byref(self._load)))

    def start(self, kind: str, length: int, processor: int, *, header_with_frame: bool) -> None:
        """`run` in a thread on that processor. `header_with_frame`: frames that are generated have their header in
        front of them in their buffer."""

        def body() -> None:
            os.sched_setaffinity(0, {processor})
            if os.geteuid() == 0:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -20)
            self._result = self.run(kind, length)

        self._result, self._load.with_frame = 0, header_with_frame
        self._thread = threading.Thread(target=body)
        self._thread.start()

    def stop(self) -> int:
        """Ends what `start` began; frames that it moved. Raises RuntimeError when the device did what none may."""
        if self._thread is None:
            return 0
        self._load.stop = 1
        self._thread.join()
        self._thread = None
        if self._result < 0:
            raise RuntimeError(f"the device broke a virtqueue: fault {-1 - self._result}")
        return self._result
