"""An engine that is its own client: ``engine.py transformers serve --continuous-batching``.

Transformers' own generation loop over a model of random weights, made here, under a closed loop of requests
made here. The command line is that of the server, so that it is found like one. Runs where Transformers and
torch are, with nothing of this project. Answers lines on standard input with one line of JSON each:

``pause``: no more requests, wait until all are finished; ``go``: requests again; ``count``; ``end``. Each
answer carries ``batches`` (the loop's own count) and ``time_ns`` (CLOCK_MONOTONIC). Ends by itself after
``--seconds``, and when standard input closes.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import sys
import threading
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "large": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
              "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
VOCABULARY = 32000


def make_model(shape: str, device: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
        attn_implementation="paged|sdpa", **SHAPES[shape],
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.to(torch.bfloat16).eval()


def make_config(graphs: bool, batch_tokens: int) -> ContinuousBatchingConfig:
    names = ContinuousBatchingConfig.__dataclass_fields__
    page = "page_size" if "page_size" in names else "block_size"
    wanted = {page: 256, "num_blocks": 64, "max_batch_tokens": batch_tokens, "use_cuda_graph": graphs,
              "use_async_batching": False, "max_requests_per_batch": 64, "q_padding_interval_size": 64,
              "kv_padding_interval_size": 4096, "allow_block_sharing": False}  # fmt: skip
    return ContinuousBatchingConfig(**{name: value for name, value in wanted.items() if name in names})


class Client:
    """Keeps ``slots`` requests under way, unless paused."""

    def __init__(self, manager: object, slots: int, prompt_tokens: int, new_tokens: int) -> None:
        self.manager, self.slots = manager, slots
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        self.random = random.Random(1)
        self.open = self.finished = self.failed = self.tokens = 0
        self.paused = False

    def fill(self) -> None:
        while not self.paused and self.open < self.slots:
            length = self.random.randint(self.prompt_tokens // 2, self.prompt_tokens)
            prompt = [self.random.randrange(VOCABULARY) for _ in range(length)]
            wanted = self.random.randint(self.new_tokens // 2, self.new_tokens)
            self.manager.add_request(prompt, max_new_tokens=wanted)
            self.open += 1

    def turn(self) -> None:
        """Collect what is finished, at most 20 ms."""
        self.fill()
        result = self.manager.get_result(timeout=0.02)
        while result is not None:
            if result.is_finished():
                self.open -= 1
                self.finished += 1
                self.failed += bool(result.error)
                self.tokens += len(result.generated_tokens)
                self.fill()
            result = self.manager.get_result(timeout=0.0001)


def say(manager: object, client: Client, event: str, **more: object) -> None:
    batches = getattr(manager, "current_batch", 0)
    line = {"event": event, "time_ns": time.monotonic_ns(), "batches": batches, "finished": client.finished,
            "failed": client.failed, "tokens": client.tokens, **more}  # fmt: skip
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def read_orders(orders: queue.Queue[str]) -> None:
    for line in sys.stdin:
        orders.put(line.strip())
    orders.put("end")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--continuous-batching", action="store_true")
    parser.add_argument("--shape", default="small", choices=sorted(SHAPES))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--no-graphs", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    model = make_model(options.shape, device)
    graphs = device == "cuda" and not options.no_graphs
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=make_config(graphs, 256),
    )
    manager.start()
    client = Client(manager, options.slots, options.prompt_tokens, options.new_tokens)
    orders: queue.Queue[str] = queue.Queue()
    threading.Thread(target=read_orders, args=(orders,), daemon=True).start()
    until = time.monotonic() + options.seconds
    told_ready = False
    while time.monotonic() < until and manager.is_running():
        client.turn()
        if not told_ready and client.finished >= options.slots:
            told_ready = True
            resolved = getattr(manager, "continuous_batching_config", None)
            say(manager, client, "ready", device=device, torch=torch.__version__, pid=os.getpid(),
                cuda_graphs=str(getattr(resolved, "use_cuda_graph", None)),
                asynchronous=str(getattr(resolved, "use_async_batching", None)),
                parameters=sum(p.numel() for p in model.parameters()))  # fmt: skip
        order = orders.get() if not orders.empty() else ""
        if order == "end":
            break
        if order == "pause":
            client.paused = True
            while client.open and time.monotonic() < until:
                client.turn()
            time.sleep(0.3)  # the last turn of the loop ends after its results were handed out
        elif order == "go":
            client.paused = False
        if order:
            say(manager, client, order)
    say(manager, client, "ended", running=manager.is_running())
    # Its threads and CUDA's teardown are of no interest; an engine that is ended must not be waited for.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
