"""Calls llama.cpp as a library, without its server: ``bpf_bare_llama.py MODEL``; each line on standard input
is a number of tokens for one llama_decode call, answered with a line when its logits are there.

Structures passed by value are held in more room than they need: the callee finds its members at the start.
"""

from __future__ import annotations

import ctypes
import os
import sys

import xllamacpp.xllamacpp as built


class Parameters(ctypes.Structure):
    _fields_ = (("room", ctypes.c_uint8 * 1024),)


class Batch(ctypes.Structure):
    _fields_ = (("n_tokens", ctypes.c_int32), ("rest", ctypes.c_void_p * 6))


def main() -> None:
    lib = ctypes.CDLL(built.__file__)
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = Parameters
    lib.llama_model_load_from_file.argtypes = (ctypes.c_char_p, Parameters)
    lib.llama_model_load_from_file.restype = lib.llama_init_from_model.restype = ctypes.c_void_p
    lib.llama_init_from_model.argtypes = (ctypes.c_void_p, Parameters)
    lib.llama_batch_get_one.restype = Batch
    lib.llama_decode.argtypes = (ctypes.c_void_p, Batch)
    lib.llama_get_logits.argtypes = (ctypes.c_void_p,)
    model = lib.llama_model_load_from_file(os.fsencode(sys.argv[1]), lib.llama_model_default_params())
    context = lib.llama_init_from_model(model, lib.llama_context_default_params())
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        tokens = (ctypes.c_int32 * count)(*range(300, 300 + count))
        code = lib.llama_decode(context, lib.llama_batch_get_one(tokens, count))
        lib.llama_get_logits(context)
        print(code, flush=True)


if __name__ == "__main__":
    main()
