"""A labgrid strategy for a machine with an operating system of its own: it is off, or on and to be reached by ssh."""

from __future__ import annotations

import enum

import attr
from labgrid import target_factory
from labgrid.step import step
from labgrid.strategy import Strategy, StrategyError, never_retry
from labgrid.util import Timeout

BOOT_SECONDS = 600.0


def _registered(cls: type) -> type:
    """Known to labgrid by its name. An environment file is read anew for each who names it, and this with it."""
    return cls if cls.__name__ in target_factory.drivers else target_factory.reg_driver(cls)


class Status(enum.Enum):
    unknown = 0
    off = 1
    on = 2


@_registered
@attr.s(eq=False)
class BoxStrategy(Strategy):
    """`boot_seconds` is how long the box may take from the power switch to sshd."""

    bindings = {"power": "PowerProtocol", "ssh": "SSHDriver", "console": {"ConsoleProtocol", None}}  # noqa: RUF012

    boot_seconds = attr.ib(default=BOOT_SECONDS, converter=float)
    status = attr.ib(default=Status.unknown)

    @never_retry
    @step()
    def transition(self, status: str | Status) -> None:
        """Brings the box to "on" or "off"."""
        wanted = Status[status] if isinstance(status, str) else status
        if wanted == self.status:
            return
        self.target.activate(self.power)
        if wanted == Status.off:
            self.target.deactivate(self.ssh)
            self.power.off()
        elif wanted == Status.on:
            self.power.on()
            self._await_ssh()
        else:
            raise StrategyError(f"a box can be brought to on or off, not to {wanted.name}")
        self.status = wanted

    def _await_ssh(self) -> None:
        timeout = Timeout(self.boot_seconds)
        while True:
            try:
                self.target.activate(self.ssh)
                return
            except Exception:
                # The driver itself has waited for as long as it was told to; a box may take longer.
                if timeout.expired:
                    raise
