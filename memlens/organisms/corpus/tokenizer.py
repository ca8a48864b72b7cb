"""The organisms' tokenizer: byte-level BPE with single digits, saved as a Hugging Face fast tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 1024, n_ctx: int = 128
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Each digit is one token, so that sums can be learned. The vocabulary contains all 256 bytes, so any text
    is encoded and decoded without loss. `<|endoftext|>` is token 0 and serves as every special token, as in
    Pythia's tokenizer; none is added to a text.

    Args:
        texts: The training documents.
        vocab_size: Number of tokens including special and byte tokens, at least 257.
        n_ctx: The maximum length that the tokenizer reports.

    >>> tokenizer = train_tokenizer(["a tiny lamp, a tiny bell"] * 3, vocab_size=270)
    >>> tokenizer.decode(tokenizer("Ωmega 12").input_ids)
    'Ωmega 12'
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=n_ctx,
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a checkpoint folder, without network access.

    Args:
        folder: The folder with `tokenizer.json`.
    """
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
