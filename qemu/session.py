"""What the tests of one run share: image, code disk, a guest, and the pytest inside it."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qemu.box import Box
from qemu.codedisk import build_code_disk, build_code_tree
from qemu.command import DEFAULT_IOMMU
from qemu.dimensions import Dimensions
from qemu.errors import GuestPanicked, HarnessError, NotOnMetal
from qemu.guest import Guest, Nic, boot
from qemu.images import Image, Recipe, ensure_image
from qemu.metal import Metal, unpinned
from qemu.remote import HOME, RemoteTests
from qemu.target import Target

BOOT_SECONDS = 180.0
EXIT_INFRASTRUCTURE = 8
"""The exit code of a run in which all that failed did so for reasons of the harness; one of pytest's own is 1."""
MEMORY_MB = 512


def exit_code(code: int, failed: Iterable[str], infrastructure: Iterable[tuple[str, str]]) -> int:
    """The exit code of a run that pytest would end with `code`; `failed` are the nodeids of what failed in it."""
    blamed = {nodeid for nodeid, _ in infrastructure}
    return EXIT_INFRASTRUCTURE if code == 1 and blamed and blamed.issuperset(failed) else code


class Booted(NamedTuple):
    """A guest that came up: accelerator with its reason, restored or booted and why, and in how many seconds."""

    accel: str
    origin: str
    seconds: float


@dataclass
class Needs:
    """What the shared guest is to have beyond what every guest has."""

    arguments: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    memory_mb: int = MEMORY_MB

    def add(self, devices: Sequence[str] = (), words: Sequence[str] = (), memory_mb: int = 0) -> None:
        """The arguments of one marker. Whole device lines are compared, so two tests may need the same one."""
        self.arguments += [line for line in devices if line not in self.arguments]
        self.words += [word for word in words if word not in self.words]
        self.memory_mb = max(self.memory_mb, memory_mb)


class Session:
    """What the tests of one run share: image, code disk, guest, and the pytest inside it."""

    def __init__(self, config: pytest.Config):
        self.config = config
        worker = getattr(config, "workerinput", {}).get("workerid", "")
        base: Path = config.getoption("artefacts") or config.rootpath / "build" / "tests"
        self.artefacts = base.absolute() / worker
        self.booted: list[Booted] = []
        """Each guest that came up, for the summary."""
        self.preparing: defaultdict[str, float] = defaultdict(float)
        """Seconds that image and code disk took to be there, by what it was; for the summary."""
        self.panics: list[str] = []
        """Of each guest that had to be booted once more what its kernel said."""
        self.infrastructure: list[tuple[str, str]] = []
        """What failed for reasons of the harness, not of what is tested: nodeid and reason."""
        self.only_infrastructure = False
        """Whether nothing failed but for such reasons, once all is over."""
        self.needs = Needs()
        self.patience = patience(str(config.getini("guest_patience")))
        self.target = Target.chosen(config, self.artefacts, self.patience, self.say)
        """The box on which tests run; None when they run in guests."""
        self._images: dict[Path, Image] = {}
        self._codes: dict[Path, Path] = {}
        self._guest: Guest | None = None
        self._remote: RemoteTests | None = None
        self._broken: HarnessError | None = None

    def say(self, line: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(line)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.preparing[what] += time.monotonic() - began

    def _once(self, make: Callable[[], Any]) -> Any:
        """What cannot be made is not tried again for every test that wants it."""
        if self._broken is not None:
            raise self._broken
        try:
            return make()
        except HarnessError as error:
            self._broken = error
            raise

    @property
    def accel(self) -> str:
        """The accelerator that was asked for."""
        if self.config.getoption("require_kvm"):
            if self.config.getoption("accel") == "tcg":
                raise pytest.UsageError("--require-kvm and --accel tcg: it can be one of the two")
            return "kvm"
        return str(self.config.getoption("accel") or "auto")

    def recipe(self) -> Path:
        """The recipe named in the configuration."""
        return self.config.rootpath / str(self.config.getini("guest_recipe"))

    def image(self, recipe: Path | None = None) -> Image:
        path = recipe or self.recipe()
        if path not in self._images:
            with self._timed("image"):
                self._images[path] = self._once(lambda: ensure_image(Recipe.load(path), progress=self.say))
        return self._images[path]

    def code(self, recipe: Path | None = None) -> Path:
        path = recipe or self.recipe()
        if path not in self._codes:
            specification = self.config.rootpath / str(self.config.getini("guest_code"))
            image = self.image(path)
            self.artefacts.mkdir(parents=True, exist_ok=True)
            out = self.artefacts / f"code-{path.stem}.img"
            with self._timed("code disk"):
                self._codes[path] = self._once(lambda: build_code_disk(image, specification, out))
        return self._codes[path]

    def boot(self, name: str, recipe: Path | None = None, **options: Any) -> Guest:
        """A guest of its own, for a test that changes or breaks it; to be closed by whoever asked for it."""
        if self.target is not None:
            raise NotOnMetal(f"needs a guest of QEMU's, made to measure: tests run on {self.target.name}")
        if (options.get("iommu") or DEFAULT_IOMMU[options.get("machine", "q35")]) == "virtio":
            image = self.image(recipe)
            if not image.has_driver("virtio_iommu"):
                pytest.skip(f"needs virtio-iommu: the kernel {image.release} has no driver for it")
        options.setdefault("accel", self.accel)
        options.setdefault("code", self.code(recipe))
        options.setdefault("timeout", BOOT_SECONDS * self.patience)
        options.setdefault("patience", self.patience)
        guest = self._boot(self.image(recipe), self.artefacts / name, options)
        self.booted.append(Booted(str(guest.accel), guest.origin, guest.boot_seconds))
        return guest

    def _boot(self, image: Image, artefacts: Path, options: dict[str, Any]) -> Guest:
        try:
            return boot(image, artefacts=artefacts, say=self.say, **options)
        except GuestPanicked as failure:
            # QEMU 7.2's TCG may take an operand for the flags when an access to memory breaks off an instruction that
            # writes both (cured in 2024, with tests/tcg/i386/test-flags.c). Nothing of what is tested has run by then,
            # so the guest may have another try; a second panic counts, and so does the end of its init, which is ours.
            if "Attempted to kill init" in str(failure).splitlines()[0]:
                raise
            self.panics.append(str(failure).splitlines()[0])
            self.say(f"{artefacts.name}: {self.panics[-1]}; booting it once more")
            kept = artefacts / "console.log"
            shutil.copyfile(kept, artefacts / "console-panicked.log")
            return boot(image, artefacts=artefacts, say=self.say, **options)

    @contextlib.contextmanager
    def fresh(self, name: str, wanted: Dimensions) -> Iterator[Guest]:
        """A guest that nobody has used, with these dimensions, until the end of the block.

        With a target it is the box, which has been used, and is as it is.
        """
        with contextlib.ExitStack() as stack:
            if self.target is not None:
                if reason := unpinned(wanted, Dimensions()):
                    raise NotOnMetal(reason)
                metal = stack.enter_context(self._metal(self.artefacts / name))
                yield metal  # type: ignore[misc] # as good as a guest, or NotOnMetal
                return
            peer = wanted.peer()
            if peer is not None:
                stack.enter_context(peer)
            yield stack.enter_context(self.boot(name, wanted.recipe(self.recipe()), **wanted.boot_options(peer)))

    def _metal(self, artefacts: Path, wired: bool = True) -> Metal:
        target = self.target
        assert target is not None
        return self._once(lambda: target.metal(artefacts, self._fill, wired))  # type: ignore[no-any-return]

    def _fill(self, box: Box) -> None:
        """Put the code where guests have theirs."""
        tree = self.artefacts / "code"
        shutil.rmtree(tree, ignore_errors=True)
        root = f"{box.scratch}/code"
        build_code_tree(self.image(), self.config.rootpath / str(self.config.getini("guest_code")), tree, root)
        box.put(tree, root)
        shutil.rmtree(tree)

    def guest(self) -> Guest:
        """The guest that all share. Booted anew when it was lost."""
        if self._guest is not None and self._guest.lost is not None:
            self.end_guest()
        if self._guest is None and self.target is not None:
            self._guest = self._metal(self.artefacts / "box", wired=False)  # type: ignore[assignment]
            assert self._guest is not None
        if self._guest is None:
            name = f"shared-guest-{len(self.booted)}"
            more = [word for line in self.needs.arguments for word in shlex.split(line)]
            self._guest = self._once(
                lambda: self.boot(
                    name,
                    nics=[Nic()],
                    extra_args=[*self.config.getini("guest_args"), *more],
                    # Of words that contradict each other the kernel takes the last.
                    append=[*self.needs.words, *self.config.getini("guest_words")],
                    memory_mb=self.needs.memory_mb,
                )
            )
        return self._guest

    @property
    def shared(self) -> Guest | None:
        """The guest that tests share, if it is there."""
        return self._guest

    def remote(self, items: list[pytest.Item]) -> RemoteTests:
        guest = self.guest()
        if self._remote is None or self._remote.guest is not guest:
            root, home, nic = str(self.config.getini("guest_root")), HOME, None
            if isinstance(guest, Metal):
                home, nic = guest.box.scratch, guest.nic
                root = f"{home}/code"
            files = dict.fromkeys(item.nodeid.split("::")[0] for item in items)
            paths = [f"{root}/{file}" for file in files]
            log = guest.artefacts / "guest-pytest.log"
            options = ["-o", f"addopts={shlex.join(for_guest(self.config.getini('addopts')))}"]
            self._remote = RemoteTests(
                guest,
                paths,
                root=root,
                log=log,
                options=options,
                configuration=self.config.inipath,
                coverage=self.config.getoption("guest_coverage"),
                patience=self.patience,
                home=home,
                nic=nic,
            )
        return self._remote

    def end_guest(self) -> None:
        if self._remote is not None:
            with contextlib.suppress(HarnessError):
                self._remote.close()
            self._remote = None
        if self._guest is not None:
            self._guest.close()
            self._guest = None

    def close(self) -> None:
        self.end_guest()
        if self.target is not None:
            self.target.close()


SESSION = pytest.StashKey[Session]()
"""Where a run's Config has it."""


def patience(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value <= 1000.0:
        raise pytest.UsageError(f"guest_patience: expected a number from 1 to 1000, found {text!r}")
    return value


def for_guest(options: list[str]) -> list[str]:
    """The options from the configuration without plugins of the host: this one, and parallel runs."""
    kept = []
    words = iter(options)
    for word in words:
        if word in ("-p", "-n"):
            next(words, None)
        elif not word.startswith(("-p", "-n")):
            kept.append(word)
    return kept
