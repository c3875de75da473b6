"""The manifest of a V-Node as plain frozen data.

A `Manifest` can travel: the monitor, which reads the file, hands `as_dict()` to the driver process, which takes it back
with `from_dict()`. The driver process imports this module and has little memory: hence the loader with its YAML parser
is imported only when there is a file to load, and there is no `dataclasses`, `pathlib` or `typing` here.
"""

from __future__ import annotations

from netbridge.vnode.capabilities import Capabilities
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any, Literal


class Mount(NamedTuple):
    """A path that stays reachable under mode strict."""

    path: str  # absolute
    writable: bool = False


class Manifest(NamedTuple):
    """What a vnode.yml says, checked. docs/manifest.md tells what each of these means."""

    name: str
    version: str
    maintainer: str  # "" when the file names nobody
    mode: Literal["strict", "permissive"]
    entrypoint: str  # relative to the directory of `path`
    required_mem_mb: int  # MiB
    max_cpu_share: float  # of one CPU; above 0, at most 1
    capabilities: Capabilities
    mounts: tuple[Mount, ...]
    metrics: tuple[str, ...]
    without: tuple[str, ...]  # virtio features that are not used, by name
    tx_header: str  # of a sent frame: "apart" or "with-frame"
    path: str  # the file this was read from

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read and check a manifest file. Raises ManifestError, which tells all that is wrong with it."""
        from netbridge.vnode import loading

        return loading.load(path)

    @classmethod
    def find(cls, name: str) -> Manifest:
        """Load the manifest that comes with the package under this V-Node name. Raises ManifestError."""
        from netbridge.vnode import loading

        return loading.load(loading.packaged(name))

    @classmethod
    def open(cls, path_or_name: str) -> Manifest:
        """Load what a command line names: `find` for a bare name, `load` for anything with a slash or a dot in it."""
        is_path = "/" in path_or_name or "." in path_or_name
        return cls.load(path_or_name) if is_path else cls.find(path_or_name)

    @classmethod
    def parse(cls, data: bytes, path: str | os.PathLike[str]) -> Manifest:
        """Check the bytes of a manifest; `path` is the file that messages name. Raises ManifestError."""
        from netbridge.vnode import loading

        return loading.parse(data, path)

    @property
    def entrypoint_path(self) -> str:
        """The V-Node's program."""
        directory, slash, _ = self.path.rpartition("/")
        return f"{directory}{slash}{self.entrypoint}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can carry; `from_dict` is the way back."""
        return {
            **self._asdict(),
            "capabilities": self.capabilities.as_dict(),
            "mounts": [mount._asdict() for mount in self.mounts],
            "metrics": list(self.metrics),
            "without": list(self.without),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Manifest:
        """What `as_dict` gave. For data of this program's own making: it is not checked as a manifest is."""
        return cls(
            **{
                **data,
                "capabilities": Capabilities.from_dict(data["capabilities"]),
                "mounts": tuple(Mount(**mount) for mount in data["mounts"]),
                "metrics": tuple(data["metrics"]),
                "without": tuple(data["without"]),
            }
        )
