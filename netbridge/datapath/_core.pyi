"""The C core as cffi makes it: untyped, and wrapped close to where it is used."""

from typing import Any

ffi: Any
lib: Any
