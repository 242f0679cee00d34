"""Parts of tiny checkpoints: offline tokenizers of a few hundred tokens, and weights that depend on a name alone."""

import string
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Tokenizer

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


# Who speaks, as the real models' templates mark it; of dev's, parts of a message that are texts are joined.
_QWEN_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
_MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set said = message['content'] if message['content'] is string "
    "else message['content'] | map(attribute='text') | join('') %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ said }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ said }}[/INST]{% endif %}{% endfor %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Build a Qwen tokenizer without merges, with a chat template: one token per byte, padded on the right."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*byte_alphabet(), *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=4096, additional_special_tokens=marks[1:])
    tokenizer.chat_template = _QWEN_CHAT
    return tokenizer


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with the marks of Mistral's chat: one token per byte, padded on the left."""
    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokens = ["<unk>", "<s>", "</s>", *marks, "<pad>", *byte_alphabet()]
    bytes_alone = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=marks,
        padding_side="left",
        model_max_length=4096,
    )
    tokenizer.chat_template = _MISTRAL_CHAT
    return tokenizer
