"""The recipe for CI: each step is a make target that a person could type, and what is left of a run is kept.

That the files are workflows at all is checked by `make lint`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github" / "actions").glob("*/action.yml"))
MAKE = re.compile(r'\bmake\s+("?\$TARGET"?|[\w.-]+)')
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)


def jobs() -> list[Any]:
    return [
        pytest.param(job, id=f"{path.stem}-{name}")
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text())["jobs"].items()
    ]


def steps(file: Path) -> list[dict[str, Any]]:
    document = yaml.safe_load(file.read_text())
    if "runs" in document:
        return list(document["runs"]["steps"])
    return [step for job in document["jobs"].values() for step in job["steps"]]


def matrix(job: dict[str, Any], name: str) -> list[str]:
    """The values that a job's matrix has for it."""
    found = job.get("strategy", {}).get("matrix", {})
    return list(found.get(name, [])) + [entry[name] for entry in found.get("include", []) if name in entry]


def made(job: dict[str, Any]) -> set[str]:
    """The targets that a job makes."""
    found = set()
    for step in job["steps"]:
        for target in MAKE.findall(step.get("run", "")):
            found |= set(matrix(job, "target")) if "$" in target else {target}
    return found


def test_there_is_something_to_look_at() -> None:
    assert {path.stem for path in WORKFLOWS} >= {"ci", "nightly"}
    assert ACTIONS


@pytest.mark.parametrize("job", jobs())
def test_what_a_job_makes_is_a_target(job: dict[str, Any]) -> None:
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    assert made(job), "a job that makes nothing"
    assert made(job) <= targets


@pytest.mark.parametrize("file", ACTIONS, ids=lambda path: path.parent.name)
def test_what_an_action_makes_is_a_target(file: Path) -> None:
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    assert {target for step in steps(file) for target in MAKE.findall(step.get("run", ""))} <= targets


@pytest.mark.parametrize("job", jobs())
def test_what_is_left_of_a_run_is_kept(job: dict[str, Any]) -> None:
    (upload,) = [step for step in job["steps"] if str(step.get("uses")).startswith("actions/upload-artifact@")]
    assert upload["if"] == "always()"
    assert str(upload["with"]["path"]).startswith("build/")
    assert job["timeout-minutes"] <= 180


@pytest.mark.parametrize("file", [*WORKFLOWS, *ACTIONS], ids=lambda path: path.stem)
def test_what_is_called_in_the_repository_is_there(file: Path) -> None:
    for step in steps(file):
        uses = str(step.get("uses", ""))
        if uses.startswith("./"):
            assert (ROOT / uses / "action.yml").exists()
        for program in re.findall(r"\bqemu/[\w-]+\b", step.get("run", "")):
            assert (ROOT / program).exists()


def test_every_change_runs_under_kvm_and_under_tcg_and_the_night_has_the_long_ones() -> None:
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert ci["guests"]["env"]["ARGS"] == "${{ matrix.options }}"
    assert set(matrix(ci["guests"], "options")) == {"--require-kvm", ""}
    assert set(matrix(ci["guests"], "accel")) == {"auto", "tcg"}
    # What `make test` is made of, a change passes.
    tested = re.search(r"^test: ([a-z -]+?) ##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tested is not None
    assert made(ci["unit"]) | made(ci["guests"]) >= set(tested[1].split())
    nightly = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())["jobs"]
    long = {target for job in nightly.values() for target in made(job)}
    assert {"faults", "soak", "fuzz", "model", "sandbox-test", "vfio-test", "box-test"} <= long
