"""``latencyprism inject``: disturb a process on purpose, in bounds, and say what was done."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap

from latencyprism import inject
from latencyprism.cli.options import duration_s
from latencyprism.errors import BadInput
from latencyprism.inject.needs import NEEDS

NAME = "inject"
HELP = "disturb a running engine on purpose, to see whether the cause is named"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cause", nargs="?", help="what to inject; --list shows all")
    parser.add_argument("-p", "--pid", type=int, help="the process to disturb")
    parser.add_argument("--strength", type=float, help="how much; what the number means depends on the cause")
    parser.add_argument(
        "-d", "--duration", type=duration_s, default=10.0, metavar="TIME", help="how long (default 10s)"
    )
    parser.add_argument("--stop-ms", type=float, help="peer.stalled: length of each stop")
    parser.add_argument(
        "--every-s", type=float, default=2.0, help="peer.stalled: from stop to stop (default 2)"
    )
    parser.add_argument("--directory", default=".", help="disk.stall: where to write (default: here)")
    parser.add_argument("--at", help="engine.tokenizer: the method to slow, as module:Class.method")
    parser.add_argument(
        "--url", help="workload.*, net.delay: where the engine answers, http://127.0.0.1:PORT"
    )
    parser.add_argument(
        "--reference-ms",
        type=float,
        default=100.0,
        metavar="MS",
        help="engine.tokenizer, net.delay: the time that --strength is a part of (default 100)",
    )
    parser.add_argument("--model", help="workload.*: the model's name (default: none is named)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=1024, metavar="N", help="workload.*: length (default 1024)"
    )
    parser.add_argument(
        "--lead-s",
        type=float,
        default=0.0,
        metavar="S",
        help="net.delay: seconds before and after in which it passes everything on at once (default 0)",
    )
    parser.add_argument("--device", type=int, default=0, metavar="N", help="xpu.*: number of the device")
    parser.add_argument(
        "--allow-device-settings",
        action="store_true",
        help="xpu.clock, xpu.power: change it, and put it back",
    )
    parser.add_argument("--i-know", action="store_true", help="disturb a process that this one did not start")
    parser.add_argument("--scenario", metavar="FILE", help="disturb as a TOML file says; see the manual page")
    parser.add_argument("--list", action="store_true", dest="catalogue", help="show the causes and end")
    parser.add_argument("--json", action="store_true", help="write JSON")


def run(args: argparse.Namespace) -> int:
    """0: it took effect; 1: it did not."""
    if args.catalogue:
        _print_catalogue(args.json)
        return 0
    if args.scenario is not None:
        # Imported here: it brings the lab with it.
        from latencyprism.cli import inject_scenario

        return inject_scenario.run(args)
    if args.cause is None or args.pid is None:
        raise BadInput("nothing to inject", "a cause and -p PID are needed", "--list shows the causes")
    injection = inject.start(
        args.cause,
        args.pid,
        args.strength,
        args.duration,
        i_know=args.i_know,
        stop_ms=args.stop_ms,
        every_s=args.every_s,
        directory=args.directory,
        at=args.at,
        url=args.url,
        reference_ms=args.reference_ms,
        model=args.model,
        prompt_tokens=args.prompt_tokens,
        lead_s=args.lead_s,
        device=args.device,
        allow_device_settings=args.allow_device_settings,
    )

    if injection.cause == "net.delay":
        print(f"clients: http://127.0.0.1:{injection.address()}", file=sys.stderr, flush=True)
    try:
        injection.wait()
    except KeyboardInterrupt:
        print("ended early", file=sys.stderr)
    finally:
        injection.stop()
    _print_outcome(injection, args.json)
    return 0 if injection.effect_check().effective else 1


def _print_catalogue(as_json: bool) -> None:
    entries = list(inject.CATALOGUE.values())
    if as_json:
        rows = [
            {
                "cause": e.cause,
                "how": e.how,
                "strength": e.strength,
                "default": e.default,
                "needs": NEEDS[e.cause].text,
                "missing": NEEDS[e.cause].missing(),
            }
            for e in entries
        ]
        print(json.dumps(rows))
        return
    for entry in entries:
        missing = NEEDS[entry.cause].missing()
        print(f"{entry.cause:<27}{'can work here' if missing is None else f'CANNOT WORK HERE: {missing}'}")
        for name, text in (
            ("how", entry.how),
            ("strength", f"{entry.strength} (default {entry.default})"),
            ("needs", NEEDS[entry.cause].text),
        ):
            lines = textwrap.wrap(text, 80)
            print(f"  {name:<25}{lines[0]}", *lines[1:], sep=f"\n{'':<27}")


def _print_outcome(injection: inject.Injection, as_json: bool) -> None:
    effect, truth = injection.effect_check(), injection.truth()
    if as_json:
        outcome = {
            "cause": injection.cause,
            "pid": injection.pid,
            "injector": os.getpid(),
            "helpers": injection.helper_pids,
            "effective": effect.effective,
            "measured": effect.measured,
            "asked": effect.asked,
            "unit": effect.unit,
            "text": effect.text,
            "intervals": [
                {"start_ns": each.start_ns, "end_ns": each.end_ns, "detail": each.detail} for each in truth
            ],
        }
        print(json.dumps(outcome))
        return
    outcome_word = "took effect" if effect.effective else "NO EFFECT"
    print(f"{injection.cause} on {injection.pid}: {outcome_word}: {effect.text}")
    for interval in truth:
        seconds = (interval.start_ns - injection.started_ns) / 1e9
        length_ms = (interval.end_ns - interval.start_ns) / 1e6
        print(f"  at {seconds:7.3f} s for {length_ms:9.1f} ms  {interval.detail}")
