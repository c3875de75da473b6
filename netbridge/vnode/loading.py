"""Finds a manifest, reads it, has it checked, and builds the plain data. What the monitor and `netbridge check` use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from netbridge.errors import ManifestError
from netbridge.vnode import capabilities as names
from netbridge.vnode import checker, document
from netbridge.vnode.capabilities import MIB, Capabilities, Intx, Msix
from netbridge.vnode.manifest import Manifest, Mount
from netbridge.vnode.wording import Problem, Problems, listing, nearest, show

FILE_NAME = "vnode.yml"

# Where the V-Nodes that come with the package live, each in a directory of its own name.
PACKAGED = Path(__file__).parent


def load(path: str | os.PathLike[str]) -> Manifest:
    """Read and check a manifest file. Raises ManifestError."""
    return parse(document.read_bytes(os.fspath(path)), path)


def parse(data: bytes, path: str | os.PathLike[str]) -> Manifest:
    """Check the bytes of a manifest; `path` is the file that messages name. Raises ManifestError."""
    file = os.fspath(path)
    problems = Problems()
    root = document.parse(data, problems)
    if root is None and problems:
        raise ManifestError(file, problems.sorted())
    values = checker.check(root, problems)
    if problems:
        raise ManifestError(file, problems.sorted())
    assert isinstance(root, document.Mapping)
    (line, _), _ = root.entries["capabilities"]
    return _manifest(values, line, file)


def packaged(name: str) -> Path:
    """The path of the manifest that comes with the package under this V-Node name. Raises ManifestError."""
    known = {path.parent.name: path for path in sorted(PACKAGED.glob(f"*/{FILE_NAME}"))}
    if name in known:
        return known[name]
    what = f"no V-Node of the name {show(name)} comes with this package"
    expected = f"{listing(known)}, or the path of a manifest such as ./{FILE_NAME}"
    raise ManifestError("netbridge", (Problem(None, None, "", what, expected, nearest(name, known)),))


def _manifest(values: dict[str, Any], line: int, file: str) -> Manifest:
    """Build the plain data from values that the checker has passed."""
    vnode, runtime = values["vnode"], values["runtime"]
    return Manifest(
        name=vnode["name"],
        version=vnode["version"],
        maintainer=vnode["maintainer"],
        mode=vnode["mode"],
        entrypoint=runtime["entrypoint"],
        required_mem_mb=runtime["required_mem_mb"],
        max_cpu_share=runtime["max_cpu_share"],
        capabilities=_capabilities(values["capabilities"], runtime["required_mem_mb"], line, file),
        mounts=tuple(
            Mount(item) if isinstance(item, str) else Mount(item["path"], item["access"] == "rw")
            for item in values["storage"]["mounts"]
        ),
        metrics=tuple(values["observability"]["metrics"]),
        without=tuple(values["device"]["without"]),
        tx_header=values["device"]["tx_header"],
        path=file,
    )


def _capabilities(granted: dict[str, Any], mem_mb: int, line: int, file: str) -> Capabilities:
    return Capabilities(
        network=names.NETWORK in granted,
        pci_function=granted.get(names.PCI),
        irq=_irq(granted[names.IRQ]) if names.IRQ in granted else None,
        dma=names.DMA in granted,
        dma_budget=mem_mb * MIB if names.DMA in granted else 0,
        mem_share=(granted[names.SHARE] or "rw") if names.SHARE in granted else None,
        raw=names.RAW in granted,
        log=names.LOG in granted,
        manifest=file,
        line=line,
    )


def _irq(value: int | str | dict[str, int]) -> Intx | Msix:
    """The three forms that the schema lets through: 11, msix, and {msix: N}."""
    if isinstance(value, int):
        return Intx(value)
    return Msix(value["msix"] if isinstance(value, dict) else None)
