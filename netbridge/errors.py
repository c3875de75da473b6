"""The errors a user of Net-Bridge may meet, and the exit code each one ends the command with.

Every message is complete: it names the thing, says what was expected and what to do next, and is printed as it stands,
without a traceback. Errors of the `vfio` package are a family of their own (`vfio.VfioError`), because that package
knows nothing of this one; the command line ends them with `ExitCode.DEVICE`, like a `DeviceError`.

The driver process imports this module and has little memory: hence no `enum`, no `dataclasses`, no `typing`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from netbridge.vnode.wording import Problem


class ExitCode:
    """What the `netbridge` command says to whoever started it. Documented in docs/manifest.md."""

    OK = 0
    FAILURE = 1  # anything without a code of its own
    USAGE = 2  # the command line or the manifest is wrong
    REFUSED = 3  # the manifest does not grant what was asked for
    DEVICE = 4  # the device, VFIO or the IOMMU
    PORT = 5  # the port to the service: its socket, the handshake, a peer that broke the protocol
    SANDBOX = 6  # the process could not be confined as the manifest asks
    INTERRUPTED = 130  # Ctrl-C, as shells report it (128 + SIGINT)


class NetbridgeError(Exception):
    """The root of the family. `str()` is the whole message for the user."""

    exit_code = ExitCode.FAILURE


class UsageError(NetbridgeError):
    """The command was called in a way that means nothing."""

    exit_code = ExitCode.USAGE


class ManifestError(NetbridgeError):
    """A manifest that cannot be used. `problems` are all of them, in the order of the file; `str()` is a line for each.

    A line reads `file:line:column: key path: what is wrong; expected ...; did you mean ...?`.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, file: str, problems: tuple[Problem, ...]) -> None:
        if not problems:
            raise ValueError("a ManifestError needs at least one problem")
        super().__init__(file, problems)
        self.file = file
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self._line(problem) for problem in self.problems)

    def _line(self, problem: Problem) -> str:
        place = self.file if problem.line is None else f"{self.file}:{problem.line}:{problem.column or 1}"
        return f"{place}: {problem}"

    def as_dict(self) -> dict[str, object]:
        """The same for machines: the file and its problems."""
        return {"file": self.file, "problems": [problem.as_dict() for problem in self.problems]}


class CapabilityRefused(NetbridgeError):
    """Something was asked for that the manifest does not allow. `capability` and `purpose` say what and for what."""

    exit_code = ExitCode.REFUSED

    def __init__(self, capability: str, purpose: str, message: str) -> None:
        super().__init__(capability, purpose, message)
        self.capability = capability
        self.purpose = purpose
        self.message = message

    def __str__(self) -> str:
        return self.message


class CapabilityMissing(CapabilityRefused):
    """The manifest does not hold the capability at all."""


class CapabilityExceeded(CapabilityRefused):
    """The manifest holds the capability, but for something else or for less: another function, a smaller pool."""


class DeviceError(NetbridgeError):
    """The device is absent, is not what it should be, or does not do what it must."""

    exit_code = ExitCode.DEVICE


class PortError(NetbridgeError):
    """The port to the service cannot be opened, or a peer broke its protocol."""

    exit_code = ExitCode.PORT


class SandboxError(NetbridgeError):
    """The process could not be confined as its manifest asks, so it must not go on."""

    exit_code = ExitCode.SANDBOX
