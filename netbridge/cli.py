"""The `netbridge` command.

Modules that a verb needs are imported by that verb: `check` runs where the C core was never built, and the driver
process loads no more than it uses.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import signal
import sys
from collections.abc import Callable, Sequence

from netbridge.errors import ExitCode, NetbridgeError, UsageError
from netbridge.log import Log
from vfio.errors import VfioError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RUN_DIRECTORY = "/run/netbridge"
SERVICE_USER = "aethernet"

_DESCRIPTION = (
    "A user-space driver for virtio-net: claims a PCI function through Linux VFIO and hands every frame, without a "
    "copy, to the network stack in another process."
)
_EXIT_CODES = """\
exit codes:
  0  done, or stopped by SIGTERM
  1  something else went wrong
  2  the command line or the manifest is wrong
  3  the manifest does not grant what was asked for
  4  the device, VFIO or the IOMMU
  5  the port to the service
  6  the process could not be confined as the manifest asks
  130  stopped by Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. Everything a user can do wrong ends in one message on stderr."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        return int(options.verb(options))
    except NetbridgeError as error:
        return _failed(error, error.exit_code)
    except VfioError as error:
        return _failed(error, ExitCode.DEVICE)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not complain about it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILURE


def _failed(error: Exception, code: int) -> int:
    for line in (str(error), *getattr(error, "__notes__", ())):
        print(f"netbridge: {line}", file=sys.stderr)
    return code


class _Verb(argparse.ArgumentParser):
    """A verb, whose arguments are defined when it is called: a start does not wait for the modules of other verbs.
    argparse makes verbs below a verb of the same class: without `define`, since whoever makes them defines them."""

    def __init__(self, *, define: Callable[[argparse.ArgumentParser], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._define = define

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        define, self._define = self._define, None
        if define:
            define(self)
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="netbridge",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=_Verb)
    for name, define, what in (
        ("run", _add_run, "claim the manifest's function and serve its port until stopped"),
        ("check", _add_check, "check a manifest and show what it grants"),
        ("stats", _add_stats, "show the counters of a running driver"),
        ("features", _add_features, "show what a running driver and its device have agreed on"),
        ("top", _add_top, "show what a running driver does, refreshed"),
        ("exporter", _add_exporter, "export a running driver's counters to Prometheus"),
        ("capture", _add_capture, "take the port and write its frames to a pcapng file"),
        ("tap", _add_tap, "put the Linux stack behind the port, through a TAP device"),
        ("debug", _add_debug, "read and write a function's registers raw (needs CAP_SYSCALL_RAW)"),
        ("restore", _add_restore, "give functions that a crashed driver left behind to their own driver"),
    ):
        verbs.add_parser(name, help=what, define=define)
    return parser


# ---- run ------------------------------------------------------------------------------------------------------------


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Claims the PCI function that the manifest names and serves its port until SIGTERM, Ctrl-C or an unplug; then "
        "resets the device and gives it back to the driver it had. Needs root, but not with --vhost-user."
    )
    parser.add_argument("manifest", help="a vnode.yml, or the name of one that comes with the package (net-bridge)")
    parser.add_argument("--pci", metavar="ADDRESS", help="refuse to start unless the manifest names this function")
    parser.add_argument("--socket", metavar="PATH", help="where the service finds the port (default: %(default)s)")
    parser.add_argument(
        "--service-uid",
        metavar="USER",
        action="append",
        help=f"user name or uid that may connect; may be repeated (default: {SERVICE_USER}, if there is such a user)",
    )
    parser.add_argument(
        "--driver-user",
        metavar="USER",
        help="user name or uid that the driver process runs as in mode strict (default: netbridge, if there is such a "
        "user, else a uid that nobody has)",
    )
    parser.add_argument("--counters", metavar="PATH", help="the counters page (default: beside the socket)")
    for direction, what in (("rx", "receive"), ("tx", "send")):
        parser.add_argument(
            f"--{direction}-buffers",
            metavar="N",
            type=_buffers,
            help=f"{what} buffers of 2 KiB; of 4 KiB, half as many, with segmentation offload (default: %(default)s)",
        )
    parser.add_argument(
        "--spin-us",
        metavar="µs",
        type=_microseconds,
        help="poll this long after the last frame before sleeping (default: %(default)s)",
    )
    parser.add_argument(
        "--queue-pairs",
        metavar="N",
        type=_pairs,
        help="use so many receive and transmit queues, if the device has as many (default: %(default)s)",
    )
    parser.add_argument(
        "--stall-ms",
        metavar="MS",
        type=_milliseconds,
        help="reset a device that has frames to send and sends none for so long; 0: never (default: %(default)s)",
    )
    parser.add_argument(
        "--queue-reset",
        action="store_true",
        help="of such a device reset the one queue first, if it can (RING_RESET); not on QEMU 7.2, which then aborts "
        "when its wire is full",
    )
    parser.add_argument(
        "--without",
        metavar="FEATURE",
        action="append",
        help="do not use a virtio feature, such as MRG_RXBUF; may be repeated, and adds to those of the manifest",
    )
    parser.add_argument(
        "--interface", choices=("auto", "group", "iommufd"), help="which VFIO interface (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the final counters as JSON on stdout")
    process = parser.add_argument_group(
        "a device that is another process",
        "For development without root and VFIO: a vhost-user back-end, such as DPDK's net_vhost, in the place of the "
        "PCI function. Manifest, port and services are the same, but the manifest's function and interrupt are not "
        "used, and the driver is not confined.",
    )
    process.add_argument("--vhost-user", metavar="PATH", help="the back-end's socket")
    process.add_argument(
        "--vhost-user-listen", action="store_true", help="listen at PATH; the back-end connects (DPDK: client=1)"
    )
    process.add_argument("--mac", metavar="ADDRESS", help="the device's MAC address (default: one is made up)")
    process.add_argument(
        "--back-end-timeout",
        metavar="SECONDS",
        type=_seconds,
        help="how long to wait for a back-end that is not there, or went away (default: %(default)g)",
    )
    parser.set_defaults(
        verb=_run,
        back_end_timeout=30.0,
        socket=f"{RUN_DIRECTORY}/aethernet.sock",
        rx_buffers=1024,
        tx_buffers=512,
        spin_us=0,
        queue_pairs=1,
        stall_ms=5000,
        interface="auto",
        without=[],
    )


def _run(options: argparse.Namespace) -> int:
    from netbridge.bridge import Stop
    from netbridge.session import Settings
    from netbridge.vnode import monitor
    from netbridge.vnode.manifest import Manifest
    from netbridge.vnode.options import Options
    from vfio.pci import PciAddress

    if options.vhost_user is None and (options.vhost_user_listen or options.mac):
        raise UsageError("--vhost-user-listen and --mac are for a device given with --vhost-user PATH")
    manifest = Manifest.open(options.manifest)
    granted = manifest.capabilities
    settings = Settings(
        rx_buffers=options.rx_buffers,
        tx_buffers=options.tx_buffers,
        spin_us=options.spin_us,
        queue_pairs=options.queue_pairs,
        stall_ms=options.stall_ms,
        queue_reset=options.queue_reset,
        rx_read_only=granted.mem_share == "ro",
        tx_header_with_frame=manifest.tx_header == "with-frame",
        share=granted.mem_share is not None,
    )
    counters_path = options.counters or f"{options.socket}.counters"
    service_uids = _service_uids(options.service_uid)
    log = Log(granted.log)
    if options.vhost_user is not None:
        from netbridge import vhost

        outcome = vhost.run(
            manifest,
            vhost.Options(
                path=options.vhost_user,
                listen=options.vhost_user_listen,
                mac=vhost.parse_mac(options.mac) if options.mac else None,
                patience_seconds=options.back_end_timeout,
                socket_path=options.socket,
                counters_path=counters_path,
                service_uids=service_uids,
                without_features=options.without,
                settings=settings,
            ),
            log,
            _warn,
        )
    else:
        outcome = monitor.run(
            manifest,
            Options(
                pci=PciAddress.parse(options.pci) if options.pci else None,
                socket_path=options.socket,
                counters_path=counters_path,
                service_uids=service_uids,
                driver_user=options.driver_user,
                without_features=options.without,
                interface=options.interface,
                settings=settings,
            ),
            log,
            _warn,
        )
    if options.json:
        print(json.dumps(outcome.counters))
    if outcome.why is Stop.UNPLUG:
        print("netbridge: the device was taken away (unplugged, or unbound from vfio-pci)", file=sys.stderr)
        return ExitCode.DEVICE
    return ExitCode.INTERRUPTED if outcome.signal == signal.SIGINT else ExitCode.OK


def _warn(text: str) -> None:
    print(f"netbridge: warning: {text}", file=sys.stderr, flush=True)


def _service_uids(names: list[str] | None) -> list[int]:
    uids = []
    for name in names or [SERVICE_USER]:
        if name.isdecimal():
            uids.append(int(name))
            continue
        try:
            uids.append(pwd.getpwnam(name).pw_uid)
        except KeyError:
            hint = "name the service's user with --service-uid" if not names else "name one that there is, or a uid"
            raise UsageError(f"there is no user {name}; {hint}") from None
    return uids


def _pairs(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 8):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of queue pairs from 1 to 8")
    return int(text)


def _milliseconds(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 3_600_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds from 0 to 3600000")
    return int(text)


def _buffers(text: str) -> int:
    if not (text.isdecimal() and 2 <= int(text) <= 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of buffers from 2 to 65536")
    return int(text)


def _microseconds(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of microseconds from 0 to 1000000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, at most 86400")
    return seconds


# ---- check, stats, debug, restore ----------------------------------------------------------------------------------


def _add_check(parser: argparse.ArgumentParser) -> None:
    from netbridge.vnode import check

    check.add_arguments(parser)
    parser.set_defaults(verb=check.main)


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.description = "Reads the counters page of a running driver, without disturbing it."
    _add_counters(parser)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(verb=_stats)


def _stats(options: argparse.Namespace) -> int:
    from netbridge import metrics

    counters = metrics.read(options.counters)
    if options.json:
        print(json.dumps(counters))
        return ExitCode.OK
    for name, value in counters.items():
        if not isinstance(value, dict):
            print(f"{name:<26} {value}")
        elif any(isinstance(inner, dict) for inner in value.values()):
            for stage, numbers in value.items():
                print(f"{name + '.' + stage:<26} " + "  ".join(f"{key} {number}" for key, number in numbers.items()))
        elif any(value.values()):
            print(f"{name:<26} " + "  ".join(f"{label} {number}" for label, number in value.items() if number))
        else:
            print(f"{name:<26} 0")
    return ExitCode.OK


def _add_features(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows what the device of a running driver offers, what the driver wants of it, what both have agreed on, and "
        "why not the rest; from the counters page, without disturbing the driver and without special rights. Turn a "
        "feature off with `netbridge run --without FEATURE`, or with device.without in the manifest."
    )
    _add_counters(parser)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument(
        "--known", action="store_true", help="show which features this driver knows and wants; needs no running driver"
    )
    parser.set_defaults(verb=_features)


def _features(options: argparse.Namespace) -> int:
    if options.known:
        from netbridge.virtio import features

        print(json.dumps(features.known_as_dict()) if options.json else features.known_table())
        return ExitCode.OK
    from netbridge import device_state

    state = device_state.read(options.counters)
    print(json.dumps(state.as_dict()) if options.json else state)
    return ExitCode.OK


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows rates and latencies from a driver's counters page, without disturbing it: the metrics that its manifest "
        "lists. Ends with Ctrl-C."
    )
    _add_counters(parser)
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_seconds, default=1.0, help="between two readings (%(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="two readings, and end")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.set_defaults(verb=_top)


def _top(options: argparse.Namespace) -> int:
    from netbridge import top

    return top.main(options)


def _add_exporter(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Exports the metrics that a driver's manifest lists, read from its counters page at each scrape, without "
        "disturbing it. Needs prometheus_client, and no rights."
    )
    _add_counters(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--listen", metavar="ADDRESS:PORT", default="127.0.0.1:9117", help="serve HTTP there (%(default)s; port 0: any)"
    )
    how.add_argument(
        "--textfile", metavar="FILE", help="write a file for the node exporter's textfile collector, and end"
    )
    how.add_argument("--print", action="store_true", help="print them once, and end")
    parser.set_defaults(verb=_exporter)


def _exporter(options: argparse.Namespace) -> int:
    from netbridge import exporter

    return exporter.main(options)


def _add_counters(parser: argparse.ArgumentParser) -> None:
    default = f"{RUN_DIRECTORY}/aethernet.sock.counters"
    parser.add_argument("--counters", metavar="PATH", default=default, help="the counters page (default: %(default)s)")


def _add_capture(parser: argparse.ArgumentParser) -> None:
    from netbridge.services import arguments

    arguments.capture(parser)
    parser.set_defaults(verb=_capture)


def _capture(options: argparse.Namespace) -> int:
    from netbridge.services import capture

    return capture.main(options)


def _add_tap(parser: argparse.ArgumentParser) -> None:
    from netbridge.services import arguments

    arguments.tap(parser)
    parser.set_defaults(verb=_tap)


def _tap(options: argparse.Namespace) -> int:
    from netbridge.services import tap

    return tap.main(options)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    from netbridge import debug

    debug.add_arguments(parser)
    parser.set_defaults(verb=debug.main)


def _add_restore(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Gives PCI functions that a killed driver left bound to vfio-pci back to the driver they had. Needs root."
    )
    parser.add_argument("address", nargs="*", help="the functions; all that were left behind when none is named")
    parser.set_defaults(verb=_restore)


def _restore(options: argparse.Namespace) -> int:
    import vfio

    addresses = [vfio.PciAddress.parse(text) for text in options.address] or list(vfio.leftovers())
    for address in addresses:
        print(f"{address}: given back to {vfio.restore(address) or 'no driver, as before'}")
    if not addresses:
        print("nothing was left behind")
    return ExitCode.OK
