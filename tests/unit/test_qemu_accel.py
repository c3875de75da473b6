"""The choice of the accelerator, and the memory of it."""

from pathlib import Path

import pytest

from qemu import accel
from qemu.accel import Accelerator, choose_accelerator, remember
from qemu.errors import AcceleratorUnavailable


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"kernel one")
    return path


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A /dev/kvm that opens."""
    path = tmp_path / "kvm"
    path.touch()
    return path


def choose(kernel: Path, device: Path, wanted: str | None = None, **environ: str) -> Accelerator:
    return choose_accelerator(wanted, kernel=kernel, cache=kernel.parent / "cache", device=device, environ=environ)


def test_without_kvm_it_is_tcg_with_the_reason(kernel: Path, tmp_path: Path) -> None:
    choice = choose(kernel, tmp_path / "none")
    assert choice.name == "tcg"
    assert "cannot be opened (No such file or directory)" in choice.reason
    assert str(choice).startswith("tcg (kvm: ")


def test_a_kvm_that_may_not_be_opened(kernel: Path, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", deny)
    assert "add it to the group kvm" in choose(kernel, device).reason


def test_a_kvm_that_opens_is_not_believed_yet(kernel: Path, device: Path) -> None:
    choice = choose(kernel, device)
    assert (choice.name, choice.proven) == ("kvm", False)


@pytest.mark.parametrize("name", ["kvm", "tcg"])
def test_a_verdict_is_remembered(kernel: Path, device: Path, name: str) -> None:
    remember(Accelerator(name, "seen"), kernel=kernel, cache=kernel.parent / "cache")  # type: ignore[arg-type]
    assert choose(kernel, device) == Accelerator(name, "seen")  # type: ignore[arg-type]


def test_a_verdict_is_for_one_kernel_and_one_boot_of_the_host(
    kernel: Path, device: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remember(Accelerator("tcg", "seen"), kernel=kernel, cache=kernel.parent / "cache")
    other = tmp_path / "other"
    other.write_bytes(b"kernel two")
    assert not choose_accelerator(kernel=other, cache=kernel.parent / "cache", device=device, environ={}).proven
    boot = tmp_path / "boot_id"
    boot.write_text("another boot")
    monkeypatch.setattr(accel, "BOOT_ID", boot)
    assert not choose(kernel, device).proven


ABORTED = (
    "kvm: /dev/kvm opens, but guest never came up: qemu-system-x86_64 was ended by SIGABRT and said "
    '"qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69; '
    "qemu-system-x86_64: ../../target/i386/kvm/kvm.c:3183: kvm_buf_set_msrs: Assertion `ret' failed.\""
)


def test_a_run_says_the_reason_in_brief_and_the_verdict_keeps_all_of_it(kernel: Path, device: Path) -> None:
    cache = kernel.parent / "cache"
    remember(Accelerator("tcg", ABORTED), kernel=kernel, cache=cache)
    assert choose(kernel, device).reason == ABORTED
    brief = "kvm: /dev/kvm opens, but qemu-system-x86_64 was ended by SIGABRT: failed to set MSR 0x10a to 0x69"
    assert str(choose(kernel, device)) == f"tcg ({brief})"
    assert accel.expectation(cache=cache, device=device, environ={}) == f"tcg ({brief})"
    assert accel.in_brief("guest never came up: it has used 10 s of processor time") == (
        "it has used 10 s of processor time"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "magic", "reason": ""}', '{"reason": "x"}'])
def test_a_damaged_verdict_counts_as_none(kernel: Path, device: Path, content: str) -> None:
    remember(Accelerator("tcg", "seen"), kernel=kernel, cache=kernel.parent / "cache")
    (file,) = (kernel.parent / "cache" / "accel").iterdir()
    file.write_text(content)
    assert not choose(kernel, device).proven


def test_a_verdict_that_cannot_be_kept_does_no_harm(kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remember(Accelerator("tcg", "seen"), kernel=kernel, cache=tmp_path / "file")


def test_demands_win_argument_before_environment(kernel: Path, device: Path, tmp_path: Path) -> None:
    assert choose(kernel, device, "tcg") == Accelerator("tcg", "demanded")
    assert choose(kernel, device, "kvm") == Accelerator("kvm", "demanded")
    assert choose(kernel, device, QEMU_GUEST_ACCEL="tcg") == Accelerator("tcg", "demanded by QEMU_GUEST_ACCEL")
    assert choose(kernel, device, "auto", QEMU_GUEST_ACCEL="tcg").name == "tcg"
    assert choose(kernel, device, "kvm", QEMU_GUEST_ACCEL="tcg").name == "kvm"
    with pytest.raises(AcceleratorUnavailable, match=r"KVM was demanded, but .*none cannot be opened"):
        choose(kernel, tmp_path / "none", "kvm")
    with pytest.raises(ValueError, match="one of auto, kvm, tcg, not 'xen'"):
        choose(kernel, device, QEMU_GUEST_ACCEL="xen")
