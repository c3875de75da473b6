"""DPDK's testpmd in a guest, on a function that vfio-pci has, told what to do over its own prompt."""

from __future__ import annotations

import re

from qemu.guest import Guest

PROMPT = b"testpmd> "
START_SECONDS, COMMAND_SECONDS = 120.0, 60.0


class GuestTestpmd:
    """Runs until quit(), or is killed when the block is left; `options` as its command line has them. Raises
    RuntimeError with its words when it ends."""

    def __init__(self, guest: Guest, address: str, *options: str) -> None:
        self._process = guest.start(self.words(address, *options), stdin=True)
        self._position = 0
        self._said = b""
        try:
            self._to_prompt(START_SECONDS)
        except BaseException:
            self._process.kill()
            raise

    @staticmethod
    def words(address: str, *options: str) -> list[str]:
        """Its command line, for one processor. It gets along without huge pages of a file, but not without any."""
        system = ["--lcores", "(0,1)@0", "--iova-mode", "va", "--no-telemetry", "-m", "128", "-a", address]
        own = ["--interactive", "--total-num-mbufs=8192", "--disable-link-check"]
        return ["stdbuf", "-oL", "dpdk-testpmd", *system, "--", *own, *options]

    @property
    def pid(self) -> int | None:
        """Its process in the guest."""
        return self._process.pid

    def tell(self, command: str) -> str:
        """Gives a command, and returns what was printed until the next prompt."""
        self._process.write(command.encode() + b"\n")
        return self._to_prompt(COMMAND_SECONDS)

    def received(self) -> int:
        """Frames that the port has received since its start."""
        found = re.search(r"RX-packets: *(\d+)", self.tell("show port stats 0"))
        if found is None:
            raise RuntimeError("testpmd in the guest shows no RX-packets")
        return int(found[1])

    def quit(self) -> None:
        self._process.write(b"quit\n")
        self._process.wait(COMMAND_SECONDS)

    def __enter__(self) -> GuestTestpmd:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__(None, None, None)

    def _to_prompt(self, seconds: float) -> str:
        self._said = b""
        while PROMPT not in self._said:
            piece, self._position = self._process.read(self._position, "stdout", seconds)
            if not piece:
                said = (self._said.decode(errors="replace") + self._process.stderr)[-2000:]
                raise RuntimeError(f"testpmd in the guest ended: {said}")
            self._said += piece
        return self._said.decode(errors="replace")
