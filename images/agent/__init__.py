"""The guest's end of the harness: runs commands, moves files and answers probes over one virtio-serial port.

One thread, one epoll loop, the standard library only. In a guest this package is /usr/lib/guest/agent, on a box a zip
file that came by the connection; so its modules import each other relatively. The host's end imports `protocol` from
here, so there is one description of the framing.

Modules of the standard library that only commands need are imported when they are: under emulation an import costs
milliseconds, and the greeting is what the host waits for. For the same reason there is os.path here and no pathlib,
which costs more to import than everything else together.
"""
