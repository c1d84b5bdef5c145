"""Tiny models with random weights and a fixed seed: an engine runs them as any other, in milliseconds a step.

They say nothing sensible; what the engine does to run them (schedule, prefill in chunks, batch, sample) is
real.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from latencyprism.errors import PrismError
from latencyprism.lab.install import EngineEnv, cache_root, clean_environ

INSIDE = Path(str(resources.files("latencyprism.lab").joinpath("inside")))


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer; the default has 4 million parameters."""

    layers: int = 4
    hidden: int = 256
    intermediate: int = 768
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 2048
    context: int = 4096
    seed: int = 0


TINY = Shape()


def ensure_model(env: EngineEnv, shape: Shape = TINY) -> Path:
    """A GGUF file for llama.cpp, a folder of safetensors for the others; made once and cached by its content.

    Raises PrismError where the engine's libraries cannot write it.
    """
    script = INSIDE / ("make_gguf.py" if env.engine == "llama.cpp" else "make_qwen3.py")
    digest = hashlib.sha256(json.dumps(asdict(shape), sort_keys=True).encode())
    for source in (script, INSIDE / "tiny_vocabulary.py"):
        digest.update(source.read_bytes())
    stem, suffix = ("llama", ".gguf") if env.engine == "llama.cpp" else ("qwen3", "")
    target = cache_root() / "models" / f"{stem}-{digest.hexdigest()[:12]}{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _make(env, script, target, shape)
    return target


def _make(env: EngineEnv, script: Path, target: Path, shape: Shape) -> None:
    # Written beside its place and renamed: a reader never sees half a model, and of two writers one wins.
    draft = target.with_name(f".{os.getpid()}-{target.name}")
    result = subprocess.run(
        [str(env.python), str(script), str(draft), json.dumps(asdict(shape))],
        env=clean_environ({"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        if result.returncode != 0:
            said = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
            raise PrismError(f"cannot write a tiny model for {env.engine}", said[-1])
        if not target.exists():
            draft.rename(target)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)
