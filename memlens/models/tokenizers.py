"""A checkpoint's tokenizer, in the form that TransformerLens expects."""

from __future__ import annotations

import logging
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from memlens.models.names import Source
from memlens.models.quiet import quiet

_LOG = logging.getLogger(__name__)


def load_tokenizer(
    source: Source, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Return the checkpoint's tokenizer, or None (with a line in the log) where none can be read."""
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.tokenizer_location or source.location, **options)
            _check_has_words(tokenizer)
            return prepare_tokenizer(tokenizer)
    except (
        Exception
    ) as error:  # transformers raises nearly every kind of error for a folder without tokenizer files
        reason = str(error).strip().splitlines()
        _LOG.warning(
            "%r has no tokenizer that can be read (%s): the model takes token ids only.",
            source.name,
            reason[0] if reason else type(error).__name__,
        )
        return None


def _check_has_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """For a folder without tokenizer files transformers invents a tokenizer with special tokens only."""
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ValueError("no vocabulary")


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that puts the BOS token before text by default, if it has such a token.

    TransformerLens expects this form (`to_tokens(..., prepend_bos=False)` removes the token again) and
    otherwise reads the tokenizer again from its original name, which fails for one created in memory or read
    from a GGUF file. So it is created here, by a round trip through a temporary folder. The given tokenizer
    is not changed. Pass `add_special_tokens=False` to get the bare tokens of a text.
    """
    if tokenizer.bos_token is None or tokenizer.init_kwargs.get("add_bos_token"):
        return tokenizer
    with TemporaryDirectory(prefix="memlens-") as folder, quiet():
        tokenizer.save_pretrained(folder)
        try:
            prepared = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
        except ValueError:  # tokenizers whose special tokens do not fit a template: they never prepend BOS
            prepared = AutoTokenizer.from_pretrained(folder)
            prepared.init_kwargs["add_bos_token"] = True
    prepared.name_or_path = tokenizer.name_or_path
    prepared.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return prepared


def placeholder_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with one word: a bridge cannot be built without one. It is removed afterwards."""
    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
