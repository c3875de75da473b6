"""The port between the driver and the one client that holds the network stack.

A Unix socket carries control messages and file descriptors; frames travel in shared memory. `docs/port.md` describes
both exactly. `geometry` and `messages` are pure data, `regions` and `session` own memory, `listener` and `server` are
the driver's end. The client's end is `netbridge.client`.

The driver, which has little memory, and every client import this: no `typing`, no `dataclasses`, nothing of `vfio`.
"""
