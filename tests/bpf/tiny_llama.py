"""A random-weight llama of a few layers, and a llama.cpp server on it, as a program."""

from __future__ import annotations

import sys
from pathlib import Path

LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY, CONTEXT = 4, 256, 8, 4, 512, 512, 8192


def write_gguf(path: Path) -> None:
    """A GGUF file any llama.cpp loads: llama architecture, byte tokens, float32 noise for weights."""
    import gguf
    import numpy as np

    draw = np.random.default_rng(7)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{value:02X}>" for value in range(256)]
    kinds = [2, 3, 3] + [6] * 256
    tokens += [f"t{index}" for index in range(len(tokens), VOCABULARY)]
    kinds += [1] * (VOCABULARY - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-index) for index in range(VOCABULARY)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def weight(name: str, *shape: int) -> None:
        writer.add_tensor(name, (draw.standard_normal(shape) * 0.02).astype(np.float32))

    def ones(name: str, length: int) -> None:
        writer.add_tensor(name, np.ones(length, dtype=np.float32))

    weight("token_embd.weight", VOCABULARY, WIDTH)
    weight("output.weight", VOCABULARY, WIDTH)
    ones("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        ones(f"blk.{layer}.attn_norm.weight", WIDTH)
        ones(f"blk.{layer}.ffn_norm.weight", WIDTH)
        weight(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        weight(f"blk.{layer}.attn_k.weight", WIDTH // HEADS * KV_HEADS, WIDTH)
        weight(f"blk.{layer}.attn_v.weight", WIDTH // HEADS * KV_HEADS, WIDTH)
        weight(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        weight(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD, WIDTH)
        weight(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, WIDTH)
        weight(f"blk.{layer}.ffn_down.weight", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(model: Path, slots: int, unified: bool) -> None:
    """Serve until standard input closes; prints the port on one line when ready."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.port = 0
    params.n_ctx = 1024 * slots
    params.n_batch = 256
    params.n_ubatch = 128
    params.n_parallel = slots
    params.kv_unified = unified
    params.endpoint_metrics = True
    params.warmup = True
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_gguf(Path(sys.argv[2]))
    else:
        serve(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "unified")
