"""Where the time of a request went, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from latencyprism.faces.wording import clean, ms
from latencyprism.recorder import Capture
from latencyprism.records import Request
from latencyprism.timeline.request_story import (
    BETWEEN,
    MATES,
    OTHERS_PREFILL,
    OWN,
    STALL,
    UNSEEN,
    Story,
    Stretch,
    Teller,
    request_hash,
)

# How engines make the id they know a request by from the one its client gave.
_FORMS = ("{}", "cmpl-{}-0", "cmpl-{}", "chatcmpl-{}")
_LOOKED_AT = 400
_LEAST_SHARE = 0.04

_MEANWHILE = {
    "runqueue_ns": "the engine's threads waited {} for a CPU",
    "throttled_ns": "its quota held it up for {}",
    "gc_ns": "Python's garbage collection took {}",
}
_IN_QUEUE = {
    OTHERS_PREFILL: "behind prompts of others",
    MATES: "while others decoded",
    STALL: "in steps that took longer than their work explains",
    BETWEEN: "with no step under way (on its way to the engine, or the engine was not free)",
    UNSEEN: "before the steps of this capture",
    OWN: "",
}
_IN_BATCH = {
    OWN: "own work",
    OTHERS_PREFILL: "prompts of others in the same steps",
    MATES: "decoding of others in the same steps",
    STALL: "longer than the work explains",
    BETWEEN: "between steps",
    UNSEEN: "in steps that are not in this capture",
}


def find(capture: Capture, wanted: str) -> list[Request]:
    """Requests of that hash (hexadecimal, as listed), or of that id in one of the forms engines give it."""
    hashes = set()
    if len(wanted) <= 16 and all(letter in "0123456789abcdef" for letter in wanted) and wanted:
        hashes.add(int(wanted, 16))
    key = capture.meta.get("request_key")
    if isinstance(key, str) and len(key) <= 128:
        try:
            raw = bytes.fromhex(key)
            hashes |= {request_hash(form.format(wanted), raw) for form in _FORMS}
        except ValueError:
            pass  # a key that is none: only hashes can be asked for
    return [one for one in capture.requests if one.request in hashes or one.client_request in hashes]


def stories(capture: Capture, requests: Sequence[Request]) -> list[Story]:
    """Where the time of these went, each from the steps of its own replica."""
    told = []
    tellers: dict[tuple[str, int], Teller] = {}
    for request in requests:
        whose = (request.engine, request.replica)
        if whose not in tellers:
            own_steps = [s for s in capture.steps if (s.engine, s.replica) == whose and s.rank == 0]
            own = [one for one in capture.requests if (one.engine, one.replica) == whose]
            tellers[whose] = Teller(own_steps, own)
        told.append(tellers[whose].tell(request))
    return told


def slowest(capture: Capture, count: int) -> list[Story]:
    """Those that lost most time to anything but their own work, of the longest."""
    longest = sorted(capture.requests, key=lambda one: -(one.e2e_ns or one.ttft_ns or 0))
    return sorted(stories(capture, longest[:_LOOKED_AT]), key=lambda story: -story.lost_ns)[:count]


def tell(story: Story) -> Iterator[str]:
    """One request: what it was, its first token, its stretches, its longest wait between tokens."""
    request = story.request
    yield f"request {name(request)}: {_what(request)}"
    yield f"  {first_token(story)}"
    for stretch in story.stretches:
        words = _IN_QUEUE if stretch.name == "queue" else _IN_BATCH
        if stretch.name == "output":
            yield f"  output {_length(stretch.ns)} from the end of its last step to its stream"
            continue
        count = "1 step" if stretch.steps == 1 else f"{stretch.steps} steps"
        steps = f" in {count}" if stretch.name != "queue" and stretch.steps else ""
        yield f"  {stretch.name} {_length(stretch.ns)}{steps}: {_parts(stretch, words)}{_meanwhile(stretch)}"
    yield from _pauses(story)


def _pauses(story: Story) -> Iterator[str]:
    request = story.request
    if request.preempted:
        yield f"  preempted {_times(request.preempted)}: its cache was given away and computed again"
    if story.largest_pause is not None:
        step, stretch = story.largest_pause
        yield (
            f"  longest wait for a token {_length(stretch.ns)}, ended by step {step.step}: "
            f"{_parts(stretch, _IN_BATCH)}{_meanwhile(stretch)}"
        )


def name(request: Request) -> str:
    """As ``find`` takes it."""
    return f"{request.request:x}"


def _what(request: Request) -> str:
    told = []
    if request.prompt_tokens is not None:
        cached = f" ({request.cached_tokens:,} cached)" if request.cached_tokens else ""
        told.append(f"prompt of {request.prompt_tokens:,} tokens{cached}")
    if request.output_tokens is not None:
        told.append(f"{request.output_tokens:,} output tokens")
    if request.finish_reason:
        told.append(clean(request.finish_reason, 20))
    if request.first_step is not None and request.last_step is not None:
        told.append(f"steps {request.first_step} to {request.last_step}")
    if request.e2e_ns is not None:
        told.append(f"{_length(request.e2e_ns)} in all")
    return ", ".join(told) or "nothing is known of it"


def first_token(story: Story) -> str:
    """``TTFT 1.9 s: 1.2 s behind a 12,000-token prompt of another request, 0.4 s own work, ...``"""
    request = story.request
    if request.ttft_ns is None:
        return "TTFT not seen: it had its first token before the watch, or none"
    told: list[tuple[int, str]] = []
    known = 0
    for stretch in story.stretches:
        if stretch.name not in ("queue", "prefill"):
            continue
        known += stretch.ns
        told += _said(stretch, _IN_QUEUE if stretch.name == "queue" else _IN_BATCH)
    if request.queue_ns is not None and request.prefill_ns is not None:
        told.append((max(request.ttft_ns - known, 0), "until it was handed to its stream"))
    told = [entry for entry in told if entry[0] >= _LEAST_SHARE * request.ttft_ns]
    told.sort(key=lambda entry: -entry[0])
    parts = ", ".join(f"{_length(ns)} {words}" for ns, words in told)
    return f"TTFT {_length(request.ttft_ns)}" + (f": {parts}" if parts else "")


def _parts(stretch: Stretch, words: dict[str, str]) -> str:
    said = sorted(_said(stretch, words), key=lambda entry: -entry[0])
    shown = [entry for entry in said if entry[0] >= _LEAST_SHARE * stretch.ns] or said[:1]
    return ", ".join(f"{_length(ns)} {text}" for ns, text in shown) or "nothing is known of it"


def _meanwhile(stretch: Stretch) -> str:
    said = [
        words.format(_length(ns))
        for column, words in _MEANWHILE.items()
        if (ns := stretch.meanwhile.get(column, 0)) >= _LEAST_SHARE * stretch.ns
    ]
    return f"; meanwhile {', '.join(said)}" if said else ""


def _said(stretch: Stretch, words: dict[str, str]) -> list[tuple[int, str]]:
    found = []
    for part, ns in stretch.parts.items():
        text = words.get(part) or part
        if part == OTHERS_PREFILL and stretch.others_prefill_tokens:
            text = _behind(stretch, text)
        found.append((ns, text))
    return found


def _behind(stretch: Stretch, text: str) -> str:
    """Names the one prompt that is most of it."""
    worst, total = stretch.worst, stretch.others_prefill_tokens
    if worst is not None and worst.prompt_tokens is not None:
        own = worst.prompt_tokens - (worst.cached_tokens or 0)
        if own >= 0.5 * total:
            before = "behind" if text.startswith("behind") else "for"
            return f"{before} a {own:,}-token prompt of another request ({name(worst)})"
    return f"{text} ({total:,} tokens)"


def _length(ns: int) -> str:
    return f"{ns / 1e9:.2f} s" if abs(ns) >= 1_000_000_000 else ms(ns / 1e6)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def as_json(story: Story) -> dict[str, Any]:
    """The record's columns, and ``stretches[{name, ns, parts, steps, meanwhile, behind, ...}]``."""
    pause = story.largest_pause
    return {
        **story.request._asdict(),
        "id": name(story.request),
        "own_prompt_tokens": story.own_tokens,
        "stretches": [_stretch_json(stretch) for stretch in story.stretches],
        "longest_wait": None if pause is None else {"step": pause[0].step, **_stretch_json(pause[1])},
        "text": list(tell(story)),
    }


def _stretch_json(stretch: Stretch) -> dict[str, Any]:
    return {
        "name": stretch.name,
        "ns": stretch.ns,
        "parts": stretch.parts,
        "steps": stretch.steps,
        "others_prefill_tokens": stretch.others_prefill_tokens,
        "meanwhile": stretch.meanwhile,
        "behind": None if stretch.worst is None else name(stretch.worst),
    }
