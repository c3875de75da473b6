"""The manifest's format as data: every key, the shape of its value, and what it means.

Three readers share this one description: `checker` (is this document right, and if not, what exactly is wrong),
`json_schema` (the same rules for editors) and the tests that hold docs/manifest.md to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from netbridge.virtio import features
from netbridge.vnode import capabilities, metric_names
from vfio.pci import PciAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One line of text that matches `pattern`.

    `plain_numbers` accepts text that YAML 1.1 takes for a number when it stands without quotes: 10:11:0 is a
    sexagesimal integer to it. `convert` turns the text into what the manifest keeps, and may raise ValueError.
    """

    expected: str
    pattern: str
    examples: tuple[str, ...]
    longest: int = 200
    plain_numbers: bool = False
    convert: Callable[[str], Any] = str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of a few words, each with its meaning. `never` are words that somebody may come up with, each with the reason
    why it will not do."""

    words: Mapping[str, str]
    never: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A whole number from `least` to `most`, both included, in plain decimal digits."""

    least: int
    most: int
    noun: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fraction:
    """A number above 0 and at most 1."""

    noun: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOf:
    """A list of items of one shape, none twice. `identity` is the key that tells items that are mappings apart."""

    item: Shape
    identity: str | None = None
    longest: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Either:
    """A value that may have one of several shapes: any number of scalar ones, at most one Section."""

    shapes: tuple[Shape, ...]
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """The value that a capability takes after its colon."""

    shape: Shape
    required: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Grants:
    """The list of capabilities: a bare name, or a name with its argument, each at most once."""

    arguments: Mapping[str, Argument]
    kinds: tuple[capabilities.Kind, ...] = capabilities.KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key of a section: without `required`, `default` stands in for it when it is left out."""

    name: str
    shape: Shape
    means: str
    required: bool = False
    default: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A mapping with these keys and no others."""

    keys: tuple[Key, ...]
    by_name: Mapping[str, Key] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", MappingProxyType({key.name: key for key in self.keys}))


Shape = Text | Choice | Whole | Fraction | ListOf | Either | Section | Grants


HEX = "(?:0[xX])?[0-9a-fA-F]"

PCI_ADDRESS = Text(
    expected='a PCI address, bus:device:function in hex with an optional domain before it, such as "0x00:0x1F:0x0"',
    pattern=rf"(?:{HEX}{{1,8}}:)?{HEX}{{1,2}}:(?:0[xX])?[01]?[0-9a-fA-F][:.](?:0[xX])?[0-7]",
    examples=("0x00:0x1F:0x0", "0000:00:1f.0"),
    plain_numbers=True,
    convert=PciAddress.parse,
)

IRQ = Either(
    shapes=(
        Whole(least=0, most=255, noun="an interrupt line"),
        Choice(words={"msix": "MSI-X, with as many vectors as the function has"}),
        Section(
            keys=(
                # 2048 is the largest MSI-X table there can be (PCI 3.0 section 6.8.2.3).
                Key(
                    name="msix",
                    shape=Whole(least=1, most=2048, noun="a number of vectors"),
                    means="MSI-X, with at most so many vectors",
                    required=True,
                ),
            )
        ),
    ),
    expected="an interrupt line from 0 to 255, `msix`, or `{msix: N}` for at most N vectors",
)

ABSOLUTE_PATH = Text(
    expected="an absolute path below / without `.` or `..` in it, such as /var/lib/net-bridge",
    pattern=r"(?:/(?!\.{1,2}(?:/|$))[^/\x00-\x1f\x7f]+)+",
    examples=("/var/lib/net-bridge",),
    longest=1024,
)

MOUNT = Either(
    shapes=(
        ABSOLUTE_PATH,
        Section(
            keys=(
                Key(name="path", shape=ABSOLUTE_PATH, means="what is reachable: a directory or a file", required=True),
                Key(
                    name="access",
                    shape=Choice(words={"ro": "read-only", "rw": "readable and writable"}),
                    means="how it is reachable",
                    default="ro",
                ),
            )
        ),
    ),
    expected="an absolute path (read-only) or `{path: /..., access: rw}`",
)

FEATURE = Choice(
    words={item.name: item.meaning for item in features.SUPPORTED if item not in features.REQUIRED},
    never={
        item.name: f"it is never on anyway: {item.refused}"
        if item.refused
        else "it cannot be turned off: the driver does not work without it"
        for item in features.FEATURES
        if item.refused or item in features.REQUIRED
    },
)

MANIFEST: Final = Section(
    keys=(
        Key(
            name="vnode",
            required=True,
            means="what this V-Node is",
            shape=Section(
                keys=(
                    Key(
                        name="name",
                        required=True,
                        means="the V-Node's name",
                        shape=Text(
                            expected="lower-case letters, digits and single hyphens, starting with a letter",
                            pattern=r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*",
                            examples=("net-bridge",),
                            longest=64,
                        ),
                    ),
                    Key(
                        name="version",
                        required=True,
                        means="the V-Node's version",
                        shape=Text(
                            expected='a version of three numbers, such as "0.1.0"',
                            pattern=r"[0-9]+\.[0-9]+\.[0-9]+(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?",
                            examples=("0.1.0",),
                            longest=64,
                        ),
                    ),
                    Key(
                        name="maintainer",
                        means="whom to write to",
                        default="",
                        shape=Text(
                            expected="one line of text",
                            pattern=r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+",
                            examples=("someone@example.org",),
                        ),
                    ),
                    Key(
                        name="mode",
                        means="how tightly the driver process is confined",
                        default="strict",
                        shape=Choice(
                            words={
                                "strict": "no new privileges, no Linux capabilities, seccomp allow-list, Landlock",
                                "permissive": "none of these: for debugging, and it says so at every start",
                            }
                        ),
                    ),
                )
            ),
        ),
        Key(
            name="runtime",
            required=True,
            means="what is started, and how much it may use",
            shape=Section(
                keys=(
                    Key(
                        name="entrypoint",
                        required=True,
                        means="the program of the V-Node, relative to the manifest's directory",
                        shape=Text(
                            expected="a relative path without `.` or `..` in it, such as bin/net-bridge.vnode",
                            pattern=r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._+-]+(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._+-]+)*",
                            examples=("bin/net-bridge.vnode",),
                        ),
                    ),
                    Key(
                        name="required_mem_mb",
                        required=True,
                        means="MiB of memory for the driver process with its DMA pool: cgroup memory.max, "
                        "and the budget for memory mapped for the device",
                        shape=Whole(least=1, most=1 << 20, noun="a number of MiB"),
                    ),
                    Key(
                        name="max_cpu_share",
                        means="share of one CPU that the driver process may use: cgroup cpu.max",
                        default=1.0,
                        shape=Fraction(noun="a share of one CPU"),
                    ),
                )
            ),
        ),
        Key(
            name="capabilities",
            required=True,
            means="what the V-Node may do; what is not listed is refused",
            shape=Grants(
                arguments={
                    capabilities.PCI: Argument(shape=PCI_ADDRESS, required=True),
                    capabilities.IRQ: Argument(shape=IRQ, required=True),
                    capabilities.SHARE: Argument(
                        shape=Choice(words={"ro": "the service maps received frames read-only"}), required=False
                    ),
                }
            ),
        ),
        Key(
            name="device",
            means="how the device is used",
            default={"without": [], "tx_header": "apart"},
            shape=Section(
                keys=(
                    Key(
                        name="without",
                        means="virtio features that are not used, even where the device offers them",
                        default=[],
                        shape=ListOf(item=FEATURE),
                    ),
                    Key(
                        name="tx_header",
                        means="where the virtio header of a sent frame is",
                        default="apart",
                        shape=Choice(
                            words={
                                "apart": "in memory that no service reaches, in a descriptor of its own",
                                "with-frame": "in front of the frame, in one descriptor: faster, and the service can "
                                "change it until the device has read it",
                            }
                        ),
                    ),
                )
            ),
        ),
        Key(
            name="storage",
            means="the file system that the V-Node sees",
            default={"mounts": []},
            shape=Section(
                keys=(
                    Key(
                        name="mounts",
                        means="what stays reachable under mode strict; nothing else does",
                        default=[],
                        shape=ListOf(item=MOUNT, identity="path"),
                    ),
                )
            ),
        ),
        Key(
            name="observability",
            means="what is told to the outside",
            default={"metrics": []},
            shape=Section(
                keys=(
                    Key(
                        name="metrics",
                        means="names of the metrics that are exported, and no others",
                        default=[],
                        shape=ListOf(item=Choice(words={metric.name: metric.tells for metric in metric_names.METRICS})),
                    ),
                )
            ),
        ),
    )
)
