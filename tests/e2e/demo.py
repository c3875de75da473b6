"""`make demo`: real frames from scapy, through QEMU, VFIO, the driver and the port, to a service and back.

Boots a guest, starts driver and echo service in it, sends every kind and size of frame, compares every reply byte for
byte, and closes the account: what was sent, what the driver counted, what the service saw and what came back must be
the same number. Leaves `report.json`, `wire.pcap`, `console.log` and the QEMU command line in its directory.
Exit codes: 0 all is well; 1 frames or the account are not; 2 the machinery failed (image, QEMU, guest); 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qemu.accel import in_brief
from qemu.codedisk import build_code_disk
from qemu.completed import CommandError
from qemu.errors import HarnessError
from qemu.exactness import Exchange, WireMismatch
from qemu.guest import Nic, boot
from qemu.images import Recipe, ensure_image
from qemu.wire import Wire
from tests.e2e import testbed
from tests.e2e.traffic import Generator, Phase, full_mix, reflected

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "images" / "trixie.toml"
CODE = ROOT / "images" / "code.toml"
OUT = ROOT / "build" / "demo"
NIC_MAC = "52:54:00:12:34:56"
REPLY_SECONDS = 10.0


class Account:
    """Everything that was sent and came back, over all phases."""

    def __init__(self) -> None:
        self.sent = self.received = self.lost = self.extra = self.twice = self.reordered = 0
        self.rtt_ns: list[int] = []  # of frames sent one at a time: in a burst it would tell the length of the queue
        self.first_difference = ""

    def add(self, exchange: Exchange, window: int) -> None:
        self.sent += exchange.sent
        self.received += exchange.received
        self.lost += len(exchange.lost)
        self.extra += len(exchange.extra)
        self.twice += len(exchange.twice)
        self.reordered += exchange.reordered
        if window == 1:
            self.rtt_ns += exchange.rtt_ns
        try:
            exchange.check()
        except WireMismatch as difference:
            self.first_difference = self.first_difference or str(difference)

    def rtt_us(self) -> dict[str, float]:
        hundredths = statistics.quantiles(self.rtt_ns, n=100) if len(self.rtt_ns) > 1 else [0.0] * 99
        return {"p50": round(hundredths[49] / 1000, 1), "p99": round(hundredths[98] / 1000, 1)}


class Progress:
    """Live progress: one line that changes on a terminal, one line for each phase elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._began = time.monotonic()
        self._shown = 0.0

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)

    def update(self, text: str) -> None:
        """A line that the next one replaces; at most ten times a second, and only on a terminal."""
        now = time.monotonic()
        if self._live and now - self._shown >= 0.1:
            self._shown = now
            self._clear()
            print(f"           {text}", end="", flush=True)

    def _clear(self) -> None:
        if self._live:
            print("\r\033[K", end="")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="how QEMU runs the guest")
    parser.add_argument("--out", type=Path, default=OUT, help="where the artefacts go (default: build/demo)")
    parser.add_argument("--json", action="store_true", help="print report.json at the end instead of the summary")
    options = parser.parse_args(arguments)
    try:
        report, difference = run(options.accel, options.out, Progress())
    except HarnessError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except (CommandError, AssertionError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the guest is gone", file=sys.stderr)
        return 130
    print(json.dumps(report, indent=2) if options.json else summary(report, options.out))
    if not report["exact"]:
        print(f"\ndemo: the account does not close\n{difference}", file=sys.stderr)
        return 1
    return 0


def run(accel: str, out: Path, progress: Progress) -> tuple[dict[str, Any], str]:
    """Does it all; returns the report and, if frames differed, the first difference as scapy shows it."""
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as pool:
        # Making seven thousand frames with scapy takes seconds: those in which the guest boots.
        frames = pool.submit(full_mix, NIC_MAC)
        image = ensure_image(Recipe.load(RECIPE), progress=progress.say)
        code = build_code_disk(image, spec=CODE, out=out / "code.img")
        progress.say("booting the guest")
        nic = Nic(id="nic0", mac=NIC_MAC)
        with boot(image, code=code, nics=[nic], accel=accel, artefacts=out, say=progress.say) as guest:
            progress.say(f"guest is up after {guest.boot_seconds:.1f} s under {guest.accel.name}")
            with testbed.running(guest) as bed:
                progress.say(f"driver has {bed.pci} through VFIO; echo service (uid aethernet) has the port")
                account = send_all(guest.wire, frames.result(), progress)
                bed.stop()
                driver, echo = bed.final["driver"], bed.final["echo"]
            given_back = testbed.nics(guest)[0][1]
            faults = guest.iommu_faults()
            received = guest.wire.received
            report = {
                "accel": guest.accel.name,
                "accel_reason": in_brief(guest.accel.reason),
                "boot_s": round(guest.boot_seconds, 2),
                "frames_sent": account.sent,
                "frames_received": account.received,
                "frames_echoed": echo["frames"],
                "frames_lost": account.lost,
                "frames_extra": account.extra + account.twice,
                "frames_reordered": account.reordered,
                "rtt_us": account.rtt_us(),
                "iommu_faults": len(faults),
                "driver_after": given_back,
                "driver": driver,
            }
    numbers = {account.sent, account.received, received, driver["packets_rx"], driver["packets_tx"], echo["frames"]}
    differs = account.lost or account.extra or account.twice or account.reordered
    report["exact"] = len(numbers) == 1 and not differs and not faults
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report, account.first_difference or f"counts: {sorted(numbers)}; IOMMU faults: {faults}"


def send_all(wire: Wire, phases: Sequence[Phase], progress: Progress) -> Account:
    """Sends every phase and closes the account with a sentinel: whatever comes after the last reply is found."""
    account = Account()
    total = sum(len(phase.frames) for phase in phases)
    for phase in phases:
        began = time.monotonic()
        for burst in phase.bursts():
            label = f"of {total} frames  {phase.name}"
            account.add(
                wire.exchange(
                    burst,
                    reply=reflected,
                    window=phase.window,
                    timeout=REPLY_SECONDS,
                    progress=functools.partial(_show, progress, account.sent, label),
                ),
                phase.window,
            )
        rate = len(phase.frames) / (time.monotonic() - began)
        progress.say(f"{len(phase.frames):5} × {phase.name}: {rate:,.0f} frames/s")
    # Frames arrive in order: anything extra has come before the answer to this one.
    account.add(wire.exchange(Generator(NIC_MAC).raw(1), reply=reflected, window=1, timeout=REPLY_SECONDS), 1)
    account.extra += len(wire.drain())
    return account


def _show(progress: Progress, done: int, label: str, now: Exchange) -> None:
    progress.update(f"{done + now.received:5} {label}")


def summary(report: dict[str, Any], out: Path) -> str:
    latency = report["driver"]["irq_latency_ns"]
    microseconds = {
        stage: f"{numbers['p50'] / 1000:.0f} / {numbers['p99'] / 1000:.0f}" for stage, numbers in latency.items()
    }
    rows = (
        ("accelerator", f"{report['accel']}  ({report['accel_reason']})"),
        ("boot", f"{report['boot_s']} s from QEMU's start to a ready guest"),
        ("frames", f"{report['frames_sent']} sent, {report['frames_echoed']} echoed, {report['frames_received']} back"),
        (
            "",
            f"{report['frames_lost']} lost, {report['frames_extra']} extra, {report['frames_reordered']} out of order",
        ),
        ("round trip", f"p50 {report['rtt_us']['p50']:.0f} µs, p99 {report['rtt_us']['p99']:.0f} µs, one at a time"),
        (
            "interrupts",
            f"delivered in {microseconds['delivery']} µs (p50 / p99), drained in {microseconds['drain']} µs",
        ),
        ("wake-ups", f"client awake {microseconds['client']} µs after its doorbell"),
        ("IOMMU faults", str(report["iommu_faults"])),
        ("NIC given back to", str(report["driver_after"])),
    )
    lines = "\n".join(f"  {name:<18} {text}" for name, text in rows)
    verdict = "every frame came back, once, unchanged" if report["exact"] else "THE ACCOUNT DOES NOT CLOSE"
    return f"\n{lines}\n\n  {verdict}\n  artefacts: {out}/report.json, wire.pcap, console.log, qemu.sh"


if __name__ == "__main__":
    sys.exit(main())
