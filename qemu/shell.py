"""A shell in a guest: boots one with a NIC, gives it to whoever sits at the terminal, and ends it afterwards.

    python -m qemu.shell                    a root shell in a guest of the default recipe
    python -m qemu.shell -- lspci -nn       one command; its output and exit code are the guest's

The terminal is the guest's while the shell runs, Ctrl-C included; Ctrl-] leaves it at once, whatever state the guest
is in.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import tempfile
import termios
import threading
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path

from qemu.codedisk import build_code_disk
from qemu.errors import HarnessError
from qemu.guest import Guest, Nic, boot
from qemu.guest_process import GuestProcess
from qemu.images import DEFAULT_RECIPE, Recipe, ensure_image

LEAVE = b"\x1d"
PATIENCE = 10.0
"""Whoever waits for a shell can end it, so a slow kernel has all the time it takes."""
SHELL = ("sh", "-c", "cd /code 2>/dev/null; exec $(command -v bash || echo sh) -i")


@contextlib.contextmanager
def _raw_terminal(fd: int) -> Iterator[None]:
    """The terminal passes every key on, until the end of the block, however that comes."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)  # what was typed ahead is not lost
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _size() -> tuple[int, int]:
    """Rows and columns of the terminal."""
    size = os.get_terminal_size(0)
    return size.lines, size.columns


def interact(guest: Guest, argv: Sequence[str] = SHELL) -> int:
    """Connect this process's standard streams with a command in the guest until it ends; returns its exit code.

    With a terminal, the command gets one, too, of the same kind and size. Returns 0 when the user left by Ctrl-].
    Raises GuestLost when the guest goes meanwhile.
    """
    terminal = os.isatty(0) and os.isatty(1)
    process = guest.start(
        argv,
        stdin=True,
        pty=_size() if terminal else None,
        env={"TERM": os.environ.get("TERM", "linux")} if terminal else None,
    )
    ended = os.eventfd(0, os.EFD_CLOEXEC)
    printer = threading.Thread(target=_print, args=(process, ended), name="guest output", daemon=True)
    previous = signal.getsignal(signal.SIGWINCH)
    try:
        with contextlib.ExitStack() as stack:
            if terminal:
                stack.enter_context(_raw_terminal(0))
                signal.signal(signal.SIGWINCH, lambda *_: process.resize(*_size()))
            printer.start()
            if not _type(process, ended):
                process.kill(signal.SIGHUP)
                return 0
        code = process.wait(10)
        return code if code >= 0 else 128 - code
    finally:
        signal.signal(signal.SIGWINCH, previous)
        if not process.done:
            process.kill()
        printer.join(5)
        os.close(ended)


def _print(process: GuestProcess, ended: int) -> None:
    """Copy what the command prints; both streams, each in its own order."""

    def copy(stream: str, fd: int) -> None:
        position = 0
        # A lost guest is told by the main thread; a reader of ours that has gone ends the copy and nothing else.
        with contextlib.suppress(HarnessError, OSError):
            while True:
                data, position = process.read(position, stream)
                if not data:
                    return
                while data:
                    data = data[os.write(fd, data) :]

    errors = threading.Thread(target=copy, args=("stderr", 2), daemon=True)
    errors.start()
    copy("stdout", 1)
    errors.join()
    os.eventfd_write(ended, 1)


def _type(process: GuestProcess, ended: int) -> bool:
    """Pass on what is typed until the command has ended; false when the user wants to leave before."""
    sources = [0, ended]
    terminal = os.isatty(0)
    while True:
        ready, _, _ = select.select(sources, [], [])
        if ended in ready:
            return True
        try:
            data = os.read(0, 4096)
        except OSError:
            data = b""
        if terminal and (not data or LEAVE in data):
            return False  # without data: whoever had the terminal has gone
        if not data:
            process.close_stdin()
            sources.remove(0)
        else:
            process.write(data)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qemu.shell", description="A shell in a guest.")
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="the image's recipe (%(default)s)")
    parser.add_argument("--code", type=Path, default=Path("images/code.toml"), help="what is at /code (%(default)s)")
    parser.add_argument("--accel", default=None, help="kvm, tcg or auto")
    parser.add_argument("--machine", choices=("q35", "pc"), default="q35", help="pc has the NIC at 00:1f.0, IRQ 11")
    parser.add_argument("--artefacts", type=Path, default=None, help="where console, capture and logs are kept")
    parser.add_argument("command", nargs="*", help="a command to run instead of a shell")
    options = parser.parse_args(arguments)
    # A polite end, from wherever it is asked for, goes the way of every other: through the context managers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        with contextlib.ExitStack() as stack:
            artefacts = options.artefacts or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guest-")))
            image = ensure_image(Recipe.load(options.recipe), progress=say)
            code = build_code_disk(image, options.code, artefacts / "code.img")
            guest = stack.enter_context(
                boot(
                    image,
                    code=code,
                    nics=[Nic()],
                    accel=options.accel or "auto",
                    machine=options.machine,
                    artefacts=artefacts,
                    patience=PATIENCE,
                    say=say,
                )
            )
            if options.command:
                return interact(guest, options.command)
            say(f"guest {guest.origin}, under {guest.accel}; Ctrl-] or exit leaves it")
            return interact(guest)
    except (HarnessError, ValueError) as error:
        say(f"{error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
