"""The front-end of vhost-user: a virtio network device that is another process on this machine.

Source: the vhost-user specification (QEMU, docs/interop/vhost-user.rst). No VFIO, no root and no guest are needed: the
back-end (DPDK's net_vhost, say) is reached over a Unix socket, is handed the memory as memfds and the notifications as
eventfds. `VhostUser` is the `Transport`, `VhostMemory` takes the place of `vfio.Iommu`.

    messages.py    requests and replies as plain data
    connection.py  one connection: a request, its answer, a deadline
    memory.py      what the back-end may reach
    transport.py   the device's registers, put together from requests
"""
