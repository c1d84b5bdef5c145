"""Write a random Qwen3-architecture model as safetensors (bf16): ``make_qwen3.py OUTPUT_FOLDER
SHAPE_JSON``."""

from __future__ import annotations

import json
import sys

import torch
from tiny_vocabulary import CHAT_TEMPLATE, SPECIAL, build
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def main(output: str, shape: dict) -> None:
    torch.manual_seed(shape["seed"])
    config = Qwen3Config(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["context"],
        tie_word_embeddings=False,
        # No end token: a server without "ignore_eos" must produce as many tokens as it was asked for.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = None
    model.save_pretrained(output)
    _tokenizer(shape["vocabulary"], shape["context"]).save_pretrained(output)


def _tokenizer(size: int, context: int) -> PreTrainedTokenizerFast:
    tokens, merges = build(size)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        unk_token="<unk>",
        pad_token="<eos>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
