"""What client and driver say to each other in a running session, and how it ends."""

from __future__ import annotations

import select
import time

from netbridge.ipc.control import ControlSocket
from netbridge.ipc.errors import BadMessage, PortClosed, PortError, Reason, RequestRefused
from netbridge.ipc.messages import Bye, Facts, Link
from netbridge.ipc.requests import Answer, Filter, Mac, Verdict


class Conversation:
    """The control socket of a session. `facts`: of the device, as the driver told them last. `announcements`: how often
    it said that the network is to hear of this station. `ended`: why the session is over; None while it is not."""

    def __init__(self, control: ControlSocket, facts: Facts) -> None:
        self._control = control
        self.facts = facts
        self.announcements = int(facts.announce)
        self.ended: PortError | None = None
        self._requests = 0
        self._answer: Answer | None = None

    def fileno(self) -> int:
        return self._control.fileno()

    def must_be_open(self) -> None:
        """Raises what ended the session, if it is over."""
        if self.ended is not None:
            raise self.ended

    def check(self) -> None:
        """Reads what the driver has said, without waiting. Raises PortClosed when the session is over."""
        self.must_be_open()
        try:
            while (message := self._control.receive()) is not None:
                if isinstance(message, Link):
                    self.facts = message.facts
                    self.announcements += message.facts.announce
                elif isinstance(message, Answer):
                    self._answer = message
                elif isinstance(message, Bye):
                    raise PortClosed(message.reason, message.text)
                else:
                    raise BadMessage(f"{type(message).__name__.upper()} in a running session", Reason.UNEXPECTED)
        except PortClosed as error:
            self.ended = error
            raise
        except BadMessage as error:
            raise self.broken(f"on the control socket: {error}", error.reason) from None

    def next_request(self) -> int:
        """A number for a request, another each time."""
        self._requests = (self._requests + 1) % (1 << 32)
        return self._requests

    def ask(self, request: Filter | Mac, timeout: float) -> None:
        """Asks the driver, and waits until it has done it. Raises RequestRefused, TimeoutError, PortClosed."""
        self.check()
        deadline = time.monotonic() + timeout
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        self._control.send(request.pack())
        while self._answer is None or self._answer.request != request.request:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise TimeoutError(f"the driver did not answer a request within {timeout:g} s")
            self.check()
        answer, self._answer = self._answer, None
        if answer.verdict is not Verdict.DONE:
            raise RequestRefused(answer.verdict, answer.text)

    def broken(self, what: str, reason: Reason = Reason.RING_FAULT) -> PortError:
        """The driver did what no driver may: says so to it, ends the session, and returns the error to raise."""
        self._control.send(Bye(reason, what).pack())
        self.ended = PortError(f"the driver broke the port's protocol: {what}")
        return self.ended

    def close(self) -> None:
        """Says BYE, unless the session is over already, and hangs up."""
        if self.ended is None:
            self._control.send(Bye(Reason.SHUTDOWN).pack())
            self.ended = PortError("this client was closed")
        self._control.close()
