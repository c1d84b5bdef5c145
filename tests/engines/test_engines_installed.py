"""A running engine's own source compared with the pack, on installations made of recorded signatures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from latencyprism.attach.process import Identity, ProcessInfo
from latencyprism.engines import installed
from latencyprism.engines.discovery import Member, Replica
from latencyprism.engines.packs import load_pack
from latencyprism.engines.signatures import folder_source, places_of, read_classes

RECORDED = json.loads((Path(__file__).parent / "signatures" / "vllm.json").read_text(encoding="utf-8"))


def install(folder: Path, version: str) -> None:
    """Source with the recorded names of one version."""
    by_module: dict[str, list[str]] = {}
    for place, key in RECORDED["versions"][version]["classes"].items():
        module, name = place.split(":")
        one = RECORDED["signatures"][key]
        lines = [
            f"class {name}:",
            "    pass",
            *(f"    {attribute} = None" for attribute in one["attributes"]),
        ]
        for method, words in one["methods"].items():
            inside = words[words.index("(") :].replace("=,", "=None,").replace("=)", "=None)")
            lines.append(f"    def {method}{inside}: ...")
        by_module.setdefault(module, []).append("\n".join(lines))
    for module, texts in by_module.items():
        path = folder / (module.replace(".", "/") + ".py")
        if module == "vllm.v1.engine":
            path = folder / "vllm/v1/engine/__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(texts))


def replica(version: str | None) -> Replica:
    title = ["VLLM::EngineCore"]
    process = ProcessInfo(Identity(10, 10), 1, 0, "python", title, None, "S", 10, "/proc/10/root", 0, 10)
    return Replica("vllm", 0, (Member(process, "engine"),), version)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(installed, "distribution_at", lambda pid, names: (str(tmp_path), "0.31.0"))
    return tmp_path


def test_what_the_running_source_lacks_is_named(folder: Path) -> None:
    install(folder, "0.31.0")
    assert installed.missing_in(replica("0.31.0")) == []
    output = folder / "vllm/v1/core/sched/output.py"
    output.write_text(output.read_text().replace("resumed_req_ids", "renamed"))
    (folder / "vllm/v1/worker/gpu_worker.py").unlink()
    missing = installed.missing_in(replica("0.31.0"))
    assert missing is not None and len(missing) == 3
    assert "field vllm.v1.core.sched.output.CachedRequestData.resumed_req_ids" in missing
    assert "lacks" in installed.in_words(missing) and "and 1 more" in installed.in_words(missing, 2)
    assert "has all" in installed.in_words([])


def test_nothing_is_claimed_without_a_source_a_version_or_a_pack(folder: Path) -> None:
    assert installed.missing_in(replica("0.31.0")) is None
    install(folder, "0.31.0")
    assert installed.missing_in(replica(None)) is None
    assert installed.missing_in(replica("99.0")) is None
    other = Replica("llama.cpp", 0, replica(None).members)
    assert installed.missing_in(other) is None


def test_hostile_source_is_no_source(folder: Path) -> None:
    place = "vllm.v1.request:Request"
    path = folder / "vllm/v1/request.py"
    path.parent.mkdir(parents=True)
    read = folder_source(folder)
    for text in (b"class Request(:", b"\0" * 100, b"(" * 100_000, b"x" * 9_000_000):
        path.write_bytes(text)
        assert read_classes(read, [place]) == {}
    path.unlink()
    path.symlink_to(__file__)
    assert read("vllm/v1/request.py") is None
    path.unlink()
    os.mkfifo(path)
    assert read("vllm/v1/request.py") is None
    assert read("../request.py") is None and read("vllm") is None and read("a\0b") is None
    assert places_of(load_pack("vllm").ranges[-1]) >= {place}
