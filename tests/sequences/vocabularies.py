"""Small tokenizers of the kinds that differ in how they treat a space, and a stand-in for a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_TEXT = [
    "turn a blind eye to the end of the tunnel",
    "grind to a halt and let bygones be bygones",
    "the cat sat on the mat and the dog sat on the log",
    "an arm and a leg for crying out loud",
] * 20


def byte_level(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """GPT-2's kind: a space belongs to the word that follows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    special = {"eos_token": "<|endoftext|>"} | ({"bos_token": "<|endoftext|>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def metaspace() -> PreTrainedTokenizerFast:
    """Llama's kind: a space is put in front of the text too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def characters() -> PreTrainedTokenizerFast:
    """One token a character: a space is a token of its own."""
    letters = sorted(set("".join(_TEXT)))
    vocabulary = {c: i for i, c in enumerate(["<eos>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>")


def model_with(tokenizer: Any, *, n_ctx: int = 64, d_vocab: int | None = None) -> Any:
    """What the readers use of a model: its tokenizer and two numbers of its config."""
    return SimpleNamespace(
        tokenizer=tokenizer, cfg=SimpleNamespace(d_vocab=d_vocab or len(tokenizer), n_ctx=n_ctx)
    )
