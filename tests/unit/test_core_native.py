"""The C core's own tests, written in C: each case a process of its own, under the sanitizers.

- AddressSanitizer and UndefinedBehaviorSanitizer: all cases on a plain split ring, and those that are about rings on
  others as well, chosen so that every pair of the rings' features meets in one of them.
- ThreadSanitizer: some of the traffic between threads. Skipped where the sanitizer itself cannot run.

A case by hand: the program's path is in a failure's message; `core-tests --list` names the cases, `CORE_RING="packed
event_idx"` says what is agreed about the rings, `CORE_TIMES=20` makes the traffic cases twenty times as long.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.unit.core import toolchain
from tests.unit.core.toolchain import ADDRESS, THREAD, Variant

pytestmark = pytest.mark.thorough

TIMEOUT_S = 60
SPLIT = ""
# What is about the ring; the other cases would show the same again, or only take long.
RING_CASES = (
    *toolchain.case_names("copies", "device_lies", "flow", "forwarding", "forwarding_lies", "notifications"),
    *toolchain.case_names("one_processor", "threads_lies"),
    "idle-idle_after_interrupts",
    "idle-idle_while_the_tx_queue_is_full",
    "threads_echo-echo_with_completions_out_of_order",
    "threads_echo-echo_with_queues_shorter_than_the_burst",
    "threads_echo-echo_that_forwards_with_queues_shorter_than_the_burst",
    "threads_echo-no_wake_up_is_lost_with_delays_while_copies_are_forwarded",
    "threads_echo-no_wake_up_is_lost_with_delays_while_forwarding",
    "threads_echo-no_wake_up_is_lost_with_delays_and_few_buffers",
    "threads_echo-ping_pong_never_loses_a_wake_up",
    "threads_wake-device_falls_asleep_while_the_pump_sends",
    "threads_wake-pump_falls_asleep_while_the_device_completes",
)
TOO_LONG = ("of_every_length", "leases_wrap", "largest_size", "of_all_sizes")
SPLIT_CASES = (*RING_CASES, *toolchain.case_names("split_lies"))
PACKED_CASES = (*RING_CASES, *toolchain.case_names("packed_lies"))
RINGS = {
    "split event_idx indirect notification_data": SPLIT_CASES,
    "split event_idx in_order": SPLIT_CASES,
    "packed": PACKED_CASES,
    "packed event_idx notification_data": PACKED_CASES,
    "packed event_idx indirect in_order": PACKED_CASES,
}
ALL_CASES = toolchain.case_names()
ADDRESS_FILES = tuple(dict.fromkeys(case.split("-")[0] for case in ALL_CASES))
ADDRESS_CASES = [(SPLIT, case) for case in ALL_CASES] + [
    (ring, case) for ring, cases in RINGS.items() for case in cases if not any(word in case for word in TOO_LONG)
]
THREAD_FILES = ("threads_echo", "threads_lies")
# Those that differ in who touches what, and when; the rest of the files would show ThreadSanitizer the same again.
THREAD_CASES = [
    (SPLIT, case)
    for case in (
        "threads_echo-echo_of_every_length_in_bursts",
        "threads_echo-echo_with_short_frames_copied",
        "threads_echo-echo_that_forwards",
        "threads_echo-echo_of_every_length_with_intx",
        "threads_echo-echo_with_completions_out_of_order",
        "threads_echo-echo_across_the_wrap_of_the_port_ring_counts",
        "threads_echo-echo_with_queues_shorter_than_the_burst",
        "threads_echo-echo_with_a_client_slower_than_the_wire",
        "threads_echo-no_wake_up_is_lost_with_delays_and_few_buffers",
        "threads_lies-used_id_twice_under_load",
    )
] + [
    ("packed", "threads_echo-echo_with_completions_out_of_order"),
    ("packed event_idx indirect", "threads_echo-echo_of_every_length_in_bursts"),
    ("packed event_idx in_order", "threads_echo-no_wake_up_is_lost_with_delays_and_few_buffers"),
    ("split event_idx in_order", "threads_echo-echo_with_queues_shorter_than_the_burst"),
]


def _built(variant: Variant, files: tuple[str, ...]) -> Path:
    try:
        return toolchain.build_tests(variant, *files)
    except toolchain.CompilationFailed as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def address_program() -> Path:
    return _built(ADDRESS, ADDRESS_FILES)


@pytest.fixture(scope="session")
def thread_program() -> Path:
    program = _built(THREAD, THREAD_FILES)
    probe = toolchain.run(THREAD, [program, "--list"], TIMEOUT_S)
    if "FATAL: ThreadSanitizer" in probe.stdout:
        pytest.skip(f"ThreadSanitizer does not run on this machine: {probe.stdout.strip().splitlines()[0]}")
    return program


def _run(variant: Variant, program: Path, ring: str, case: str) -> None:
    name = case.split("-")[1]
    by_hand = f'CORE_RING="{ring}" {program} {name}'
    try:
        done = toolchain.run(variant, [program, name], TIMEOUT_S, CORE_RING=ring)
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        pytest.fail(f"{by_hand}\nstill running after {TIMEOUT_S} s\n{output}", pytrace=False)
    if done.returncode:
        pytest.fail(f"{by_hand}\nended with {done.returncode}\n{done.stdout}", pytrace=False)


def _name(case: tuple[str, str]) -> str:
    return "-".join((case[1], *case[0].split()))


@pytest.mark.parametrize("case", ADDRESS_CASES, ids=_name)
def test_address_sanitizer(case: tuple[str, str], address_program: Path) -> None:
    _run(ADDRESS, address_program, *case)


@pytest.mark.parametrize("case", THREAD_CASES, ids=_name)
def test_thread_sanitizer(case: tuple[str, str], thread_program: Path) -> None:
    _run(THREAD, thread_program, *case)


def test_every_input_that_the_fuzzer_kept() -> None:
    """What a device can write (device_fuzz.c), as far as it once reached new code; see `make fuzz`."""
    inputs = sorted((toolchain.TESTS / "corpus").iterdir())
    assert inputs
    program = toolchain.build(ADDRESS, "device-fuzz-replay", ("device_fuzz", "fuzz_replay"))
    done = toolchain.run(ADDRESS, [program, *inputs], TIMEOUT_S)
    assert done.returncode == 0, f"{program}\n{done.stdout[-4000:]}"
    assert done.stdout.endswith(f"{len(inputs)} inputs\n")


def test_every_case_is_found(address_program: Path) -> None:
    """The names that are read from the sources are those the program knows."""
    listed = toolchain.run(ADDRESS, [address_program, "--list"], TIMEOUT_S).stdout.split()
    assert sorted(listed) == sorted(case.split("-")[1] for case in ALL_CASES)


def test_a_failing_check_fails_the_case(tmp_path: Path) -> None:
    """The harness itself: a check that does not hold, and a byte too far, end the process with an error."""
    source = tmp_path / "failing.c"
    source.write_text(
        '#include "check.h"\n#include <stdlib.h>\n'
        "TEST(check_fails) { CHECK_EQ(1 + 1, 3); }\n"
        "TEST(byte_too_far) { char *volatile at = calloc(8, 1); CHECK(at[8] == 0); }\n"
        "TEST(leaks) { CHECK(malloc(8) != NULL); }\n"
        "TEST(passes) { CHECK(true); }\n"
    )
    program = tmp_path / "failing"
    toolchain.compile_program(
        dict.fromkeys((source, *(toolchain.TESTS / name for name in ("check.c", "check_main.c"))), ADDRESS.flags),
        program,
    )
    outcomes = {
        case: toolchain.run(ADDRESS, [program, case], TIMEOUT_S)
        for case in ("check_fails", "byte_too_far", "leaks", "passes", "unknown")
    }
    assert {case: done.returncode == 0 for case, done in outcomes.items()} == {
        "check_fails": False,
        "byte_too_far": False,
        "leaks": False,
        "passes": True,
        "unknown": False,
    }
    assert "failing.c:3: 1 + 1 is 2, expected 3 = 3" in outcomes["check_fails"].stdout
    assert "heap-buffer-overflow" in outcomes["byte_too_far"].stdout
