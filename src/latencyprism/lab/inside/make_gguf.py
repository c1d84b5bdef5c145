"""Write a random llama-architecture model as GGUF (f32): ``make_gguf.py OUTPUT SHAPE_JSON``."""

from __future__ import annotations

import json
import sys

import gguf
import numpy as np
from tiny_vocabulary import CHAT_TEMPLATE, SPECIAL, build


def main(output: str, shape: dict) -> None:
    rng = np.random.default_rng(shape["seed"])
    hidden, inner, vocab = shape["hidden"], shape["intermediate"], shape["vocabulary"]
    q_width, kv_width = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]

    writer = gguf.GGUFWriter(output, "llama")
    writer.add_name("tiny-random-llama")
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _vocabulary(writer, vocab)

    def weights(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, rng.normal(0.0, 0.02, (rows, columns)).astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))

    weights("token_embd.weight", vocab, hidden)
    for layer in range(shape["layers"]):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        weights(f"{block}.attn_q.weight", q_width, hidden)
        weights(f"{block}.attn_k.weight", kv_width, hidden)
        weights(f"{block}.attn_v.weight", kv_width, hidden)
        weights(f"{block}.attn_output.weight", hidden, q_width)
        norm(f"{block}.ffn_norm.weight")
        weights(f"{block}.ffn_gate.weight", inner, hidden)
        weights(f"{block}.ffn_up.weight", inner, hidden)
        weights(f"{block}.ffn_down.weight", hidden, inner)
    norm("output_norm.weight")
    weights("output.weight", vocab, hidden)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    tokens, merges = build(size)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(SPECIAL.index("<bos>"))
    writer.add_eos_token_id(SPECIAL.index("<eos>"))
    writer.add_unk_token_id(SPECIAL.index("<unk>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
