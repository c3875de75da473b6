"""What a client has asked of the device: which frames it wants, and the MAC address. Kept, to be asked for again.

A device knows nothing of it any more after a reset. A session begins with every frame wanted, which is asked for as
well, because a device's own idea of it at first is not written down anywhere.
"""

from __future__ import annotations

from netbridge.ipc.requests import Filter, Mac, Verdict, is_station
from netbridge.virtio import commands, features
from netbridge.virtio.errors import ControlRefused, ControlTimeout, Misbehaved, NotOffered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from netbridge.virtio.net import NetDevice

EVERYTHING = Filter(promiscuous=True)
# What a command ends in when the device must be reset.
FATAL = (ControlTimeout, Misbehaved)


class Station:
    """The settings of one session's client on `net`, which must be in service whenever something is asked of it."""

    def __init__(self, net: NetDevice) -> None:
        self._net = net
        self._filter = EVERYTHING
        self._mac: bytes | None = None

    @property
    def mac(self) -> bytes:
        """The address that the device has now."""
        return self._mac or self._net.facts.mac

    def begin(self) -> None:
        """Asks for everything anew, of a device that has been reset. Raises DeviceError."""
        if self._mac is not None:
            self._net.command(commands.mac_address(self._mac))
        if self._net.negotiation.has(features.CTRL_RX):
            # Some devices let everything in after a reset, some nothing: so this one is always said.
            self._change(Filter(promiscuous=not self._filter.promiscuous), self._filter)

    def ask(self, request: Filter | Mac) -> tuple[Verdict, str]:
        """Has the device do what the client wants; what became of it, with words for the client. What the device
        refuses changes nothing. Raises ControlTimeout and Misbehaved: the device must be reset, and what was asked is
        forgotten."""
        try:
            if isinstance(request, Mac):
                return self._ask_mac(request.mac)
            return self._ask_filter(request)
        except NotOffered as error:
            return Verdict.NOT_OFFERED, str(error)
        except ControlRefused as error:
            return Verdict.REFUSED, str(error)

    def _ask_mac(self, mac: bytes) -> tuple[Verdict, str]:
        if not is_station(mac):
            return Verdict.INVALID, f"{mac.hex(':')} is no station's address"
        self._net.command(commands.mac_address(mac))
        self._mac = mac
        return Verdict.DONE, ""

    def _ask_filter(self, wanted: Filter) -> tuple[Verdict, str]:
        why = wanted.why_invalid()
        if why:
            return Verdict.INVALID, why
        for needs in _needs(wanted):
            if not self._net.negotiation.has(needs):
                raise NotOffered(f"{self._net.name}: {needs} is not agreed with the device")
        try:
            self._change(self._filter, wanted)
        except ControlRefused:
            self._undo(wanted)
            raise
        self._filter = wanted
        return Verdict.DONE, ""

    def _undo(self, refused: Filter) -> None:
        try:
            self._change(refused, self._filter)
        except ControlRefused:
            pass  # such as taking out a VLAN that was not put in before the refusal

    def _change(self, old: Filter, new: Filter) -> None:
        """From one to the other. What lets frames in comes before what keeps them out, so that none that both want is
        missed."""
        if (new.unicast, new.multicast) != (old.unicast, old.multicast):
            self._net.command(commands.mac_table(new.unicast, new.multicast))
        for vlan in sorted(new.vlans - old.vlans):
            self._net.command(commands.vlan(vlan, True))
        for mode, before, after in zip(commands.RECEIVE_MODES, old.modes, new.modes, strict=True):
            if before != after:
                self._net.command(commands.receive_mode(mode, after))
        for vlan in sorted(old.vlans - new.vlans):
            self._net.command(commands.vlan(vlan, False))


def _needs(wanted: Filter) -> list[features.Feature]:
    needs = [features.CTRL_RX]
    if any(wanted.modes[2:]):
        needs.append(features.CTRL_RX_EXTRA)
    if wanted.vlans:
        needs.append(features.CTRL_VLAN)
    return needs
