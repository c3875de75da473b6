"""The client's end of the port, for network stacks in Python: frames are memoryviews straight into DMA memory.

    with connect(name="my-stack") as client:
        for frame in client.receive():
            with frame:
                print(bytes(frame.data[:14]).hex())
        client.send_bytes(b"...")

A frame that is longer than a buffer is in several: `frame.pieces`, and `send` of a list of buffers. Whoever asks for
offloads finds the virtio header of what came in `frame.header`, and sets `buffer.header` for what is sent.

A received frame is this process's until it is released, or sent from where it is with `forward`; a buffer to send is,
until it is sent. Using either afterwards raises. There are few of them, so give frames back soon: the driver drops what
comes while a client holds its limit.

A `Client` is for one thread. With asyncio use `receive_async` and `async for`; with another event loop, `arm` and
`fileno`. When the driver ends the session every call raises `PortClosed`; `connect` again for a new one (its `wait`
says how long to try), with new memory: nothing of the old session is of use then.

The port itself is described in docs/port.md. Here, `connecting` has the handshake, `memory` what is checked and mapped
of the driver's offer, `conversation` the control socket, `receiving` and `sending` the frames, `waiting` the doorbells,
and `session` the `Client` that they make together.
"""

from netbridge.client.connecting import connect
from netbridge.client.session import Client
from netbridge.ipc.errors import PortClosed, PortError, PortUnavailable, Reason, RequestRefused
from netbridge.ipc.frames import Buffer, Frame
from netbridge.ipc.offloads import Offload, VirtioNetHeader
from netbridge.ipc.requests import Filter, Verdict

__all__ = [
    "Buffer",
    "Client",
    "Filter",
    "Frame",
    "Offload",
    "PortClosed",
    "PortError",
    "PortUnavailable",
    "Reason",
    "RequestRefused",
    "Verdict",
    "VirtioNetHeader",
    "connect",
]
