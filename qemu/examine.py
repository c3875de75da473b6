"""Looks at a box before tests take its NIC: whether that one is there, and whether anything would be lost with it.

The worst that can happen to a box on another floor is that a test takes the NIC through which one is connected. So that
is found out first, by following the connection's own address, and the default route, down to PCI functions: through
bridges, bonds and VLANs, and to whatever shares an IOMMU group with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qemu.errors import HarnessError

if TYPE_CHECKING:
    from qemu.inside import Inside

LOOK_SECONDS = 30.0
NETWORK = "0x02"

# Runs in the box, in an interpreter without site-packages. 0x8912 is SIOCGIFCONF (linux/sockios.h); the struct ifreq
# that it fills an array with has 40 bytes on machines of 64 bits: a name, and an address behind it.
LOOK = """
import array, fcntl, glob, os, re, socket, struct
ADDRESS = r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}[.][0-7]"
def _text(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
def _addresses():
    found = {}
    names = array.array("B", bytes(40 * 256))
    request = struct.pack("iP", len(names), names.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        length = struct.unpack("iP", fcntl.ioctl(asked, 0x8912, request))[0]
    for at in range(0, length, 40):
        name = names[at:at + 16].tobytes().split(b"\\0")[0].decode().partition(":")[0]
        found[socket.inet_ntoa(names[at + 20:at + 24].tobytes())] = name
    for line in _text("/proc/net/if_inet6").splitlines():
        digits, *_, name = line.split()
        found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))] = name
    return found
def _default():
    for line in _text("/proc/net/route").splitlines()[1:]:
        words = line.split()
        if words[1] == words[7] == "00000000":
            return words[0]
    for line in _text("/proc/net/ipv6_route").splitlines():
        words = line.split()
        if words[1] == "00" and words[9] != "lo":
            return words[9]
    return ""
def _functions(interface):
    path = "/sys/class/net/" + interface
    found = set(re.findall(ADDRESS, os.path.realpath(path + "/device"))[-1:])
    for lower in glob.glob(path + "/lower_*"):
        found |= _functions(os.path.basename(lower)[6:])
    return found
def _box():
    pci = {}
    for path in glob.glob("/sys/bus/pci/devices/*"):
        group = path + "/iommu_group"
        driver = path + "/driver"
        interfaces = glob.glob(path + "/net/*") + glob.glob(path + "/virtio*/net/*")
        pci[os.path.basename(path)] = {
            "class": _text(path + "/class").strip(),
            "group": sorted(os.listdir(group + "/devices")) if os.path.exists(group) else [],
            "driver": os.path.basename(os.readlink(driver)) if os.path.islink(driver) else "",
            "interfaces": sorted(map(os.path.basename, interfaces)),
        }
        for name in pci[os.path.basename(path)]["interfaces"]:
            pci[os.path.basename(path)]["mac"] = _text("/sys/class/net/%s/address" % name).strip()
    interfaces = os.listdir("/sys/class/net")
    return {
        "uid": os.geteuid(),
        "connection": os.environ.get("SSH_CONNECTION", ""),
        "addresses": _addresses(),
        "default": _default(),
        "pci": pci,
        "functions": {name: sorted(_functions(name)) for name in interfaces},
    }
_box()
"""


def look(box: Inside) -> dict[str, Any]:
    """What there is to know of the box. Raises AgentError, GuestLost."""
    facts: dict[str, Any] = box.eval(LOOK, LOOK_SECONDS)
    return facts


def obstacle(facts: Mapping[str, Any], nic: str) -> str | None:
    """Why tests may not take the NIC, and what to do; None when they may."""
    if facts["uid"] != 0:
        return f"one is user {facts['uid']} there, and VFIO takes root: connect as root (ssh://root@…)"
    pci = facts["pci"]
    networks = sorted(address for address, about in pci.items() if about["class"].startswith(NETWORK))
    if nic not in pci:
        return f"there is no PCI function {nic}; its NICs are {', '.join(networks) or 'none'}"
    if nic not in networks:
        kind = pci[nic]["class"]
        return f"the PCI function {nic} is no NIC (class {kind}); its NICs are {', '.join(networks) or 'none'}"
    group = set(pci[nic]["group"]) | {nic}
    for why, interface in _needed(facts):
        taken = group.intersection(facts["functions"].get(interface, ()))
        if nic in taken:
            return f"the NIC {nic} carries {why} (interface {interface}): taking it would cut the box off"
        if taken:
            with_it = ", ".join(sorted(taken))
            return f"the NIC {nic} shares an IOMMU group with {with_it}, which carries {why} (interface {interface})"
    if not pci[nic]["group"]:
        return (
            f"the NIC {nic} is behind no IOMMU: switch VT-d or AMD-Vi on in the firmware, and put intel_iommu=on on "
            "the kernel's command line"
        )
    return None


def _needed(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the box is not to lose: in words, and the interface that carries it."""
    found = []
    words = facts["connection"].split()
    if len(words) == 4:  # client, its port, server, its port: see ssh(1)
        address = words[2].removeprefix("::ffff:").partition("%")[0]
        if interface := facts["addresses"].get(address):
            found.append((f"this connection ({address})", interface))
    if facts["default"]:
        found.append(("the box's default route", facts["default"]))
    return found


def mac_address(facts: Mapping[str, Any], nic: str) -> str:
    """The NIC's address, by its kernel driver's interface. Raises HarnessError when it has no such driver."""
    about = facts["pci"][nic]
    mac = str(about.get("mac") or "")
    if not mac:
        has = f"the driver {about['driver']}" if about["driver"] else "no driver"
        raise HarnessError(
            f"the NIC {nic} has no network interface now ({has}), so its address is not known: give it back to its own "
            f"driver (echo {nic} >/sys/bus/pci/drivers_probe)"
        )
    return mac
