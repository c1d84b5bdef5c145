"""A byte-level BPE vocabulary that needs no training text: the 256 bytes, then merges of lower-case letters.

Runs with an engine's interpreter, so it imports the standard library alone.
"""

from __future__ import annotations

import itertools
import string

SPECIAL = ["<bos>", "<eos>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def byte_symbols() -> list[str]:
    """One printable character for each byte 0..255, in the convention of byte-level BPE tokenizers.

    Bytes that are printable in Latin-1 stand for themselves; the others are numbered from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(0x100)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def build(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """``size`` tokens (the special ones first) and the merges that make the long ones."""
    symbols = byte_symbols()
    tokens = [*SPECIAL, *symbols]
    merges: list[tuple[str, str]] = []
    if size < len(tokens):
        raise SystemExit(f"a vocabulary of {size} tokens cannot hold the {len(tokens)} basic ones")
    letters = string.ascii_lowercase
    space = symbols[ord(" ")]
    pairs = [(space, letter) for letter in letters]
    pairs += [(first, second) for first in letters for second in letters]
    pairs += [(space + first, second) for first in letters for second in letters]
    pairs += [(first + second, third) for first in letters for second in letters for third in letters]
    for left, right in pairs[: size - len(tokens)]:
        tokens.append(left + right)
        merges.append((left, right))
    return tokens, merges
