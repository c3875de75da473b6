"""Runs mmdebstrap: makes a root file system of Debian packages, or only fetches packages.

As root it works in a chroot, otherwise in a user namespace, with the same result. Whatever leaves the namespace does
so through mmdebstrap's own file hooks, so nothing here needs to be readable for the namespace's root.
"""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
import signal
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from qemu import apt
from qemu.cache import Progress
from qemu.recipe import RootPart, Source
from qemu.tools import find_tool, watch_tool

MOUNT_POINTS = ("code", "usr/lib/guest", "usr/lib/modules")
"""Directories of the root, made for images/initrd.sh and images/init to mount on."""

INTERRUPT_SECONDS = 20.0
"""How long mmdebstrap may take to clear up after itself."""

STEPS = {
    "running apt-get update": "reading the lists of packages",
    "downloading packages with apt": "fetching packages",
    "extracting archives": "unpacking packages",
    "installing essential packages": "installing the essential packages",
    "installing remaining packages inside the chroot": "installing the other packages",
    "making the file system": "making the file system",
    "fetching packages": "fetching packages",
}
"""What of mmdebstrap's and the hooks' messages is worth telling, and in which words."""

# Runs where mmdebstrap has its root, whose path is $1. The file system is made from a second view of that root, which
# does not show what is mounted in it, and on a tmpfs that this view does not show either. Both are mounted in a
# namespace of their own, so that neither is left behind when this is interrupted: for root, all others are the host's.
ROOT_HOOK = """
set -eu
cd "$1"
{users}
mkdir -p {mount_points}
rm -rf var/lib/apt var/log var/cache etc/apt/apt.conf.d/99mmdebstrap etc/apt/sources.list etc/resolv.conf boot
mkdir -p var/log var/cache boot
echo guest >etc/hostname
: >etc/machine-id
size=$(du -skx . | cut -f1)
files=$(find . -xdev | wc -l)
echo "I: making the file system"
unshare --mount sh -euc '
    mount -t tmpfs image mnt
    mkdir mnt/plain
    mount --bind . mnt/plain
    mkfs.ext4 -q -F -L root -b 4096 -m 0 -O ^has_journal,^metadata_csum -N $(($2 + 1000)) \
        -d mnt/plain mnt/root.ext4 $(($1 * 11 / 10 + 16384))k
    cp --sparse=always mnt/root.ext4 {scratch}root.ext4
' sh "$size" "$files"
chroot . dpkg-query -W >{scratch}packages.txt
"""

SCRATCH = "image-"
"""What the names of files in the root begin with that are made for this program and not for the guest."""

# Fetches packages, and of those whose name begins with linux-image- also the ones that the kernel's files are in.
FETCH_HOOK = """
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
mkdir "$1/packages"
cd "$1/packages"
names=
for name in {packages}; do
    case $name in
    linux-image-*)
        more=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
            --no-enhances --no-pre-depends "$name" | grep -E '^linux-(image|binary|modules|base)-' || true)
        [ -n "$more" ] || {{ echo "E: no package $name in this suite"; exit 1; }}
        names="$names $more"
        ;;
    *) names="$names $name" ;;
    esac
done
echo "I: fetching packages"
apt-get -qq download $names
"""


def root_inputs(part: RootPart, architecture: str) -> list[str]:
    """All that decides what `build_root` makes, the mirror's present contents aside."""
    return [*_root_options(part, architecture), repr(part.source), inspect.getsource(build_root)]


def _root_options(part: RootPart, architecture: str) -> list[str]:
    users = []
    for user in part.users:
        users.append(f"echo {user.name}:x:{user.uid}:{user.uid}::/nonexistent:/usr/sbin/nologin >>etc/passwd")
        users.append(f"echo {user.name}:x:{user.uid}: >>etc/group")
    hook = ROOT_HOOK.format(users="\n".join(users), mount_points=" ".join(MOUNT_POINTS), scratch=SCRATCH)
    return [
        "--variant=essential",
        f"--architectures={architecture}",
        f"--include={','.join(part.packages)}",
        *(f"--dpkgopt=path-exclude={path}" for path in part.exclude),
        *(f"--dpkgopt=path-include={path}" for path in part.keep),
        f"--customize-hook={hook}",
    ]


def build_root(part: RootPart, architecture: str, out: Path, progress: Progress) -> None:
    """Puts root.ext4, busybox and packages.txt (names and versions) into the directory `out`.

    Raises ToolMissing, or ImageBuildFailed with the end of mmdebstrap's output.
    """
    find_tool("mkfs.ext4")  # called by the hook, where a missing one is harder to explain
    files = {f"/{SCRATCH}{name}": name for name in ("root.ext4", "packages.txt")} | {"/usr/bin/busybox": "busybox"}
    _mmdebstrap(
        part.source,
        [
            *_root_options(part, architecture),
            *(f"--customize-hook=download {inside} {shlex.quote(str(out / name))}" for inside, name in files.items()),
        ],
        lambda line: progress(f"root: {line}"),
    )


def fetch_inputs(source: Source, packages: Sequence[str], architecture: str) -> list[str]:
    """All that decides what `fetch_packages` fetches, the mirror's present contents aside."""
    return [repr(source), architecture, *packages, FETCH_HOOK]


def fetch_packages(
    source: Source, packages: Sequence[str], architecture: str, out: Path, progress: Progress
) -> list[Path]:
    """Puts the named packages' .deb files, without what they depend on, into the directory `out`.

    Of a linux-image-* package, what it depends on by names of that kind comes along: Debian's is an empty one that
    leads to the current version. Raises as build_root does.
    """
    with tempfile.TemporaryDirectory(dir=out) as directory:
        archive = Path(directory, "packages.tar")
        _mmdebstrap(
            source,
            [
                "--variant=custom",
                f"--architectures={architecture}",
                f"--customize-hook={FETCH_HOOK.format(packages=' '.join(packages))}",
                f"--customize-hook=tar-out /packages {shlex.quote(str(archive))}",
            ],
            progress,
        )
        with tarfile.open(archive) as tar:
            for member in tar:
                contents = tar.extractfile(member)
                if contents is not None and member.name.endswith(".deb"):
                    with contents, (out / Path(member.name).name).open("wb") as file:
                        shutil.copyfileobj(contents, file)
    return sorted(out.glob("*.deb"))


def _mmdebstrap(source: Source, options: Sequence[str], progress: Progress) -> None:
    mode = "root" if os.geteuid() == 0 else "unshare"
    if mode == "unshare":
        find_tool("newuidmap")
    keys = apt.keyring()
    lines = apt.source_lines(source, apt.host_mirrors(), keys)
    with tempfile.TemporaryDirectory() as directory:
        settings = Path(directory, "apt.conf")
        # In a file, because a proxy's address may hold a password and command lines can be read by all.
        settings.write_text("\n".join(apt.network_settings()) + "\n")
        settings.chmod(0o600)
        _run(
            [
                find_tool("mmdebstrap"),
                f"--mode={mode}",
                "--format=null",
                f"--keyring={keys}",
                f"--aptopt={settings}",
                *options,
                source.suite,
                "/dev/null",
                *lines,
            ],
            progress,
        )


def _run(argv: Sequence[str], progress: Progress) -> None:
    # It repeats the hooks' texts when it runs them and when one fails, at the cost of what the hook had to say.
    hooks = {line for argument in argv for line in argument.splitlines()}
    started = time.monotonic()

    def on_line(line: str) -> bool:
        if (step := line.strip().removeprefix("I: ").removesuffix("...")) in STEPS:
            progress(f"{STEPS[step]} ({time.monotonic() - started:.1f} s)")
        return line not in hooks

    # Interrupted, it unmounts and removes its directory; killed, it could not.
    watch_tool(
        argv,
        doing="mmdebstrap",
        on_line=on_line,
        asking=signal.SIGINT,
        patience=INTERRUPT_SECONDS,
        environment={**os.environ, "LC_ALL": "C"},
    )
