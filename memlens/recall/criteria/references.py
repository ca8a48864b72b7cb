"""Reference predictors, which decide in place of the probed model whether part of a prompt is enough.

References have vocabularies of their own, so they work on text: a reference is asked for the word that
follows a prompt, and answers for the first token of that word under its own tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from memlens.errors import OptionError
from memlens.forward.baseline import teacher_forced_stats
from memlens.forward.memory import rows_per_batch
from memlens.models.bos import expects_bos
from memlens.models.provenance import describe
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet, unique_ids
from memlens.sequences.tokenizing import Tokenizer, bos_id, encode_answers, need_tokenizer


@dataclass(frozen=True)
class Answers:
    """What a reference says about each prompt's target.

    Attributes:
        top1: 1 where the target is more likely than every other token (a tie is not a prediction), else 0;
            NaN where the reference could not be asked (no token of the prompt is left before the target).
        logprob: Log-probability of the target's first token, in nats; NaN as above.
        n_passes: Number of forward passes.
    """

    top1: Float[np.ndarray, "prompt"]
    logprob: Float[np.ndarray, "prompt"]
    n_passes: int


@runtime_checkable
class Reference(Protocol):
    """Something that predicts the word after a prompt."""

    name: str

    def answer(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Answers:
        """Return how likely each target is after its prompt, and whether it is the prediction."""
        ...


class ModelReference:
    """A TransformerLens model as a reference, run in as few batches as memory allows.

    Args:
        model: The model, with its own tokenizer.
        name: Its name in results; by default the model's.
        prepend_bos: Prepend the beginning-of-text token to every prompt; "auto": see `load_sequences`.

    Raises:
        SequenceError: The model has no tokenizer, or a tokenizer without such a token.
    """

    tokenizer: Tokenizer
    name: str

    def __init__(
        self, model: Any, *, name: str | None = None, prepend_bos: bool | Literal["auto"] = "auto"
    ) -> None:
        self.model = model
        self.tokenizer = need_tokenizer(getattr(model, "tokenizer", None))
        self.name = name or str(describe(model)["model"])
        begins = expects_bos(model, self.tokenizer) if prepend_bos == "auto" else prepend_bos
        self._bos = [bos_id(self.tokenizer)] if begins else []

    def answer(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Answers:
        """See `Reference.answer`.

        Raises:
            SequenceError: A prompt is longer than the model's context.
        """
        rows, prefix = target_rows(self.tokenizer, prompts, targets)
        rows, prefix = [[*self._bos, *row] for row in rows], prefix + len(self._bos)
        top1, logprob = np.full((2, len(rows)), np.nan)
        asked = np.flatnonzero(prefix > 0)
        if not len(asked):
            return Answers(top1, logprob, 0)
        seqs = SequenceSet.from_tokens([rows[i] for i in asked], prefix[asked])
        check_sequences(seqs, self.model, on_eos="keep")
        device = next(self.model.parameters()).device
        size = batch_size or rows_per_batch(self.model.cfg, int(seqs.lengths.max()), device)
        stats = teacher_forced_stats(self.model, seqs, batch_size=size, progress=progress)
        top1[asked] = (stats.margin[:, 0] > 0).double().numpy()
        logprob[asked] = stats.logprob[:, 0].numpy()
        return Answers(top1, logprob, -(-len(asked) // size))


def target_rows(
    tokenizer: Tokenizer, prompts: Sequence[str], targets: Sequence[str]
) -> tuple[list[list[int]], Int[np.ndarray, "prompt"]]:
    """Return the tokens of each prompt and of its target's first token, and the number before that token.

    Prompt and target are tokenized together, with one space between them, as `read_idioms` does.
    """
    texts = [f"{prompt} {target}" for prompt, target in zip(prompts, targets, strict=True)]
    rows, prefix_len = encode_answers(tokenizer, prompts, texts)
    return [row[: n + 1] for row, n in zip(rows, prefix_len, strict=True)], prefix_len


def as_references(
    references: Any,
    probed: Any = None,
    *,
    prepend_bos: bool | Literal["auto"] = "auto",
    allow_probed: bool = False,
) -> tuple[dict[str, Reference], bool]:
    """Return the references under unique names, and whether the probed model is among them.

    Args:
        references: A model or another reference, a sequence of them, or a mapping from names to them.
        probed: The model that is studied, or its name.
        prepend_bos: For models: see `ModelReference`.
        allow_probed: Accept the probed model as a reference.

    Raises:
        OptionError: There is no reference, or the probed model is one.
    """
    given = references.values() if isinstance(references, Mapping) else references
    found = [
        reference if isinstance(reference, Reference) else ModelReference(reference, prepend_bos=prepend_bos)
        for reference in (given if isinstance(references, Mapping | list | tuple) else [given])
    ]
    if not found:
        raise OptionError("references is empty: give at least one model or NgramReference")
    circular = [r.name for r in found if is_probed(r, probed)]
    if circular and not allow_probed:
        raise OptionError(
            f"the reference {circular[0]!r} is the probed model, which would judge itself: give other "
            "references, or set allow_probed_reference=True"
        )
    names = list(references) if isinstance(references, Mapping) else [r.name for r in found]
    return dict(zip(unique_ids(names), found, strict=True)), bool(circular)


def is_probed(reference: Any, probed: Any) -> bool:
    """Return whether a reference, or a bare model, is the probed model or has its name."""
    if probed is None:
        return False
    model = getattr(reference, "model", reference)
    if model is probed or reference is probed:
        return True
    name = probed if isinstance(probed, str) else name_of(probed)
    return name != "unnamed" and name in {getattr(reference, "name", None), name_of(model)}


def name_of(model: Any) -> str | None:
    """Return the name of a model or a reference; None for anything without a name."""
    return str(describe(model)["model"]) if hasattr(model, "cfg") else getattr(model, "name", None)
