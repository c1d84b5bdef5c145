#!/usr/bin/env python3
"""Record names and signatures of an engine's classes from its public source, for the tests of the probe
packs.

Nothing of the engine is imported or run, and no body is kept. Usage:

    pip download --no-deps --only-binary :all: -d DIR PACKAGE==VERSION
    scripts/record_signatures.py ENGINE VERSION DIR/PACKAGE.whl --origin "package PACKAGE VERSION"

or with an unpacked tree (a checkout; for SGLang its folder ``python``, for TGI ``server``) in place of the
wheel, and as origin its repository, tag and whole commit. Adds to tests/engines/signatures/ENGINE.json; a
class that stayed the same from one version to the next is kept once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latencyprism.engines.packs import PYTHON_ENGINES, load_pack, version_key
from latencyprism.engines.signatures import (
    Classes,
    Source,
    folder_source,
    hooks_of,
    places_of,
    read_classes,
    wheel_source,
)

# Classes that no pack names yet: recorded all the same, so that a pack can grow without the old sources.
ALSO = {
    "vllm": (
        "vllm.v1.engine:EngineCoreOutput",
        "vllm.v1.engine:EngineCoreOutputs",
        "vllm.v1.engine.output_processor:RequestState",
    ),
    "transformers": (
        "transformers.generation.continuous_batching.continuous_api:ContinuousBatchingManager",
        "transformers.generation.continuous_batching.continuous_api:OutputRouter",
        "transformers.generation.continuous_batching.requests:GenerationOutput",
    ),
    "sglang": (),
    "tgi": (),
}

# Of a larger class only what some pack names is kept.
NAMES_LIMIT = 100

FOLDER = Path(__file__).parent.parent / "tests" / "engines" / "signatures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=PYTHON_ENGINES)
    parser.add_argument("version", help="the engine's own version")
    parser.add_argument("source", type=Path, help="a wheel, or the folder that holds the engine's package")
    parser.add_argument("--origin", required=True, help="where the source is from")
    args = parser.parse_args()
    wheel = args.source.is_file()
    source = wheel_source(args.source) if wheel else folder_source(args.source)
    places = {place for entry in load_pack(args.engine).ranges for place in places_of(entry)}
    classes = read_classes(source, places | set(ALSO[args.engine]))
    _trim(classes, args.engine, source)
    target = FOLDER / f"{args.engine}.json"
    pool, versions = {}, {}
    if target.exists():
        known = json.loads(target.read_text(encoding="utf-8"))
        pool, versions = known["signatures"], known["versions"]
    of = {}
    for place in sorted(classes):
        signature = asdict(classes[place])
        key = hashlib.sha256(json.dumps(signature).encode()).hexdigest()[:8]
        pool[key] = signature
        of[place] = key
    versions[args.version] = {
        "origin": args.origin,
        "sha256": hashlib.sha256(args.source.read_bytes()).hexdigest() if wheel else None,
        "classes": of,
    }
    FOLDER.mkdir(exist_ok=True)
    target.write_text(_text(args.engine, versions, pool), encoding="utf-8")
    print(f"{target.name}: {args.version}, {len(classes)} classes; {target.stat().st_size} bytes in all")


def _trim(classes: Classes, engine: str, source: Source) -> None:
    """Of classes that are hooked and not read, the hooked methods will do; of large ones, what packs name."""
    ranges = load_pack(engine).ranges
    hooked = {hook[2] for entry in ranges for hook in hooks_of(entry)}
    fields = [of for entry in ranges for of in entry.fields.values()]
    named = hooked | {name for of in fields for names in of.values() for name in names}
    whole = read_classes(source, {*_single({place for of in fields for place in of}), *ALSO[engine]})
    for place, one in classes.items():
        if place not in whole:
            one.attributes = []
            one.methods = {name: words for name, words in one.methods.items() if name in hooked}
        elif len(one.attributes) + len(one.methods) > NAMES_LIMIT:
            one.attributes = [name for name in one.attributes if name in named]
            one.methods = {name: words for name, words in one.methods.items() if name in named}


def _single(places: set[str]) -> set[str]:
    """``module:A|B`` taken apart."""
    return {
        f"{module}:{owner}"
        for module, owners in (p.split(":") for p in places)
        for owner in owners.split("|")
    }


def _text(engine: str, versions: dict[str, Any], pool: dict[str, Any]) -> str:
    """One line a signature, those that no version has any more left out."""
    used = {key for version in versions.values() for key in version["classes"].values()}
    ordered = {version: versions[version] for version in sorted(versions, key=version_key)}
    lines = ",\n".join(f'  "{key}": {json.dumps(pool[key])}' for key in sorted(used))
    heads = ",\n".join(f'  "{version}": {json.dumps(of)}' for version, of in ordered.items())
    return (
        f'{{\n "engine": "{engine}",\n "versions": {{\n{heads}\n }},\n "signatures": {{\n{lines}\n }}\n}}\n'
    )


if __name__ == "__main__":
    main()
