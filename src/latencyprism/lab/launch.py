"""The command and environment that start each engine on loopback with a tiny model, on one or two cores."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latencyprism.lab.install import EngineEnv
from latencyprism.lab.models import INSIDE

# No engine here may call home, look for a model elsewhere, or take an accelerator that others use.
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Options:
    """What a server may be asked for.

    ``slots``: most sequences in one batch; ``context``: tokens a sequence may hold; ``batch_tokens``:
    tokens of one step, longer prompts are prefilled in chunks; ``threads``: compute threads; ``kv_tokens``:
    capacity of the KV cache where the engine lets it be given in tokens (None: enough for all slots), a
    small one forces preemption; ``arguments``: more for the engine's command line (vLLM and Transformers);
    ``environ``: more environment.
    """

    slots: int = 8
    context: int = 2048
    batch_tokens: int = 256
    threads: int = 1
    kv_tokens: int | None = None
    arguments: Sequence[str] = ()
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """``model``: the name by which requests must call the model; ``stop_s``: time to end by itself after
    SIGTERM."""

    command: list[str]
    environ: dict[str, str]
    model: str
    stop_s: float


def launch(env: EngineEnv, model: Path, port: int, options: Options) -> Launch:
    """How to start ``env.engine`` with ``model`` on 127.0.0.1:``port``."""
    build = {"vllm": _vllm, "transformers": _transformers, "llama.cpp": _llama_cpp}[env.engine]
    return build(env, model, port, options)


def _vllm(env: EngineEnv, model: Path, port: int, options: Options) -> Launch:
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    environ = {
        **_QUIET,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        # EngineCore and Worker poll each other's queue; by default they call sched_yield() meanwhile. On two
        # shared cores steps of 0.2-0.7 s were then seen in one of ten, about a third of that when they poll
        # without yielding; it is believed that a fair scheduler makes a task that yielded often wait long.
        "VLLM_USE_SPINLOOP_EXT": "1",
        "PYTHONPATH": str(INSIDE / "vllm_site"),  # that extension loses references: see there
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        **options.environ,
    }
    command = [str(env.command("vllm")), "serve", str(model), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--max-model-len", str(options.context), "--max-num-seqs", str(options.slots)]
    command += ["--max-num-batched-tokens", str(options.batch_tokens), "--enable-prefix-caching"]
    if options.kv_tokens is not None:
        # Blocks of 16 tokens are what --block-size is set to, so that tokens mean the same on every version.
        blocks = -(-options.kv_tokens // 16)
        command += ["--block-size", "16", "--num-gpu-blocks-override", str(blocks)]
    return Launch([*command, *options.arguments], environ, "tiny", stop_s=10)


def _transformers(env: EngineEnv, model: Path, port: int, options: Options) -> Launch:
    environ = {**_QUIET, "OMP_NUM_THREADS": str(options.threads), **options.environ}
    kv_tokens = options.kv_tokens or options.slots * options.context
    block = 32
    command = [
        str(env.command("transformers")),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--device", "cpu", "--dtype", "float32", "--attn-implementation", "sdpa"]
    command += ["--continuous-batching", "--cb-block-size", str(block)]
    command += [
        "--cb-num-blocks",
        str(-(-kv_tokens // block)),
        "--cb-max-batch-tokens",
        str(options.batch_tokens),
    ]
    return Launch([*command, *options.arguments], environ, str(model), stop_s=2)


def _llama_cpp(env: EngineEnv, model: Path, port: int, options: Options) -> Launch:
    settings = {
        "model": str(model),
        "port": port,
        "slots": options.slots,
        "context": options.context,
        "batch_tokens": options.batch_tokens,
        "threads": options.threads,
    }
    command = [str(env.python or sys.executable), str(INSIDE / "llama_server.py"), json.dumps(settings)]
    return Launch(command, {**_QUIET, **options.environ}, "tiny", stop_s=5)
