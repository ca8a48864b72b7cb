"""Whether the texts of a model begin with the beginning-of-text token (BOS)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from memlens.models.families import FAMILIES, family_of, find_model
from memlens.models.quiet import quiet


def expects_bos(model: Any, tokenizer: Any) -> bool:
    """Return whether texts should begin with the BOS token, as they did in the model's training.

    For a family of the table (`Family.bos`) that was trained without one, they should not. For the others,
    and for families that memlens does not know, the tokenizer's own rule counts, as its files have it.

    Args:
        model: A TransformerLens model, or None.
        tokenizer: The tokenizer that encodes the texts; it may be TransformerLens' form of it.
    """
    if getattr(tokenizer, "bos_token_id", None) is None:
        return False
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    if model is None:
        found = find_model(name)
        family = found[0] if found else None
    else:
        named = str(getattr(getattr(model, "cfg", None), "model_name", "") or name)
        family = FAMILIES.get(family_of(model, name=named))
    if family is not None and not family.bos:
        return False
    changed = bool(getattr(tokenizer, "init_kwargs", {}).get("add_bos_token"))  # maybe by TransformerLens
    return _rule_of(tokenizer) if changed else begins_with_bos(tokenizer)


def puts_bos_first(model: Any) -> bool:
    """Return whether a tokenizer puts the beginning-of-text token before a text by its own rules.

    The tokenizer of a TransformerLens model always does. For a model, the rule that `load_model` recorded
    counts, or the checkpoint's own tokenizer is read again (offline); without one, the convention of the
    model's family counts, and of an unknown family, what the tokenizer does.

    Args:
        model: A TransformerLens model, or a Hugging Face tokenizer.
    """
    tokenizer = getattr(model, "tokenizer", None)
    return begins_with_bos(model) if tokenizer is None else _rule_of(tokenizer)


def begins_with_bos(tokenizer: Any) -> bool:
    """Return whether what this tokenizer object makes of a text begins with the BOS token."""
    bos, text = tokenizer.bos_token_id, "a"
    ids, bare = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    return bos is not None and ids[: len(bare) + 1] == [bos, *bare]


def _rule_of(tokenizer: Any) -> bool:
    rule = getattr(tokenizer, "bos_by_own_rule", None)
    if rule is None:
        rule = _rule_in_files(str(getattr(tokenizer, "name_or_path", "") or ""))
    return begins_with_bos(tokenizer) if rule is None else rule


@lru_cache(maxsize=64)
def _rule_in_files(name: str) -> bool | None:
    from transformers import AutoTokenizer

    try:
        with quiet():
            return begins_with_bos(AutoTokenizer.from_pretrained(name, local_files_only=True))
    except Exception:  # without tokenizer files, transformers raises errors of almost any class
        found = find_model(name)
        return None if found is None else found[0].bos
