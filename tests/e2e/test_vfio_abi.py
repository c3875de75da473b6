"""The kernel's interface as `vfio` has it written down, against the headers of the guest's kernel.

Those of the host, which the unit test asks, may be too old to have iommufd.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu.images import Image
from tests.unit.test_vfio_abi import COMPILER, Headers, compare
from vfio.abi_build import CONSTANTS, STRUCTS


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler to ask")
def test_it_is_what_the_guest_s_headers_say(guest_image: Image, tmp_path: Path) -> None:
    headers = Headers(str(guest_image.sysroot / "usr/include"), tmp_path)
    all_there_is = sum(1 + len(struct.field_names()) for struct in STRUCTS)
    all_there_is += sum(len(group.values) for group in CONSTANTS)
    assert compare(headers) == all_there_is, f"the headers of Linux {headers.version} lack some"
