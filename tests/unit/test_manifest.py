"""The manifest: the printed example, the ways to get one wrong, the grants, the schema, what the driver imports."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from netbridge.errors import CapabilityExceeded, CapabilityMissing, ExitCode, ManifestError
from netbridge.virtio.features import REQUIRED, SUPPORTED, select
from netbridge.vnode import capabilities as names
from netbridge.vnode import check, document, json_schema, loading
from netbridge.vnode.capabilities import KINDS, MIB, Capabilities, Intx, Msix
from netbridge.vnode.manifest import Manifest, Mount
from netbridge.vnode.metric_names import METRIC_NAMES, METRICS
from netbridge.vnode.schema import MANIFEST, Section
from netbridge.vnode.wording import MOST, Problem, nearest, show
from vfio.pci import PciAddress

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = loading.PACKAGED / "net-bridge" / "vnode.yml"
PRINTED_SHA256 = "0810ba7c63272d15f981b6ac88d1668055a244b12b7510c551672b62f63ddb07"

BASE = """\
vnode:
  name: net-bridge
  version: "0.1.0"
runtime:
  entrypoint: bin/net-bridge.vnode
  required_mem_mb: 16
capabilities:
  - CAP_DMA_ALLOC
"""

HEAD, CAPABILITIES = BASE[: BASE.index("capabilities")], "NetworkAccess, CAP_HARDWARE_IO_PCI, CAP_IRQ_REGISTER, "
CAPABILITIES += "CAP_DMA_ALLOC, CAP_MEM_SHARE, CAP_SYSCALL_RAW or CAP_LOG_WRITE"
AN_IRQ = "an interrupt line from 0 to 255, `msix`, or `{msix: N}` for at most N vectors"


def parse(text: str | bytes) -> Manifest:
    return Manifest.parse(text if isinstance(text, bytes) else text.encode(), "vnode.yml")


def errors(text: str | bytes) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse(text)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def granting(*lines: str) -> str:
    return HEAD + "capabilities:\n" + "".join(f"  {line}\n" for line in lines)


# The printed example


def test_packaged_example_is_as_printed() -> None:
    assert hashlib.sha256(EXAMPLE.read_bytes()).hexdigest() == PRINTED_SHA256


def test_example_says_what_is_printed() -> None:
    assert Manifest.find("net-bridge") == Manifest(
        name="net-bridge",
        version="0.1.0",
        maintainer="aetheros-core-team@aetheros.org",
        mode="strict",
        entrypoint="bin/net-bridge.vnode",
        required_mem_mb=16,
        max_cpu_share=0.05,
        capabilities=Capabilities(
            network=True,
            pci_function=PciAddress(0, 0, 0x1F, 0),
            irq=Intx(11),
            dma=True,
            dma_budget=16 * MIB,
            mem_share="rw",
            raw=True,
            log=False,
            manifest=str(EXAMPLE),
            line=12,
        ),
        mounts=(),
        metrics=("packets_rx", "packets_tx", "irq_latency_ns"),
        without=(),
        tx_header="apart",
        path=str(EXAMPLE),
    )
    assert isinstance(Manifest.find("net-bridge").capabilities.irq, Intx)
    assert Manifest.find("net-bridge").entrypoint_path == str(EXAMPLE.parent / "bin/net-bridge.vnode")


def test_what_is_left_out_has_the_documented_default() -> None:
    manifest = parse(BASE)
    assert (manifest.maintainer, manifest.mode, manifest.max_cpu_share) == ("", "strict", 1.0)
    assert (manifest.mounts, manifest.metrics, manifest.without, manifest.tx_header) == ((), (), (), "apart")
    assert manifest.entrypoint_path == "bin/net-bridge.vnode"
    assert parse(BASE + "storage: {}\nobservability: {}\ndevice: {}\n") == manifest


def test_open_takes_a_name_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vnode.yml").write_text(BASE)
    assert Manifest.open("net-bridge").path == str(EXAMPLE)
    assert Manifest.open("vnode.yml").path == "vnode.yml"
    assert Manifest.open(f"{tmp_path}/vnode.yml").entrypoint_path == f"{tmp_path}/bin/net-bridge.vnode"


@pytest.mark.parametrize("name", ["nte-bridge", "..", "", "*", "net-bridge/../net-bridge", "net-bridge\0"])
def test_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ManifestError, match=r"no V-Node of the name .*; expected net-bridge, or the path of"):
        Manifest.find(name)


# Values


@pytest.mark.parametrize(
    ("address", "canonical"),
    [
        ('"0x00:0x1F:0x0"', "0000:00:1f.0"),
        ('"0000:00:1f.0"', "0000:00:1f.0"),
        ("00:1f.0", "0000:00:1f.0"),
        ("10:11:0", "0000:10:11.0"),  # a sexagesimal integer to YAML 1.1
        ("00:10.0", "0000:00:10.0"),  # and a sexagesimal float
        ('"0x0001:0x3a:0x02:0x7"', "0001:3a:02.7"),
        ('"10000:e1:00.0"', "10000:e1:00.0"),
    ],
)
def test_pci_addresses(address: str, canonical: str) -> None:
    granted = parse(granting(f"- CAP_HARDWARE_IO_PCI: {address}")).capabilities
    assert str(granted.pci_function) == canonical


@pytest.mark.parametrize(
    ("written", "irq"),
    [
        ("11", Intx(11)),
        ("0", Intx(0)),
        ("255", Intx(255)),
        ("msix", Msix(None)),
        ('"msix"', Msix(None)),
        ("{msix: 3}", Msix(3)),
        ("\n        msix: 2048", Msix(2048)),
    ],
)
def test_irq_forms(written: str, irq: Intx | Msix) -> None:
    granted = parse(granting(f"- CAP_IRQ_REGISTER: {written}")).capabilities.irq
    assert granted == irq
    assert type(granted) is type(irq)


def test_sharing_forms() -> None:
    assert parse(granting("- CAP_MEM_SHARE")).capabilities.mem_share == "rw"
    assert parse(granting("- CAP_MEM_SHARE: ro")).capabilities.mem_share == "ro"
    assert parse(granting("- CAP_DMA_ALLOC")).capabilities.mem_share is None


def test_no_capabilities_at_all() -> None:
    granted = parse(HEAD + "capabilities: []\n").capabilities
    assert granted.names() == ()
    assert granted == Capabilities(manifest="vnode.yml", line=7)


def test_mounts() -> None:
    written = "storage:\n  mounts: [/a, {path: /b/c.d}, {path: /var/lib/x, access: rw}]\n"
    assert parse(BASE + written).mounts == (Mount("/a"), Mount("/b/c.d"), Mount("/var/lib/x", writable=True))


@pytest.mark.parametrize("name", [item.name for item in SUPPORTED if item not in REQUIRED])
def test_any_feature_but_the_required_can_be_turned_off(name: str) -> None:
    assert parse(BASE + f"device:\n  without: [{name}]\n").without == (name,)
    select(off=[name])


def test_a_service_may_be_trusted_with_the_header_of_what_it_sends() -> None:
    manifest = parse(BASE + "device:\n  tx_header: with-frame\n")
    assert manifest.tx_header == "with-frame"
    assert Manifest.from_dict(manifest.as_dict()) == manifest
    assert "the service can change them until the device has read them" in check.summary(manifest)


@pytest.mark.parametrize("share", ["0.05", "1", "1.0", ".5", "5e-2"])
def test_cpu_shares(share: str) -> None:
    assert parse(BASE.replace("16\n", f"16\n  max_cpu_share: {share}\n")).max_cpu_share == float(share)


# Errors, word for word


def golden() -> list[Any]:
    """The cases of manifest_errors.txt: `=== name`, a document, `--- told`, the errors."""
    text = (Path(__file__).parent / "data/manifest_errors.txt").read_text()
    cases = re.findall(r"^=== (.*)\n((?s:.*?))^--- told\n((?s:.*?))\n(?=\n===|\Z)", text, re.MULTILINE)
    assert len(cases) == text.count("\n=== ") > 0
    return [pytest.param(document, told.splitlines(), id=name) for name, document, told in cases]


@pytest.mark.parametrize(("text", "told"), golden())
def test_errors_word_for_word(text: str, told: list[str]) -> None:
    assert errors(text) == told


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "1:1: the file is empty; expected the sections vnode, runtime and capabilities"),
        (b"a:\n  caf\xe9\n", "2:6: byte 0xe9 is not UTF-8; expected a text file in UTF-8"),
        ("é: \ufeff\xe9".encode()[:-1], "1:5: byte 0xc3 is not UTF-8; expected a text file in UTF-8"),
        (b"# \x07\n", '1:3: character "\\x07" is not allowed in YAML; expected printable text'),
        (b"a:\n  \x1b[31m: z\n", '2:3: character "\\x1b" is not allowed in YAML; expected printable text'),
        (b"a: " + b"[" * 5000, "1:15: nested more than 12 levels deep; expected a manifest"),
    ],
)
def test_errors_of_bytes_that_are_no_document(data: bytes, told: str) -> None:
    assert errors(data) == [f"vnode.yml:{told}"]


@pytest.mark.parametrize("value", ["0", "-1", "1048577", "16.0", "1e3", "0x10", "1_6", "1:30", "yes", "~", "", "[16]"])
def test_memory_out_of_range_or_not_a_plain_number(value: str) -> None:
    (line,) = errors(BASE.replace("16", value))
    assert re.match(r"vnode\.yml:6:\d+: runtime\.required_mem_mb: it is .*; expected a number of MiB from 1 to", line)


@pytest.mark.parametrize("value", ["0", "-0.1", "1.01", ".inf", ".nan", "50%", '"0.5"', "1" * 400, "true", "{}"])
def test_cpu_share_out_of_range_or_not_a_number(value: str) -> None:
    (line,) = errors(BASE.replace("16\n", f"16\n  max_cpu_share: {value}\n"))
    assert re.match(r"vnode\.yml:7:18: runtime\.max_cpu_share: it is .*; expected a share of one CPU", line)


@pytest.mark.parametrize(
    "value", ["1f.0", "00:20.0", "00:1f.8", "100:00.0", "0000:00:1f", "/sys/00:1f.0", "00.1f:0", "0x:0x:0x", "11"]
)
def test_bad_pci_addresses(value: str) -> None:
    (line,) = errors(granting(f'- CAP_HARDWARE_IO_PCI: "{value}"'))
    assert f"it is the text {json.dumps(value)}; expected a PCI address" in line


@pytest.mark.parametrize("value", ["-1", "256", "011", "0xb", '"11"', "msi", "11.0", "yes", "[msix]", "intx"])
def test_bad_irqs(value: str) -> None:
    (line,) = errors(granting(f"- CAP_IRQ_REGISTER: {value}"))
    assert f"; expected {AN_IRQ}" in line


def test_only_so_many_problems_are_told() -> None:
    lines = errors(BASE + "".join(f"unknown{n}: 1\n" for n in range(MOST + 7)))
    assert len(lines) == MOST + 1
    assert lines[-1] == "vnode.yml: and 7 more problems"


def test_aliases_that_multiply_cost_nothing() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    assert errors(bomb)[0] == 'vnode.yml:1:5: the anchor "&a0" is refused; expected no anchors or aliases'


# Files


def test_files_that_are_none(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "large").write_bytes(b"#" * (document.LARGEST + 1))
    (tmp_path / "cut.yml").write_text(BASE + "\n" * (document.LARGEST - len(BASE)))
    cases = {
        str(tmp_path / "none.yml"): "cannot be opened: No such file or directory; expected the path of a manifest that",
        str(tmp_path): f"is a directory; expected a regular file, such as {tmp_path}/vnode.yml",
        str(fifo): "is a FIFO; expected a regular file",
        "/dev/zero": "is a device; expected a regular file",
        str(tmp_path / "large"): "is larger than 65536 bytes; expected a manifest",
        "a\0b": "cannot be opened: embedded null byte; expected",
    }
    for path, message in cases.items():
        with pytest.raises(ManifestError) as caught:
            Manifest.load(path)
        assert str(caught.value).startswith(f"{path}: {message}")
    assert Manifest.load(tmp_path / "cut.yml").name == "net-bridge"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "vnode.yml"
    path.write_text(BASE)
    path.chmod(0)
    with pytest.raises(ManifestError, match="cannot be opened: Permission denied"):
        Manifest.load(path)


def test_reading_leaves_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_text("[")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in (tmp_path, tmp_path / "bad.yml", EXAMPLE, tmp_path / "none"):
        try:
            Manifest.load(path)
        except ManifestError:
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# Whatever is in the file, it is a manifest or a ManifestError

SNIPPETS = [
    *"\t\n :-[]{}\"'#&*!|>%@`,?\\~<=",
    *[
        "---",
        "...",
        "- ",
        ": ",
        "\n  ",
        "<<",
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "%YAML 9.9\n",
        '"\\UFFFFFFFF"',
    ],
    *["0x_", "1:2:3", "\ufeff", "\ud7ff", "\u202e", "\0", "\x85", "CAP_IRQ_REGISTER: msix", "mounts: [{path: /a}, /a]"],
]
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.sampled_from(SNIPPETS) | st.text(max_size=8)),
    min_size=1,
    max_size=6,
)


def judge(data: bytes) -> None:
    try:
        manifest = Manifest.parse(data, "vnode.yml")
    except ManifestError as error:
        for problem in error.problems:
            assert str(problem).isprintable()
            assert problem.line is None or 1 <= problem.line <= len(data) + 1
        json.dumps(error.as_dict())
    else:
        assert Manifest.from_dict(json.loads(json.dumps(manifest.as_dict()))) == manifest
        assert check.summary(manifest).replace("\n", "").isprintable()


@pytest.mark.thorough
@settings(max_examples=300, deadline=None)
@given(edits)
def test_mutations_of_the_example_raise_nothing_else(changes: list[tuple[float, int, str]]) -> None:
    text = EXAMPLE.read_text()
    for where, cut, snippet in changes:
        at = int(where * len(text))
        text = text[:at] + snippet + text[at + cut :]
    judge(text.encode(errors="replace"))


@pytest.mark.thorough
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
@example(b"\xff\xfe\x00")
@example(b"%YAML " + b"9" * 5000 + b".1\n---\na: b\n")
@example(b"? ? ? ? a")
@example(b"a: !<tag:x,2000:y> b")
def test_arbitrary_bytes_raise_nothing_else(data: bytes) -> None:
    judge(data)


scalars = st.none() | st.booleans() | st.integers(-5, 300) | st.floats(allow_nan=False) | st.text(max_size=6)
words = st.sampled_from(["msix", "ro", "path", "/a", "drops", "CAP_DMA_ALLOC", "CAP_MEM_SHARE", "CAP_IRQ_REGISTER"])
flat = scalars | words
nested = st.dictionaries(words, flat | st.dictionaries(words, flat, max_size=1), max_size=2)
values = flat | nested | st.lists(flat | nested, max_size=3)


@pytest.mark.thorough
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_wrong_value_anywhere_is_told_of_or_in_the_schema_too(data: st.DataObject) -> None:
    """What the checker accepts, the published JSON Schema accepts."""
    tree = yaml.safe_load(EXAMPLE.read_text())
    section = data.draw(st.sampled_from(sorted(tree)))
    if isinstance(tree[section], dict):
        tree[section][data.draw(st.sampled_from(sorted(tree[section])))] = data.draw(values)
    else:
        tree[section][data.draw(st.integers(0, len(tree[section]) - 1))] = data.draw(values)
    text = yaml.safe_dump(tree, allow_unicode=True).encode()
    judge(text)
    try:
        Manifest.parse(text, "vnode.yml")
    except ManifestError:
        return
    SCHEMA(tree)


# The JSON Schema

SCHEMA = fastjsonschema.compile(json_schema.document())


def test_published_schema_is_up_to_date() -> None:
    published = (REPOSITORY / "docs/vnode.schema.json").read_text()
    assert published == json_schema.text(), "write it anew: netbridge check --schema > docs/vnode.schema.json"


@pytest.mark.parametrize("path", [EXAMPLE])
def test_schema_accepts_the_example(path: Path) -> None:
    SCHEMA(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        granting("- CAP_IRQ_REGISTER: msix", "- CAP_MEM_SHARE: ro", "- CAP_HARDWARE_IO_PCI: '00:1f.0'"),
        granting("- CAP_IRQ_REGISTER: {msix: 3}", "- CAP_MEM_SHARE"),
        BASE + "storage:\n  mounts: [/a, {path: /b, access: rw}]\nobservability:\n  metrics: [drops]\n",
    ],
)
def test_schema_and_checker_accept(text: str) -> None:
    parse(text)
    SCHEMA(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        granting("- CAP_DMA_ALLOC: 1"),
        granting("- CAP_IRQ_REGISTER"),
        granting("- CAP_IRQ_REGISTER: 256"),
        granting("- CAP_IRQ_REGISTER: {msix: 0}"),
        granting("- CAP_IRQ_REGISTER: msi"),
        granting("- CAP_MEM_SHARE: rw"),
        granting("- CAP_HARDWARE_IO_PCI: '00:20.0'"),
        granting("- CAP_DMA_ALLOC", "- CAP_DMA_ALLOC"),
        granting("- {CAP_IRQ_REGISTER: 1, CAP_MEM_SHARE: ro}"),
        granting("- CAP_NONE"),
        BASE.replace("16", "0"),
        BASE.replace("net-bridge", "Net"),
        BASE + "other: 1\n",
        BASE + "storage:\n  mounts: [/]\n",
        BASE + "storage:\n  mounts: [/a/../b]\n",
        BASE + "observability:\n  metrics: [none]\n",
        BASE.replace("16\n", "16\n  max_cpu_share: 0\n"),
        "vnode: {}\n",
    ],
)
def test_schema_and_checker_refuse(text: str) -> None:
    errors(text)
    with pytest.raises(fastjsonschema.JsonSchemaValueException):
        SCHEMA(yaml.safe_load(text))


# What the grants do

HELD = Capabilities(
    network=True,
    pci_function=PciAddress.parse("00:1f.0"),
    irq=Intx(11),
    dma=True,
    dma_budget=16 * MIB,
    mem_share="ro",
    manifest="vnode.yml",
    line=12,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_capability_is_refused_by_name_and_held_when_granted(kind: names.Kind) -> None:
    with pytest.raises(CapabilityMissing) as caught:
        Capabilities(manifest="vnode.yml", line=12).require(kind.name, "doing this")
    assert caught.value.exit_code == 3
    assert (caught.value.capability, caught.value.purpose) == (kind.name, "doing this")
    assert str(caught.value) == (
        f"vnode.yml:12: {kind.name} is not granted, and doing this needs it; "
        f"to grant it, add the line `{kind.line}` under `capabilities:`"
    )
    granted = parse(granting(kind.line)).capabilities
    granted.require(kind.name, "doing this")
    assert granted.names() == (kind.name,)


def test_default_grants_nothing() -> None:
    assert Capabilities().names() == ()
    with pytest.raises(CapabilityMissing, match=r"^the manifest: CAP_DMA_ALLOC is not granted"):
        Capabilities().require_dma(0, "nothing")


def test_a_capability_there_is_not_is_a_mistake_of_the_program() -> None:
    with pytest.raises(KeyError):
        HELD.require("CAP_DMA", "nothing")


def test_pci_function_is_the_granted_one() -> None:
    HELD.require_pci_function(PciAddress.parse("0000:00:1f.0"), "opening the NIC")
    with pytest.raises(CapabilityExceeded) as caught:
        HELD.require_pci_function(PciAddress.parse("00:03.0"), "opening the NIC")
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "vnode.yml:12: opening the NIC asks for the PCI function 0000:00:03.0, but CAP_HARDWARE_IO_PCI grants "
        "0000:00:1f.0 and no other; change the manifest if this is what it should allow"
    )
    with pytest.raises(CapabilityMissing, match=re.escape('`- CAP_HARDWARE_IO_PCI: "0000:00:03.0"`')):
        Capabilities().require_pci_function(PciAddress.parse("00:03.0"), "opening the NIC")


def test_intx_is_the_granted_line() -> None:
    HELD.require_intx(11, "enabling INTx")
    with pytest.raises(CapabilityExceeded, match="asks for INTx line 10, but CAP_IRQ_REGISTER grants INTx line 11;"):
        HELD.require_intx(10, "enabling INTx")
    with pytest.raises(CapabilityExceeded, match="asks for INTx line 11, but CAP_IRQ_REGISTER grants MSI-X with 11 v"):
        HELD._replace(irq=Msix(11)).require_intx(11, "enabling INTx")
    with pytest.raises(CapabilityMissing, match="`- CAP_IRQ_REGISTER: 11`"):
        Capabilities().require_intx(11, "enabling INTx")


def test_msix_is_for_so_many_vectors() -> None:
    HELD._replace(irq=Msix()).require_msix(2048, "enabling MSI-X")
    HELD._replace(irq=Msix(3)).require_msix(3, "enabling MSI-X")
    with pytest.raises(CapabilityExceeded, match=r"asks for MSI-X with 4 vectors, but .* grants MSI-X with 3 vectors;"):
        HELD._replace(irq=Msix(3)).require_msix(4, "enabling MSI-X")
    with pytest.raises(CapabilityExceeded, match=r"asks for MSI-X with 1 vector, but .* grants INTx line 11;"):
        HELD.require_msix(1, "enabling MSI-X")
    with pytest.raises(CapabilityMissing, match="`- CAP_IRQ_REGISTER: msix`"):
        Capabilities().require_msix(1, "enabling MSI-X")


def test_dma_stays_within_its_budget() -> None:
    HELD.require_dma(16 * MIB, "allocating the DMA pool")
    with pytest.raises(CapabilityExceeded, match=re.escape("16777216 bytes (runtime.required_mem_mb: 16)")):
        HELD.require_dma(16 * MIB + 1, "allocating the DMA pool")


def test_manifest_travels_as_json() -> None:
    written = granting("- CAP_IRQ_REGISTER: {msix: 3}", "- CAP_MEM_SHARE: ro", "- CAP_LOG_WRITE", "- NetworkAccess")
    for manifest in (Manifest.find("net-bridge"), parse(BASE), parse(written + "storage: {mounts: [/a]}\n")):
        back = Manifest.from_dict(json.loads(json.dumps(manifest.as_dict())))
        assert back == manifest
        assert type(back.capabilities.irq) is type(manifest.capabilities.irq)
        assert all(isinstance(mount, Mount) for mount in back.mounts)


# `netbridge check`


def run_check(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return check.main(parser.parse_args(arguments))


def test_check_of_a_good_manifest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check("net-bridge") == ExitCode.OK
    out, err = capsys.readouterr()
    assert err == ""
    assert (
        out
        == f"""\
{EXAMPLE}: net-bridge 0.1.0, nothing wrong

capabilities
  NetworkAccess        yes           opening a network device at all
  CAP_HARDWARE_IO_PCI  0000:00:1f.0  the VFIO device of exactly this PCI function
  CAP_IRQ_REGISTER     INTx line 11  interrupts of that function, through VFIO eventfds
  CAP_DMA_ALLOC        16 MiB        pinned memory mapped in the IOMMU, within runtime.required_mem_mb
  CAP_MEM_SHARE        read-write    passing the frame memory to the service, as file descriptors over the port
  CAP_SYSCALL_RAW      yes           raw reads and writes of config space and BARs: the debug verbs
  CAP_LOG_WRITE        no            nothing is logged but the error that ends the process

limits
  mode                 strict
  memory               16 MiB, DMA pool included
  CPU                  5 % of one CPU
  file system          nothing
  features off         none
  TX headers           apart, out of the service's reach
  metrics              packets_rx, packets_tx, irq_latency_ns
"""
    )


def test_check_is_loud_about_permissive_and_tells_mounts() -> None:
    manifest = parse(BASE + "storage: {mounts: [/a, {path: /b, access: rw}]}\n")
    text = check.summary(manifest._replace(mode="permissive"))
    assert "permissive: THE PROCESS IS NOT CONFINED" in text
    assert '"/a" (read-only), "/b" (read-write)' in text


def test_check_of_a_bad_manifest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "vnode.yml"
    path.write_text(BASE.replace("16", "0") + "x: 1\n")
    assert run_check(str(path)) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(": ")[0] for line in err.splitlines()] == [f"{path}:6:20", f"{path}:9:1"]


def test_check_in_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_check("--json", "net-bridge") == 0
    good = json.loads(capsys.readouterr().out)
    assert good == {"ok": True, "file": str(EXAMPLE), "manifest": Manifest.find("net-bridge").as_dict()}

    path = tmp_path / "vnode.yml"
    path.write_text(BASE.replace("DMA_ALLOC", "DMA_ALOC"))
    assert run_check("--json", str(path)) == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "ok": False,
        "file": str(path),
        "problems": [
            {
                "line": 8,
                "column": 5,
                "key": "capabilities[0]",
                "what": 'unknown capability "CAP_DMA_ALOC"',
                "expected": CAPABILITIES,
                "suggestion": "CAP_DMA_ALLOC",
            }
        ],
    }


def test_check_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check("--schema") == 0
    assert capsys.readouterr().out == json_schema.text()


@pytest.mark.parametrize("arguments", [[], ["--schema", "net-bridge"]])
def test_check_wants_one_thing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_check(*arguments)
    assert caught.value.code == 2


# Words


def test_nearest() -> None:
    assert nearest("packets_xr", ("packets_rx", "packets_tx")) == "packets_rx"
    assert nearest("zzz", ("packets_rx", "packets_tx")) is None
    assert nearest("a" * 65, ("a" * 64,)) is None


def test_show_is_safe_to_print() -> None:
    assert show('a"b\\c\n\x1b\u202e\ud800é') == '"a\\"b\\\\c\\n\\x1b\\u202e\\ud800é"'
    assert show("x" * 60) == '"' + "x" * 60 + '"'
    assert show("x" * 61) == '"' + "x" * 57 + '..."'


# Metrics


def test_every_metric_that_can_be_named_is_counted_and_every_counter_can_be_named() -> None:
    header = (REPOSITORY / "netbridge/datapath/core/api.h").read_text()
    (body,) = re.findall(r"^struct nb_counters \{(.*?)^\};", header, re.DOTALL | re.MULTILINE)
    counted = re.findall(r"^ *(?:uint64_t|struct nb_histogram) (\w+)", body, re.MULTILINE)
    assert list(METRIC_NAMES) == [name for name in counted if name not in ("magic", "size", "exported")]


# What the driver process has in memory


def test_driver_side_imports_no_yaml_and_nothing_heavy() -> None:
    program = f"""\
import sys
sys.path[:0] = {[str(REPOSITORY), *sys.path]!r}
before = set(sys.modules)
import netbridge.vnode.capabilities, netbridge.vnode.manifest
heavy = {{"yaml", "dataclasses", "typing", "inspect", "pathlib", "netbridge.vnode.loading"}}
print(*sorted(heavy & set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# The document

DOCUMENT = (REPOSITORY / "docs/manifest.md").read_text()


def test_documented_example_is_a_manifest() -> None:
    examples = re.findall(r"```yaml\n(vnode:.*?)```", DOCUMENT, re.DOTALL)
    assert len(examples) == 1
    assert parse(examples[0]).capabilities.irq == Msix(3)


def test_document_has_every_key_capability_metric_and_exit_code() -> None:
    for key in MANIFEST.keys:
        paths = [f"{key.name}.{k.name}" for k in key.shape.keys] if isinstance(key.shape, Section) else [key.name]
        for path in paths:
            assert f"| `{path}` |" in DOCUMENT
    for kind in KINDS:
        (row,) = [line for line in DOCUMENT.splitlines() if line.startswith(f"| `{kind.name}` |")]
        told = row.replace("`", "")
        assert f"| {kind.allows} | {kind.without} |" in told
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.kind} | {metric.unit} | {metric.tells} |" in DOCUMENT
    for name, code in vars(ExitCode).items():
        if not name.startswith("_"):
            assert f"\n| {code} | " in DOCUMENT


def test_documented_errors_are_the_real_ones() -> None:
    told = set(re.findall(r"^vnode\.yml:\d+:\d+: (.*)$", DOCUMENT, re.MULTILINE))
    real = errors(BASE.replace("required_mem_mb", "required_mem")) + errors(
        granting("- NetworkAccess", "- CAP_MEM_SHARE", "- CAP_LOG_WRITE", "- CAP_DMA")
    )
    assert told == {line.partition(": ")[2] for line in real}
    with pytest.raises(CapabilityMissing) as caught:
        Capabilities(manifest="vnode.yml", line=12).require(names.DMA, "allocating the DMA pool")
    assert f"\n{caught.value}\n" in DOCUMENT


def test_problem_without_its_parts_is_still_a_sentence() -> None:
    error = ManifestError("f", (Problem(None, None, "", "is wrong"),))
    assert str(error) == "f: is wrong"
    with pytest.raises(ValueError, match="at least one"):
        ManifestError("f", ())


def test_schema_data_is_frozen() -> None:
    shape: Any = MANIFEST
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape.keys = ()
