"""Where the time goes until a guest is up: booted, stage by stage, and restored.

    python -m qemu.timing            # the configured image, three times each
    python -m qemu.timing --json

The stages of a boot are told apart by the kernel's own log: firmware and QEMU before its first line, the kernel until
it starts init, the initrd until the root is mounted, init until the agent greets, and what the host says to it then.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from qemu.cache import Cache
from qemu.codedisk import build_code_disk
from qemu.errors import HarnessError
from qemu.guest import Guest, Nic, boot
from qemu.images import DEFAULT_RECIPE, Recipe, ensure_image

STAGES = ("QEMU and firmware", "kernel", "initrd", "init and agent", "the host's first words")
LINE = re.compile(r"^\[\s*([\d.]+)\] (.*)$", re.MULTILINE)


def stages(log: str, greeted: float, seconds: float) -> dict[str, float]:
    """Seconds of each stage of a boot that took `seconds`, its agent greeting at `greeted` of the guest's uptime."""
    init = root = 0.0
    for stamp, message in LINE.findall(log):
        if message.startswith("Run /") and not init:
            init = float(stamp)
        elif message.startswith("EXT4-fs") and " mounted filesystem" in message and not root:
            root = float(stamp)
    # The guest's clock starts with its kernel; what QEMU takes before and the host afterwards is the rest.
    within = [init, root - init, greeted - root]
    return dict(zip(STAGES, [0.0, *within, 0.0], strict=True)) | {"guest": greeted, "all": seconds}


def measure_boot(guest: Guest) -> dict[str, float]:
    hello = guest.agent.hello or {}
    greeted = float(hello["uptime"])
    found = stages(guest.dmesg(), greeted, guest.boot_seconds)
    found[STAGES[4]] = guest.begin_seconds
    found[STAGES[0]] = max(0.0, guest.boot_seconds - greeted - guest.begin_seconds)
    return found


def measure(recipe: Path, code: Path, accel: str, rounds: int) -> dict[str, dict[str, float]]:
    """Medians, in seconds, by what was measured and stage. Raises HarnessError."""
    rows: dict[str, list[dict[str, float]]] = {"build": [], "boot": [], "restore": [], "agent": []}
    with tempfile.TemporaryDirectory(prefix="timing-") as directory:
        scratch = Path(directory)
        began = time.monotonic()
        image = ensure_image(Recipe.load(recipe))
        looked = time.monotonic()
        disk = build_code_disk(image, code, scratch / "code.img")
        rows["build"].append({"image (in the cache)": looked - began, "code disk": time.monotonic() - looked})
        cache = Cache(scratch / "cache")
        for number in range(rounds):
            where = scratch / f"boot-{number}"
            with boot(image, code=disk, nics=[Nic()], accel=accel, artefacts=where, snapshot=False) as guest:
                rows["boot"].append(measure_boot(guest))
                rows["agent"].append(measure_agent(guest))
        for number in range(rounds + 1):
            where = scratch / f"restore-{number}"
            with boot(image, code=disk, nics=[Nic()], accel=accel, artefacts=where, cache=cache) as guest:
                if number:
                    rows["restore"].append({"the host's first words": guest.begin_seconds, "all": guest.boot_seconds})
    return {
        name: {stage: statistics.median(row[stage] for row in found) for stage in found[0]}
        for name, found in rows.items()
    }


def measure_agent(guest: Guest) -> dict[str, float]:
    pings = [guest.agent.ping() for _ in range(50)]
    runs = []
    for _ in range(5):
        began = time.perf_counter()
        guest.run(["true"])
        runs.append(time.perf_counter() - began)
    return {"ping": statistics.median(pings), "run true": statistics.median(runs)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make timing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="the image's recipe (%(default)s)")
    parser.add_argument("--code", type=Path, default=Path("images/code.toml"), help="what is at /code (%(default)s)")
    parser.add_argument("--accel", default="auto", help="kvm, tcg or auto")
    parser.add_argument("--rounds", type=int, default=3, help="how many times (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, in seconds")
    options = parser.parse_args(arguments)
    try:
        found = measure(options.recipe, options.code, options.accel, max(1, options.rounds))
    except (HarnessError, ValueError) as error:
        print(f"timing: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, row in found.items():
        print(name)
        for stage, seconds in row.items():
            shown = f"{seconds:8.2f} s" if seconds >= 0.1 else f"{1000 * seconds:8.2f} ms"
            print(f"  {stage:26} {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
