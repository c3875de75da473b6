"""`netbridge check`: says what a manifest grants, or everything that is wrong with it. It touches no device."""

from __future__ import annotations

import argparse
import json
import sys

from netbridge.errors import ExitCode, ManifestError
from netbridge.vnode import json_schema
from netbridge.vnode.capabilities import KINDS
from netbridge.vnode.manifest import Manifest
from netbridge.vnode.wording import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "manifest",
        nargs="?",
        metavar="MANIFEST",
        help="a vnode.yml, or the name of a V-Node that comes with the package",
    )
    what.add_argument("--schema", action="store_true", help="print the format as a JSON Schema for editors, and end")
    parser.add_argument("--json", action="store_true", help="say it in JSON on standard output, whether good or bad")


def main(args: argparse.Namespace) -> int:
    """Run the command. Returns its exit code: 0 for a manifest that can be used, 2 for one that cannot."""
    if args.schema:
        sys.stdout.write(json_schema.text())
        return ExitCode.OK
    try:
        manifest = Manifest.open(args.manifest)
    except ManifestError as error:
        if args.json:
            print(json.dumps({"ok": False, **error.as_dict()}, indent=2))
        else:
            print(error, file=sys.stderr)
        return error.exit_code
    if args.json:
        print(json.dumps({"ok": True, "file": manifest.path, "manifest": manifest.as_dict()}, indent=2))
    else:
        print(summary(manifest))
    return ExitCode.OK


def summary(manifest: Manifest) -> str:
    """What a manifest grants and what it does not, for a person to read."""
    held = manifest.capabilities
    grants = {kind: held.describe(kind.name) for kind in KINDS}
    name_width = max(len(kind.name) for kind in KINDS)
    grant_width = max(len(grant) for grant in grants.values())
    lines = [f"{manifest.path}: {manifest.name} {manifest.version}, nothing wrong", "", "capabilities"]
    for kind, grant in grants.items():
        meaning = kind.allows if held.has(kind.name) else kind.without
        lines.append(f"  {kind.name:{name_width}}  {grant:{grant_width}}  {meaning}")
    lines += [
        "",
        "limits",
        f"  {'mode':{name_width}}  {_mode(manifest)}",
        f"  {'memory':{name_width}}  {manifest.required_mem_mb} MiB, DMA pool included",
        f"  {'CPU':{name_width}}  {manifest.max_cpu_share * 100:g} % of one CPU",
        f"  {'file system':{name_width}}  {_mounts(manifest)}",
        f"  {'features off':{name_width}}  {', '.join(manifest.without) or 'none'}",
        f"  {'TX headers':{name_width}}  {_tx_headers(manifest)}",
        f"  {'metrics':{name_width}}  {', '.join(manifest.metrics) or 'none'}",
    ]
    return "\n".join(lines)


def _mode(manifest: Manifest) -> str:
    if manifest.mode == "permissive":
        return "permissive: THE PROCESS IS NOT CONFINED; for debugging only"
    return "strict"


def _tx_headers(manifest: Manifest) -> str:
    if manifest.tx_header == "with-frame":
        return "with the frame: the service can change them until the device has read them"
    return "apart, out of the service's reach"


def _mounts(manifest: Manifest) -> str:
    mounts = [f"{show(mount.path)} ({'read-write' if mount.writable else 'read-only'})" for mount in manifest.mounts]
    return ", ".join(mounts) or "nothing"
