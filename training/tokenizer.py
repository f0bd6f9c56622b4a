"""The tokenizer of the bundled model: a real ``CLIPTokenizer`` with a vocabulary of its own.

Byte-pair merges are learned until every word of :func:`scfg_fast.models.vocabulary.vocabulary` is exactly one
token. Any other text still encodes: it falls back to pieces and bytes, whose embeddings saw little or no training.

    python -m training.tokenizer --data DATA
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer

from scfg_fast.models.vocabulary import vocabulary
from training.files import replacing

MAX_TOKENS = 24
"""Length that prompts are padded and cut to, start and end token included."""

_END_OF_WORD = "</w>"


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one symbol.

    Args:
        words: lower-case ASCII words.
    """
    spellings = [[*word[:-1], word[-1] + _END_OF_WORD] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in spellings):
        pairs = Counter(pair for symbols in spellings for pair in zip(symbols, symbols[1:], strict=False))
        left, right = pairs.most_common(1)[0][0]
        merges.append((left, right))
        for symbols in spellings:
            position = 0
            while position < len(symbols) - 1:
                if (symbols[position], symbols[position + 1]) == (left, right):
                    symbols[position : position + 2] = [left + right]
                position += 1
    return merges


def write_tokenizer(folder: str | Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and the configuration of the tokenizer into a new folder."""
    alphabet = byte_alphabet()
    merges = learn_merges(vocabulary())
    symbols = [*alphabet, *(char + _END_OF_WORD for char in alphabet)]
    symbols += [symbol for symbol in dict.fromkeys(left + right for left, right in merges) if symbol not in symbols]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    vocab_path, merges_path = out / "vocab.json", out / "merges.txt"
    vocab_path.write_text(json.dumps({s: i for i, s in enumerate(symbols)}, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    merges_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(vocab_path), str(merges_path), model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(out)


def load_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Read a tokenizer written by :func:`write_tokenizer`."""
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="working folder; writes DATA/tokenizer")
    args = parser.parse_args(argv)
    target = Path(args.data) / "tokenizer"
    with replacing(target) as folder:
        write_tokenizer(folder)
    tokenizer = load_tokenizer(target)
    print(f"{len(tokenizer)} tokens for {len(vocabulary())} words in {target}")


if __name__ == "__main__":
    main()
