"""Parts of tiny checkpoints: offline tokenizers of a few hundred tokens, and weights that depend on a name alone."""

import string
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import CLIPTokenizer, T5Tokenizer

from schemas.keys import seed_of


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """Draw weights from a seed that depends on `name` alone, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("tiny", name))
        yield


def byte_alphabet() -> list[str]:
    """Return the 256 printable signs that byte-level BPE writes bytes with (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + number) for number in range(len(others))]


def clip_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer without merges: one token per byte."""
    signs = byte_alphabet()
    tokens = [*signs, *(f"{sign}</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Build a T5 tokenizer of single signs."""
    signs = string.ascii_letters + string.digits + string.punctuation
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=special + [(sign, -3.0) for sign in signs], extra_ids=0, model_max_length=512)
