"""Packs against the source they claim to hold for: recorded signatures of many versions, and the installed
engines, read and never imported."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latencyprism.engines.discovery import distribution_version
from latencyprism.engines.packs import PYTHON_ENGINES, load_pack, version_key
from latencyprism.engines.signatures import (
    Classes,
    ClassSignature,
    folder_source,
    lacking,
    places_of,
    read_classes,
)
from latencyprism.lab.install import EngineUnavailable, ensure

RECORDED = Path(__file__).parent / "signatures"


def record(engine: str) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((RECORDED / f"{engine}.json").read_text(encoding="utf-8"))
    return known


def recorded(engine: str, version: str) -> Classes:
    known = record(engine)
    of = known["versions"][version]["classes"]
    return {place: ClassSignature(**known["signatures"][key]) for place, key in of.items()}


VERSIONS = [(engine, version) for engine in PYTHON_ENGINES for version in record(engine)["versions"]]


@pytest.mark.parametrize(("engine", "version"), VERSIONS)
def test_every_hook_and_field_is_in_the_recorded_source(engine: str, version: str) -> None:
    entry, _ = load_pack(engine).choose(version)
    assert entry.holds_for(version)
    assert lacking(entry, recorded(engine, version)) == []


@pytest.mark.parametrize("engine", PYTHON_ENGINES)
def test_what_a_pack_calls_recorded_is_recorded_with_its_origin(engine: str) -> None:
    versions = record(engine)["versions"]
    named = [version for entry in load_pack(engine).ranges for version in entry.recorded]
    assert sorted(named) == sorted(versions)
    for entry in load_pack(engine).ranges:
        assert entry.recorded and all(entry.holds_for(version) for version in entry.recorded)
    for version, about in versions.items():
        assert version in about["origin"]
        if about["sha256"] is None:  # no package to take the hash of
            assert re.search(r"\bcommit [0-9a-f]{40}\b", about["origin"])
        else:
            assert re.fullmatch("[0-9a-f]{64}", about["sha256"])


@pytest.mark.parametrize("engine", PYTHON_ENGINES)
def test_only_names_and_signatures_are_recorded(engine: str) -> None:
    for signature in record(engine)["signatures"].values():
        assert set(signature) == {"bases", "methods", "attributes"}
        assert all(name.isidentifier() for name in (*signature["methods"], *signature["attributes"]))
        for words in signature["methods"].values():
            assert re.fullmatch(r"((classmethod|staticmethod|async) )*\([\w*/=, ]*\)", words), words


@pytest.mark.parametrize("engine", PYTHON_ENGINES)
def test_each_hook_parameter_and_field_that_goes_is_named(engine: str) -> None:
    """Each one is taken out of the recorded classes in turn."""
    version = record(engine)["versions"].popitem()[0]
    entry, _ = load_pack(engine).choose(version)
    classes = recorded(engine, version)
    for name, (module, owners, method) in entry.hooks.items():
        for owner in owners.split("|"):
            gone = copy.deepcopy(classes)
            for signature in gone.values():
                signature.methods.pop(method, None)
            assert f"hook {name}: {module}.{owner}.{method}" in lacking(entry, gone)
    for name, wanted in entry.parameters.items():
        module, owners, method = entry.hooks[name]
        for parameter in wanted:
            changed = copy.deepcopy(classes)
            for signature in changed.values():
                if method in signature.methods:
                    signature.methods[method] = re.sub(
                        rf"\b{parameter}\b", "renamed", signature.methods[method]
                    )
            assert any(text.startswith(f"parameters of {name}: ") for text in lacking(entry, changed))
    for of in entry.fields.values():
        for place, names in of.items():
            for one in names:
                gone = copy.deepcopy(classes)
                for signature in gone.values():
                    signature.attributes = [a for a in signature.attributes if a != one]
                    signature.methods.pop(one, None)
                owner = place.partition(":")[2].split("|")[0]
                assert any(text.endswith(f".{owner}.{one}") for text in lacking(entry, gone))


def site_packages(engine: str) -> Path:
    try:
        env = ensure(engine)  # type: ignore[arg-type]
    except EngineUnavailable as missing:
        pytest.skip(f"engine unavailable: {missing.reason}")
    (folder,) = env.dir.glob("lib/python3*/site-packages")
    return folder


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_every_hook_and_field_is_in_the_installed_engine(engine: str) -> None:
    folder = site_packages(engine)
    (version,) = {
        match[1]
        for path in folder.iterdir()
        if (match := re.fullmatch(rf"{engine}-([\d.]+).*info", path.name))
    }
    entry, warning = load_pack(engine).choose(version)
    assert warning is None, "the installed version is one that the pack calls verified"
    source = folder_source(folder)
    assert lacking(entry, read_classes(source, places_of(entry))) == []
    assert source("../../../../../../../../etc/passwd") is None


@pytest.mark.parametrize("engine", PYTHON_ENGINES)
def test_ranges_are_ordered_without_gaps_and_hold_what_they_verified(engine: str) -> None:
    ranges = load_pack(engine).ranges
    for entry in ranges:
        assert version_key(entry.since) < version_key(entry.below)
        assert all(entry.holds_for(version) for version in entry.verified)
        assert entry.layout and entry.hooks and set(entry.parameters) <= set(entry.hooks)
        assert set(entry.fields) <= {"engine", "worker", "api"}
    assert all(a.below == b.since for a, b in itertools.pairwise(ranges))


def test_older_ranges_have_their_own_hooks_and_fields() -> None:
    pack = load_pack("vllm")
    first, old, lists, new = (pack.choose(v)[0] for v in ("0.8.0", "0.8.5.post1", "0.10.1", "0.32.0"))
    assert first.hooks["schedule"][0] == "vllm.v1.core.scheduler"
    assert [e.layout for e in (first, old, lists, new)] == ["objects", "objects", "lists", "outputs"]
    assert "sample" not in old.hooks and "sample" in new.hooks
    cached = "vllm.v1.core.sched.output:CachedRequestData"
    assert "resumed_from_preemption" in lists.fields["engine"][cached]
    assert "resumed_req_ids" in new.fields["engine"][cached]


def test_fields_of_a_process_are_those_of_its_roles() -> None:
    entry = load_pack("vllm").ranges[-1]
    engine, worker, both = (entry.fields_for(role) for role in ("engine", "worker", "engine+worker"))
    assert set(both) == {*engine, *worker}
    output = "vllm.v1.core.sched.output:SchedulerOutput"
    assert set(both[output]) == {*engine[output], *worker[output]} and len(both[output]) == len(
        set(both[output])
    )
    assert replace(entry, fields={}).fields_for("engine") == {}


def test_how_sure_a_version_is_is_said() -> None:
    pack = load_pack("vllm")
    assert pack.choose("0.32.0+cpu")[1] is None
    assert "compared with this pack by its source" in str(pack.choose("0.31.0")[1])
    assert "not verified" in str(pack.choose("0.31.5")[1])
    for version in ("0.1.0", "99.0"):
        assert not pack.covers(version) and "outside the pack's versions" in str(pack.choose(version)[1])
    assert pack.covers("0.8.3") and pack.covers(None) and pack.choose(None)[1]


def test_version_is_read_from_what_a_process_maps() -> None:
    assert distribution_version(os.getpid(), ("numpy",)) == np.__version__
    assert distribution_version(os.getpid(), ("no_such_thing",)) is None
