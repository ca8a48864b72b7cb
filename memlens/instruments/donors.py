"""Two models at once: whether a donor fits a model, and what a result records about it.

A donor gives its activations, its unembedding or its weights to another model: a clean twin, a checkpoint,
the base of a fine-tune, another seed. A model is a donor of itself, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memlens.errors import DonorError
from memlens.forward.hooks import has_site
from memlens.forward.trunk import Trunk
from memlens.models.provenance import describe
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.store.fingerprint import model_fingerprint


def check_donor(
    model: Any,
    donor: Any,
    sequences: SequenceSet | None = None,
    *,
    sites: Sequence[str] = (),
    same_logits: bool = False,
) -> None:
    """Raise `DonorError`, naming the first thing that differs, unless a donor's parts fit a model's.

    Compared are the architecture, whether weights are processed, the numbers of layers, heads, key-value
    heads and neurons, the widths, whether blocks are parallel, and the vocabulary: a token that both
    tokenizers know must have one id, and an id that both use must be one token (further tokens, as of a
    fine-tune, may follow). Backend, device and precision may differ: what a donor gives is converted where it
    is written.

    Args:
        model: A TransformerLens model.
        donor: Another one.
        sequences: What both are to run.
        sites: Short names of the sites at which activations are taken.
        same_logits: Also require vocabularies of one size, as for unembedding.

    Raises:
        UnsupportedModelError: The donor is not a TransformerLens model, or is in training mode with dropout.
        DonorError: It does not fit.
        SequenceError, VocabularyError: The sequences are too long for the donor, or have ids it does not.

    Example:
        >>> import memlens as ml
        >>> model, other = ml.load_model("zoo/pythia-s"), ml.load_model("zoo/pythia-xs")
        >>> check_donor(model, ml.load_model("zoo/pythia-s-clean"))
        >>> check_donor(model, other)
        Traceback (most recent call last):
        memlens.errors.DonorError: the donor zoo/pythia-xs has 4 layers and zoo/pythia-s has 6: give another.
    """
    here, there = _shape(model), _shape(donor)
    if donor is model:
        return
    names = str(describe(donor)["model"]), str(describe(model)["model"])
    for what, own in here.items():
        other = there[what]
        if own != other and "" not in (own, other):
            raise DonorError(
                f"the donor {names[0]} has {other} {what} and {names[1]} has {own}: give another."
            )
    if same_logits and model.cfg.d_vocab != donor.cfg.d_vocab:
        raise DonorError(
            f"the donor {names[0]} has {donor.cfg.d_vocab} token ids and {names[1]} has {model.cfg.d_vocab}: "
            "their logits do not correspond."
        )
    for site in sites:
        if not has_site(donor, site):
            raise DonorError(f"the donor {names[0]} has no site {site!r}: load it with the other backend.")
    _check_tokens(model, donor, names)
    if sequences is not None:
        check_sequences(sequences, donor, on_eos="keep")


def _shape(model: Any) -> dict[str, Any]:
    """What must be equal, by the word for it in an error."""
    trunk, about = Trunk(model), describe(model)
    return {
        "as its architecture": about["architecture"],
        "weights": "processed" if about["processed_weights"] else "unprocessed",
        "blocks": "parallel" if trunk.parallel else "sequential",
        "layers": trunk.n_layers,
        "heads per layer": trunk.n_heads,
        "key-value heads per layer": trunk.n_kv_heads,
        "numbers per head": trunk.d_head,
        "numbers in its residual": trunk.d_model,
        "neurons per layer": getattr(model.cfg, "d_mlp", None) or "",
    }


def _check_tokens(model: Any, donor: Any, names: tuple[str, str]) -> None:
    there, here = _vocabulary(donor), _vocabulary(model)
    if there is None or here is None or there == here:
        return
    for token in sorted(there.keys() & here.keys(), key=here.__getitem__):
        if there[token] != here[token]:
            raise DonorError(
                f"the token {token!r} is {there[token]} for the donor {names[0]} and {here[token]} for "
                f"{names[1]}: give a model with the same vocabulary."
            )
    tokens = {i: token for token, i in there.items()}
    for token, i in here.items():
        if tokens.get(i, token) != token:
            raise DonorError(
                f"the id {i} is {tokens[i]!r} for the donor {names[0]} and {token!r} for {names[1]}: give a "
                "model with the same vocabulary."
            )


def _vocabulary(model: Any) -> dict[str, int] | None:
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else tokenizer.get_vocab()


def donor_settings(donor: Any) -> dict[str, Any]:
    """Return what a result records about its donor, as the setting `donor`."""
    about = describe(donor)
    known = {name: about[name] for name in ("model", "revision", "backend", "dtype")}
    return {"donor": {**known, "fingerprint": model_fingerprint(donor)}}
