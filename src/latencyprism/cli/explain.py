"""Say in words what a capture holds: what alerted, what was expected, where the excess is, and why; or where
the time of a request went."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latencyprism.cli import explain_export
from latencyprism.diagnose.artefact import judge, read_folder
from latencyprism.errors import BadInput
from latencyprism.faces import request_words, story
from latencyprism.faces.contrast import contrast
from latencyprism.faces.report import write_report
from latencyprism.recorder import Capture, read_capture
from latencyprism.records import Step
from latencyprism.sentinel.finish import finish

NAME = "explain"
HELP = "say in words what a capture holds"


FORMATS = ("capture", "latencyprism-artefact")
_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "capture", metavar="CAPTURE", type=Path,
        help="a file that watch or record wrote; with --format latencyprism-artefact a folder of tables",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=(*FORMATS, *explain_export.FORMATS), default="capture", metavar="FORMAT",
        help="latencyprism-artefact: read tables of operations and counters of a normal and an abnormal "
        "period; " + ", ".join(explain_export.FORMATS) + ": write the capture so, instead of words",
    )  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", help="everything about step N and the spans in it")
    parser.add_argument(
        "--request",
        metavar="ID",
        help="where the time of one request went: the id its client or the engine knows, or a hash as listed",
    )
    parser.add_argument(
        "--slowest",
        type=_count,
        metavar="N",
        help="the N slowest requests in full, and as many slow steps (default: 5 of each, in short)",
    )
    parser.add_argument(
        "--again", action="store_true",
        help="work the verdict out again from the records, and say whether it is the one in the capture",
    )  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML report, readable offline")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of words")
    explain_export.add_arguments(parser)


def _count(text: str) -> int:
    if not text.isdigit() or len(text) > 6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of requests and steps")
    return int(text)


def run(args: argparse.Namespace) -> int:
    if args.format == "latencyprism-artefact":
        return _tell_artefact(args)
    exported = args.format in explain_export.FORMATS
    if args.output is not None and not exported:
        raise BadInput("nothing to write to -o", remedy="say in which format with --format")
    capture = read_capture(args.capture)
    if exported:
        return explain_export.run(args, capture)
    if args.report is not None:
        write_report(args.report, capture, capture_path=args.capture)
    if args.step is not None:
        _tell_step(capture, args.step, args.json)
    elif args.request is not None:
        _tell_request(capture, args.request, args.json)
    elif args.again:
        return _diagnose_again(capture, args.json)
    elif args.json:
        print(json.dumps(_as_json(capture, _SHOWN if args.slowest is None else args.slowest), default=str))
    else:
        count = _SHOWN if args.slowest is None else args.slowest
        print("\n".join(story.tell(capture, str(args.capture), count, whole=args.slowest is not None)))
    return 0


def _diagnose_again(capture: Capture, as_json: bool) -> int:
    """1 if it comes out differently, as it does when the signatures have changed since."""
    if not isinstance(capture.meta.get("onset_ns"), int):
        raise BadInput("there is nothing to diagnose", "no alert says where the trouble began")
    stored = capture.verdict.to_dict() if capture.verdict is not None else None
    again = finish(capture).verdict
    assert again is not None
    same = stored == json.loads(json.dumps(again.to_dict()))
    if as_json:
        print(json.dumps(_finite({"verdict": again.to_dict(), "same": same})))
    else:
        print("\n".join(story.tell_verdict(again)))
        print("the same as in the capture" if same else "NOT the same as in the capture")
    return 0 if same else 1


def _tell_artefact(args: argparse.Namespace) -> int:
    """A Verdict on two periods of somebody else's recording."""
    for option in ("step", "request", "slowest", "report", "again"):
        if getattr(args, option) not in (None, False):
            raise BadInput(f"--{option} does not go with --format latencyprism-artefact", "it has no steps")
    verdict = judge(read_folder(args.capture))
    if args.json:
        print(json.dumps(_finite(verdict.to_dict())))
    else:
        print("\n".join(story.tell_verdict(verdict)))
    return 0


def _tell_request(capture: Capture, wanted: str, as_json: bool) -> None:
    found = request_words.find(capture, wanted)
    if not found:
        why = (
            f"it holds the {len(capture.requests)} requests that ended in it, none that was still under way"
            if capture.requests
            else "it holds no requests: none ended in it, or those of this engine are not observed"
        )
        raise BadInput(f"request {wanted!r:.120} is not in the capture", why, "list some with --slowest 20")
    stories = request_words.stories(capture, found)
    if as_json:
        print(json.dumps(_finite([request_words.as_json(told) for told in stories])))
    else:
        print("\n".join(line for told in stories for line in request_words.tell(told)))


def _tell_step(capture: Capture, number: int, as_json: bool) -> None:
    found = [step for step in capture.steps if step.step == number]
    if not found:
        held = [step.step for step in capture.steps]
        why = f"it holds steps {min(held)} to {max(held)}" if held else "it holds no steps"
        raise BadInput(f"step {number} is not in the capture", why)
    if as_json:
        spans = [
            s for s in capture.spans if any(s.start_ns < f.end_ns and s.end_ns > f.start_ns for f in found)
        ]
        told = {
            "steps": [step._asdict() for step in found],
            "spans": [span._asdict() for span in spans],
            "parts": story.parts_of_step(capture, number),
        }
        print(json.dumps(_finite(told)))
    else:
        print("\n".join(story.tell_step(capture, number)))


def _as_json(capture: Capture, count: int) -> Any:
    compared = contrast(capture.steps, capture.alerts[0]) if capture.alerts else None
    return _finite(
        {
            "meta": capture.meta,
            "steps": len(capture.steps),
            "spans": len(capture.spans),
            "counters": len(capture.counters),
            "alerts": [asdict(alert) for alert in capture.alerts],
            "verdict": capture.verdict.to_dict() if capture.verdict else None,
            "contrast": asdict(compared) if compared else None,
            "requests": len(capture.requests),
            "slowest_requests": [
                request_words.as_json(told) for told in request_words.slowest(capture, count)
            ],
            "slowest": [_slow(step, expected) for step, expected in story.slowest(capture, count)],
            "notices": capture.notices,
        }
    )


def _slow(step: Step, expected: float | None) -> dict[str, Any]:
    return {**step._asdict(), "duration_ms": step.duration_ms, "expected_ms": expected}


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is none is null."""
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
