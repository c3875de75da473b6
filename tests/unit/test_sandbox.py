"""What the sandbox asks Landlock for, by version of its interface. What the kernel makes of it is tested in a guest."""

from __future__ import annotations

import pytest

from netbridge.vnode import sandbox
from netbridge.vnode.sandbox import Rights, path_rights, rights_of

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, MAKE_CHAR, REFER, TRUNCATE, IOCTL_DEV = (
    1,
    2,
    4,
    8,
    0x40,
    0x2000,
    0x4000,
    0x8000,
)
NEWEST = 7


@pytest.mark.parametrize(
    ("abi", "rights"),
    [
        (0, Rights(0, 0, 0)),
        (1, Rights(0x1FFF, 0, 0)),
        (2, Rights(0x3FFF, 0, 0)),
        (3, Rights(0x7FFF, 0, 0)),
        (4, Rights(0x7FFF, 3, 0)),
        (5, Rights(0xFFFF, 3, 0)),
        (6, Rights(0xFFFF, 3, 3)),
        (NEWEST, Rights(0xFFFF, 3, 3)),
        (99, Rights(0xFFFF, 3, 3)),
    ],
)
def test_each_version_is_asked_for_all_it_can(abi: int, rights: Rights) -> None:
    assert rights_of(abi) == rights


def test_a_read_only_path_can_be_read_and_nothing_else() -> None:
    handled = rights_of(NEWEST).files
    assert path_rights(handled, writable=False, directory=True) == READ_FILE | READ_DIR
    assert path_rights(handled, writable=False, directory=False) == READ_FILE


def test_a_writable_path_allows_no_programs_and_no_devices() -> None:
    rights = path_rights(rights_of(NEWEST).files, writable=True, directory=True)
    assert rights & (READ_FILE | WRITE_FILE | READ_DIR | REFER | TRUNCATE) == (
        READ_FILE | WRITE_FILE | READ_DIR | REFER | TRUNCATE
    )
    assert not rights & (EXECUTE | MAKE_CHAR | IOCTL_DEV)
    file = path_rights(rights_of(NEWEST).files, writable=True, directory=False)
    assert file == READ_FILE | WRITE_FILE | TRUNCATE, "the kernel refuses rules with rights of directories for a file"


def test_rules_never_give_what_the_version_does_not_handle() -> None:
    for abi in range(1, NEWEST + 1):
        handled = rights_of(abi).files
        for writable in (False, True):
            for directory in (False, True):
                assert not path_rights(handled, writable=writable, directory=directory) & ~handled


@pytest.mark.parametrize(("result", "version"), [(-1, 0), (1, 1), (7, 7)])
def test_the_version_is_probed(monkeypatch: pytest.MonkeyPatch, result: int, version: int) -> None:
    class Libc:
        @staticmethod
        def syscall(*arguments: object) -> int:
            assert arguments[0] == 444
            return result

    monkeypatch.setattr(sandbox, "_libc", Libc)
    assert sandbox.landlock_abi() == version
