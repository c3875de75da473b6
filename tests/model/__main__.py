"""`make model`: Spin goes through every state of the models here, and through those of every mutant until it fails.

A mutant is a model with one line of the protocol missing or misplaced. One that does not fail means that the model
would not notice the mistake in the C code either, so it counts like a property that fails. A *control* is a mutant
that must pass: a missing fence is harmless where memory is in order, so what the mutant catches is the memory alone.

Exit codes: 0 all as it should be; 1 a property failed or a mutant was not caught; 2 Spin or the compiler is missing or
failed; 130 Ctrl-C. A counterexample is printed as Spin's trail through the model's lines.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY_MIB = 1900
SECONDS_EACH = 300
DEPTH = 1_000_000

SAFETY = "no lost wake-up, no broken assertion"
PROGRESS = "no fair execution without progress"


class ModelError(Exception):
    """Spin or the compiler could not do its part; the message says what and why."""


@dataclass(frozen=True)
class Run:
    """One pass of the model checker: `model`.pml with `defines`; `mutant` is one of its MUTANT_ names, '' for none."""

    model: str
    defines: dict[str, str | int]
    mutant: str = ""
    must_fail: bool = False
    progress: bool = False

    @property
    def name(self) -> str:
        facts = " ".join(f"{key}={value}" for key, value in self.defines.items())
        return f"{self.model} {facts} {'without: ' + self.mutant if self.mutant else ''}".strip()


@dataclass(frozen=True)
class Verdict:
    """What came out of a run. `failure`: what Spin found, '' for nothing; `trail`: how it got there."""

    failure: str
    states: int
    seconds: float
    trail: str


RING_MUTANTS = {
    "LOOK_BEFORE_PUBLISH": "SC",
    "NO_SECOND_LOOK": "SC",
    "CLEAR_AFTER_RING": "SC",
    "NEVER_CLEAR": "SC",
    "QUIETEN_AFTER_LOOK": "SC",
    "COUNT_BEFORE_ENTRY": "SC",
    "NO_PRODUCER_FENCE": "TSO",
    "NO_CONSUMER_FENCE": "TSO",
    "BELL_OVERTAKES": "TSO",
    "NO_RELEASE": "PSO",
    "NO_ACQUIRE": "WEAK",
}
"""Each with the strongest memory in which it must fail."""

VIRTQUEUE_MUTANTS = {
    ("FLAGS", "NO_PUBLISH_FENCE"): "TSO",
    ("FLAGS", "NO_ASK_FENCE"): "TSO",
    ("FLAGS", "DEVICE_WITHOUT_FENCE"): "TSO",
    ("FLAGS", "NO_SECOND_LOOK"): "SC",
    ("FLAGS", "NO_RELEASE"): "PSO",
    ("FLAGS", "NO_ACQUIRE"): "WEAK",
    ("EVENTS", "NO_PUBLISH_FENCE"): "TSO",
    ("EVENTS", "NO_ASK_FENCE"): "TSO",
    ("EVENTS", "NO_SECOND_LOOK"): "SC",
    ("EVENTS", "NEED_EVENT_WITHOUT_WRAP"): "SC",
    ("EVENTS", "NEED_EVENT_OFF_BY_ONE"): "SC",
}

PACKED_MUTANTS = {
    ("FLAGS", "HEAD_NOT_WITHHELD"): "PSO",
    ("FLAGS", "NO_RELEASE"): "PSO",
    ("FLAGS", "NO_ACQUIRE"): "WEAK",
    ("FLAGS", "NO_WRAP_COUNTER"): "SC",
    ("FLAGS", "NO_PUBLISH_FENCE"): "TSO",
    ("FLAGS", "NO_ASK_FENCE"): "TSO",
    ("FLAGS", "DEVICE_WITHOUT_FENCE"): "TSO",
    ("FLAGS", "NO_SECOND_LOOK"): "SC",
    ("EVENTS", "NO_PUBLISH_FENCE"): "TSO",
    ("EVENTS", "NO_ASK_FENCE"): "TSO",
    ("EVENTS", "NO_SECOND_LOOK"): "SC",
    ("EVENTS", "EVENT_WITHOUT_WRAP"): "SC",
}

WAYS: dict[tuple[str, str], dict[str, str | int]] = {
    ("virtqueue", "PASSES"): {"CHAINS": 3, "START": 6},
    ("virtqueue", "PAIRS"): {"CHAINS": 4, "START": 6},
    ("packed", "PASSES"): {"CHAINS": 4},
    ("packed", "PAIRS"): {"CHAINS": 4},
}
"""Devices that ask for notifications in QEMU's ways."""

LARGER: dict[str, str | int] = {"SIZE": 3, "CHAINS": 6}
"""Positions of a packed ring wrap at its size, so what holds for one size says least about others."""

WAY_MUTANTS = {
    ("virtqueue", "PAIRS"): ("BY_THE_LETTER",),
    ("packed", "PASSES"): ("BY_THE_LETTER", "USED_IS_FORGOTTEN", "WHOLE_LAP_IS_FORGOTTEN", "DEVICE_IS_LEFT_ASLEEP"),
    ("packed", "PAIRS"): ("BY_THE_LETTER",),
}

LETTER_SUFFICES = (("virtqueue", "LETTER"), ("virtqueue", "PASSES"), ("packed", "LETTER"))
"""For what BY_THE_LETTER leaves out there is no need: controls."""

DRIVER_CASES: dict[str, dict[str, str | int]] = {
    "ECHO": {"CLIENT": "ECHO", "FRAMES": 1, "TX_BUFFERS": 1, "CONTROLS": 0},
    "HOLDER": {"CLIENT": "HOLDER", "PIECES": 2, "RX_QUEUE": 4, "RX_BUFFERS": 4, "RX_LIMIT": 2, "CONTROLS": 0},
    "STARVED": {"CLIENT": "HOLDER", "PIECES": 2, "RX_QUEUE": 2, "RX_BUFFERS": 3, "RX_LIMIT": 2, "CONTROLS": 1},
    "SENDER": {"CLIENT": "SENDER", "FRAMES": 0, "SENDS": 2, "CONTROLS": 0},
    "ROOMY": {"CLIENT": "SENDER", "FRAMES": 0, "SENDS": 2, "TX_BUFFERS": 1, "TX_ROOM": 2, "CONTROLS": 1},
    "BOTH": {"CLIENT": "BOTH", "FRAMES": 1, "SENDS": 1, "TX_BUFFERS": 1, "CONTROLS": 0},
    "FORWARDER": {"CLIENT": "FORWARDER", "FRAMES": 2, "RX_QUEUE": 1, "RX_BUFFERS": 1, "TX_BUFFERS": 1, "CONTROLS": 0},
    "LIMITED": {"CLIENT": "FORWARDER", "RX_QUEUE": 1, "RX_BUFFERS": 2, "RX_LIMIT": 1, "TX_BUFFERS": 1, "CONTROLS": 0},
    "COPIED": {"CLIENT": "FORWARDER", "COPIES": 1, "RX_QUEUE": 1, "RX_BUFFERS": 1, "TX_BUFFERS": 1, "CONTROLS": 0},
}

DRIVER_MUTANTS = (
    ("NEVER_ASKS_FOR_BUFFERS", "STARVED"),
    ("STARVES_BY_HALF_ONLY", "STARVED"),
    ("NO_RX_INTERRUPT", "ECHO"),
    ("NO_TX_INTERRUPT", "SENDER"),
    ("TX_INTERRUPT_WHEN_FULL_ONLY", "ROOMY"),
    ("NO_LOOK_AT_QUEUES", "SENDER"),
    ("NO_LOOK_AT_TX_ACTIVE", "SENDER"),
    ("NO_LOOK_AT_RX_FREE", "STARVED"),
    ("COMPLETIONS_TELL_NOBODY", "ROOMY"),
    ("PRIME_TELLS_NOBODY", "SENDER"),
    ("SLEEPS_BEFORE_IT_HAS_TOLD", "ROOMY"),
    ("CLIENT_NEVER_FLUSHES", "ECHO"),
    ("NO_TX_INTERRUPT", "FORWARDER"),
    ("NO_LOOK_AT_TX_ACTIVE", "FORWARDER"),
    ("CLIENT_NEVER_FLUSHES", "FORWARDER"),
    ("NO_LOOK_AT_TX_ACTIVE", "COPIED"),
    ("FORWARDED_IS_NOT_HELD", "LIMITED"),
)

OWNERSHIP_MUTANTS = (
    "LEASE_STAYS",
    "SESSION_UNCHECKED",
    "LEASE_UNCHECKED",
    "OWNER_UNCHECKED",
    "SESSION_STAYS",
    "NO_SHADOW",
)

FORWARDS: dict[str, str | int] = {"FORWARDS": 1, "LEASES": 3, "SESSIONS": 2}
FORWARDS_MUTANTS = ("FORWARDED_STAYS", "FORWARDED_IS_FREE", "OWNER_UNCHECKED", "NO_SHADOW")

ORDERED: dict[str, str | int] = {"ORDERED": 1, "BUFFERS": 3, "LEASES": 2, "SESSIONS": 2}
ORDERED_MUTANTS = ("ONE_TOO_MANY", "NAMED_ALONE", "OLDEST_STAYS", "BATCH_STAYS", "NO_SHADOW")

MEMORIES = ("SC", "TSO", "PSO", "WEAK")


def all_runs() -> Iterator[Run]:
    for end in ("DRIVER", "CLIENT", "LOOP"):
        for memory in MEMORIES:
            yield Run("port_ring", {"MEMORY": memory, "END": end})
    yield Run("port_ring", {"MEMORY": "TSO", "END": "CLIENT", "ENDLESS": 1}, progress=True)
    for mutant, memory in RING_MUTANTS.items():
        yield Run("port_ring", {"MEMORY": memory, "END": "CLIENT"}, mutant, must_fail=True)
        if memory != "SC":
            stronger = MEMORIES[MEMORIES.index(memory) - 1]
            yield Run("port_ring", {"MEMORY": stronger, "END": "CLIENT"}, mutant)

    for form in ("FLAGS", "EVENTS"):
        for memory in MEMORIES:
            yield Run("virtqueue", {"MEMORY": memory, "FORM": form, "START": 6})
    for (form, mutant), memory in VIRTQUEUE_MUTANTS.items():
        yield Run("virtqueue", {"MEMORY": memory, "FORM": form, "START": 6}, mutant, must_fail=True)

    for form in ("FLAGS", "EVENTS"):
        for memory in MEMORIES:
            yield Run("packed", {"MEMORY": memory, "FORM": form})
    for (form, mutant), memory in PACKED_MUTANTS.items():
        yield Run("packed", {"MEMORY": memory, "FORM": form}, mutant, must_fail=True)

    yield from _runs_of_devices_with_ways()

    for case in DRIVER_CASES.values():
        yield Run("driver_sleep", {"MEMORY": "SC", **case})
    for mutant, case_name in DRIVER_MUTANTS:
        yield Run("driver_sleep", {"MEMORY": "SC", **DRIVER_CASES[case_name]}, mutant, must_fail=True)

    yield Run("ownership", {})
    for mutant in OWNERSHIP_MUTANTS:
        yield Run("ownership", {}, mutant, must_fail=True)
    yield Run("ownership", FORWARDS)
    for mutant in FORWARDS_MUTANTS:
        yield Run("ownership", FORWARDS, mutant, must_fail=True)
    yield Run("ownership", ORDERED)
    for mutant in ORDERED_MUTANTS:
        yield Run("ownership", ORDERED, mutant, must_fail=True)


def _runs_of_devices_with_ways() -> Iterator[Run]:
    for (model, way), bounds in WAYS.items():
        for form in ("FLAGS", "EVENTS"):
            for memory in MEMORIES:
                yield Run(model, {"MEMORY": memory, "FORM": form, "WAY": way, **bounds})
        if model == "packed":
            for memory in ("SC", "TSO"):
                yield Run(model, {"MEMORY": memory, "FORM": "EVENTS", "WAY": way, **LARGER})
    for (model, way), mutants in WAY_MUTANTS.items():
        for mutant in mutants:
            bounds = WAYS[model, way]
            yield Run(model, {"MEMORY": "SC", "FORM": "EVENTS", "WAY": way, **bounds}, mutant, must_fail=True)
    for model, way in LETTER_SUFFICES:
        bounds = WAYS.get((model, way), WAYS[model, "PASSES"])
        yield Run(model, {"MEMORY": "WEAK", "FORM": "EVENTS", "WAY": way, **bounds}, "BY_THE_LETTER")


def _call(argv: list[str], cwd: Path) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=SECONDS_EACH, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{' '.join(argv)}: not done after {SECONDS_EACH} s; is the machine very busy?") from None
    output = done.stdout + done.stderr
    if done.returncode != 0 or re.search(r"spin: .*Error", output):
        raise ModelError(f"{' '.join(argv)} failed:\n{output}")
    return output


def check(run: Run) -> Verdict:
    """Generates the checker for one run, compiles it and lets it go through all states. Raises ModelError."""
    began = time.monotonic()
    defines = [f"-D{key}={value}" for key, value in run.defines.items()]
    if run.mutant:
        defines.append(f"-DMUTANT_{run.mutant}")
    with tempfile.TemporaryDirectory(prefix="netbridge-model-") as directory:
        work = Path(directory)
        for source in HERE.glob("*.pml"):
            shutil.copy(source, work)
        source_name = f"{run.model}.pml"
        _call(["spin", "-a", *defines, source_name], work)
        # All others are gone through within moments: compiling them well costs more than it saves.
        optimise = "-O1" if run.model == "driver_sleep" and not run.must_fail else "-O0"
        kind = ["-DNP", "-DNFAIR=3"] if run.progress else ["-DSAFETY"]
        _call(["cc", optimise, "-w", f"-DMEMLIM={MEMORY_MIB}", *kind, "-o", "pan", "pan.c"], work)
        output = _call(["./pan", f"-m{DEPTH}", "-n", *(["-l", "-f"] if run.progress else [])], work)
        states = re.search(r"(\d+) states, stored", output)
        errors = re.search(r"errors: (\d+)", output)
        if not states or not errors or "max search depth too small" in output or "out of memory" in output:
            raise ModelError(f"{run.name}: the search was not finished:\n{output}")
        failure = trail = ""
        if errors[1] != "0":
            found = re.search(r"pan:\d+: (.*?)(?: \(at depth \d+\))?$", output, re.MULTILINE)
            failure = found[1] if found else "an error"
            if not run.must_fail:
                trail = _call(["spin", "-t", "-p", "-g", *defines, source_name], work)
    return Verdict(failure, int(states[1]), round(time.monotonic() - began, 2), trail)


def report(run: Run, verdict: Verdict) -> str:
    good = bool(verdict.failure) == run.must_fail
    if run.must_fail:
        outcome = f"caught: {verdict.failure}" if good else "NOT CAUGHT"
    else:
        outcome = "holds" if good else f"FAILS: {verdict.failure}"
    wanted = PROGRESS if run.progress else SAFETY
    if run.mutant:
        wanted = "must fail" if run.must_fail else "control: must pass"
    return f"{run.name:<104} {wanted:<37} {verdict.states:>9} {verdict.seconds:>6.1f} s  {outcome}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description="Model-checks the protocols.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs whose name contains this")
    arguments = parser.parse_args()
    for tool, package in (("spin", "spin"), ("cc", "gcc")):
        if not shutil.which(tool):
            print(f"model: {tool} is missing; run: apt-get install {package}", file=sys.stderr)
            return 2
    runs = [run for run in all_runs() if arguments.only in run.name]
    if not runs:
        print(f"model: no run's name contains {arguments.only!r}", file=sys.stderr)
        return 2
    bad = states = 0
    began = time.monotonic()
    try:
        for run in runs:
            verdict = check(run)
            good = bool(verdict.failure) == run.must_fail
            bad += not good
            states += verdict.states
            if arguments.json:
                print(json.dumps({**asdict(run), **asdict(verdict), "good": good}), flush=True)
            else:
                print(report(run, verdict), flush=True)
                if verdict.trail:
                    print(verdict.trail)
    except ModelError as error:
        print(f"model: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if not arguments.json:
        mutants = sum(run.must_fail for run in runs)
        seconds = time.monotonic() - began
        print(f"{len(runs)} runs, {mutants} of mutants, {states} states, {seconds:.0f} s: {bad or 'none'} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
