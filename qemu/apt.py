"""Where the guest's packages come from: the mirror, keys and network settings that this machine is set up for.

Nothing here names a mirror. A Debian host's own mirror has the other suites, too; on any other host mmdebstrap's
default serves. VFIO_GUESTS_MIRROR overrides both.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qemu.errors import ToolMissing
from qemu.recipe import Source
from qemu.tools import find_tool

KEYRINGS = tuple(Path("/usr/share/keyrings", f"debian-archive-keyring.{suffix}") for suffix in ("gpg", "pgp"))

# What of this machine's settings is about reaching a mirror, and would hold for any other suite, too.
NETWORK_SETTING = re.compile(
    r"Acquire::(.*::)?(Proxy|Proxy-Auto-Detect|Check-Valid-Until|Check-Date|CAInfo|Force\w+)\b"
)


@dataclass(frozen=True)
class Mirrors:
    """Base addresses. `main` None: the bootstrapper's default. `security` None: that archive is not mirrored."""

    main: str | None
    security: str | None


def _output(*argv: str) -> str:
    done = subprocess.run([find_tool(argv[0]), *argv[1:]], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def host_mirrors(output: Callable[..., str] = _output) -> Mirrors:
    """What this machine's package configuration says; `output` runs a command and returns what it prints."""
    if explicit := os.environ.get("VFIO_GUESTS_MIRROR"):
        return Mirrors(explicit, None)
    targets = output(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)", "Created-By: Packages"
    )
    main = security = None
    for line in targets.splitlines():
        address, release, component, *origin = line.split()
        # The origin stands in the index that `apt-get update` fetched. Before that, the system's name must do.
        if component == "main" and (origin == ["Debian"] or (not origin and _host_is_debian())):
            if release.endswith("-security"):
                security = security or address
            elif "-" not in release:
                main = main or address
    return Mirrors(main, security)


def _host_is_debian() -> bool:
    try:
        return platform.freedesktop_os_release().get("ID") == "debian"
    except OSError:
        return False


def network_settings(output: Callable[..., str] = _output) -> list[str]:
    """This machine's apt settings for proxies and the like, as lines of apt's configuration."""
    return [line for line in output("apt-config", "dump").splitlines() if NETWORK_SETTING.match(line)]


def keyring(candidates: tuple[Path, ...] = KEYRINGS) -> Path:
    """Debian's archive keys. Raises ToolMissing."""
    for path in candidates:
        if path.exists():
            return path
    raise ToolMissing(
        f"{candidates[0]}: Debian's archive keys are not there, so no package could be trusted; "
        "install them: apt-get install debian-archive-keyring"
    )


def source_lines(source: Source, mirrors: Mirrors, keys: Path) -> list[str]:
    """apt's source lines for a suite; none when the bootstrapper's default is to be used."""
    if mirrors.main is None:
        return []
    suites = [(mirrors.main, source.suite)]
    if "updates" in source.pockets:
        suites.append((mirrors.main, f"{source.suite}-updates"))
    if "security" in source.pockets and mirrors.security is not None:
        suites.append((mirrors.security, f"{source.suite}-security"))
    return [f"deb [signed-by={keys}] {address} {suite} main" for address, suite in suites]
