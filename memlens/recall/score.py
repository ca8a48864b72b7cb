"""`score_recall`: did the model recall each sequence, and how nearly."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt
from torch import Tensor

from memlens.errors import SequenceError
from memlens.forward.baseline import Reducer, teacher_forced
from memlens.forward.exclusive import computes
from memlens.forward.generate import greedy_continuations
from memlens.forward.metrics import BUILT_IN, METRICS, TargetStats
from memlens.forward.trunk import require_model
from memlens.models.provenance import describe
from memlens.options import options_class
from memlens.recall.columns import (
    METRIC_GROUPS,
    SCORE_COLUMNS,
    MetricGroup,
    extraction_strength,
    min_k,
    min_k_plus_plus,
    near_verbatim_columns,
    near_verbatim_texts,
    nll,
    nll_per_zlib_byte,
    perplexity,
    zlib_ratio,
)
from memlens.recall.sampling import Sampling, samples_needed
from memlens.recall.scores import RecallScores
from memlens.recall.taxonomy import TaxonomyRules, prefix_overlap, taxonomy_columns
from memlens.recall.trivial import TrivialRules, trivial_columns
from memlens.recall.truth_ratio import ALTERNATIVES, truth_ratio
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import decode


@options_class
class _Extras:
    """Which further columns are wanted, with their parameters (see `score_recall`)."""

    metrics: tuple[MetricGroup, ...]
    min_k: Annotated[float, Field(gt=0, le=1)]
    sampling: Sampling
    n_samples: PositiveInt
    probability: Annotated[float, Field(gt=0, lt=1)]
    rules: TrivialRules
    taxonomy: TaxonomyRules

    def settings(self) -> dict[str, str | float | int]:
        """Return the parameters of the chosen groups."""
        wanted = [group for group in METRIC_GROUPS if group in self.metrics]
        found: dict[str, str | float | int] = {"metrics": ",".join(wanted)}
        if "likelihood" in self.metrics:
            found["min_k_share"] = self.min_k
        if "sampling" in self.metrics:
            found |= {
                "n_samples": self.n_samples,
                "probability": self.probability,
                **self.sampling.settings(),
            }
        if "trivial" in self.metrics:
            found |= self.rules.settings()
        return found | (self.taxonomy.settings() if "taxonomy" in self.metrics else {})

    def reducers(self) -> Mapping[str, Reducer]:
        """Return what the forward pass has to compute besides `TargetStats`."""
        wanted = "sampling" in self.metrics and not self.sampling.plain
        return {"sample_logprob": self.sampling.logprob} if wanted else {}

    def columns(
        self, model: Any, seqs: SequenceSet, stats: TargetStats, sampled: Mapping[str, Tensor]
    ) -> dict[str, np.ndarray]:
        """Return the columns that do not need generation."""
        tokenizer = getattr(model, "tokenizer", None)
        found: dict[str, np.ndarray] = {}
        if "likelihood" in self.metrics:
            values = {
                "nll": nll(stats),
                "perplexity": perplexity(stats),
                "min_k": min_k(stats, self.min_k),
                "min_k_plus_plus": min_k_plus_plus(stats, self.min_k),
            }
            if tokenizer is not None:
                values["zlib_ratio"] = zlib_ratio(stats, decode(tokenizer, seqs.rows()))
                texts = decode(tokenizer, seqs.halves()[1])
                values["nll_per_zlib_byte"] = nll_per_zlib_byte(stats, texts)
            found |= {name: value.numpy() for name, value in values.items()}
        if "sampling" in self.metrics:
            # Under the plain scheme it is the model's own log-probability.
            logprob = sampled.get("sample_logprob", stats.logprob)
            total = logprob.where(seqs.target_mask, 0).sum(-1).numpy()
            needed = samples_needed(total, self.probability)
            discoverable = (needed <= self.n_samples).astype(np.int64)
            found |= {"sample_logprob": total, "samples_needed": needed, "np_discoverable": discoverable}
        if "near_verbatim" in self.metrics:
            found["extraction_strength"] = extraction_strength(stats).numpy()
        if {"trivial", "taxonomy"} & set(self.metrics):
            trivial = trivial_columns(seqs, tokenizer, self.rules)
            found |= trivial if "trivial" in self.metrics else {}
            if "taxonomy" in self.metrics:
                memorized = METRICS["exact_match"].of(stats).numpy()
                found |= taxonomy_columns(memorized, prefix_overlap(*seqs.halves()), trivial, self.taxonomy)
        return found


NEAR_TIE = 1e-4
"""The order of logits this close may depend on the batch size, the device or the library's version."""


@computes
def score_recall(
    model: Any,
    seqs: SequenceSet,
    *,
    batch_size: int | None = None,
    generate: bool = True,
    ban_eos: bool = False,
    metrics: Collection[str] = METRIC_GROUPS,
    min_k: float = 0.2,
    sampling: Sampling | None = None,
    n_samples: int = 100,
    probability: float = 0.5,
    rules: TrivialRules | None = None,
    taxonomy: TaxonomyRules | None = None,
    progress: bool = True,
) -> RecallScores:
    """Score how well a model recalls each continuation from its prefix.

    One teacher-forced pass decides the exact match: the greedy continuation is the true one if and only if
    the arg-max is correct at every target position, given the true tokens before it. Only sequences with an
    error are decoded, starting at their first error.

    The columns (`SCORE_COLUMNS`): `exact_match` (0 or 1), `matching_prefix` (tokens), `target_accuracy`
    (share, teacher-forced), `target_logprob` (mean, nats), `target_rank` (mean, zero-based),
    `completion_entropy` (sum over the steps, nats), `margin` (smallest lead of a target's logit over the
    best other token's) and `near_tie` (that lead is below 1e-4 in size, so exact match is a matter of
    rounding); with `generate` also `memorization_score` (M, the share of positions at which the greedy
    continuation equals the true one), `generated` (its token ids) and `generated_text`.

    Further columns come in groups, computed in the same passes: `likelihood` (`nll`, `perplexity`, `min_k`,
    `min_k_plus_plus`, and with a tokenizer `zlib_ratio` and `nll_per_zlib_byte`; see
    `memlens.recall.columns`; and `truth_ratio` where the set's table has a column `alternatives`, a list of
    wrong continuations per sequence, as texts or token ids; see `truth_ratio`), `sampling`
    (`sample_logprob`, `samples_needed`, `np_discoverable`; see `Sampling` and `samples_needed`),
    `near_verbatim` (`extraction_strength`; with `generate` also `rouge_l`, `edit_distance` and
    `edit_similarity` by tokens and by `_characters`, `longest_run` and where it begins; see
    `near_verbatim_columns`), `trivial` (`copied_share`, `type_token_ratio`, `repeated_share`,
    `step_share` and the flag `trivial`; see `trivial_continuations`) and `taxonomy` (`prefix_rouge_l`,
    `prefix_rouge_3` and the flags `guessed` and `recollected`; see `memlens.recall.taxonomy`, and
    `recall_classes` for the class as a word).

    Args:
        model: A TransformerLens model. Hooks set on it act as in any of its forward passes.
        seqs: The sequences; first checked against the model's vocabulary and context.
        batch_size: Sequences per forward pass; by default as many as the memory budget allows, on a CPU no
            more than are fastest (2,048 positions; decoding goes by the budget alone).
        generate: Decode the sequences with an error, for M.
        ban_eos: Never emit the end-of-text token, as in decoding with a minimum length: its logit counts as
            minus infinity in every number.
        metrics: The groups of further columns, from `METRIC_GROUPS`; all by default, none with ().
        min_k: Share of the targets that `min_k` and `min_k_plus_plus` average over.
        sampling: Temperature, top-k and top-p of the group `sampling`; by default the model's own
            distribution.
        n_samples: n of `np_discoverable`.
        probability: p of `samples_needed` and `np_discoverable`.
        rules: Thresholds of the flag `trivial`.
        taxonomy: Thresholds of the flag `guessed`.
        progress: Show progress bars.

    Returns:
        The scores, in the order of the set.

    Raises:
        EmptySetError: There are no sequences.
        VocabularyError: A token id is outside the vocabulary.
        SequenceError: A sequence is too long; or with `ban_eos` a target is the end-of-text token, or the
            tokenizer has none.
        OptionError: An unknown group, or a number out of range.
        NonFiniteError: The model's logits are NaN or infinite; names the first layer.

    Source: exact match and completion entropy as in arXiv 2501.05078 (Exact Match, Completion Entropy), M as
    in arXiv 2603.21658, section 3.2; deciding the exact match without decoding is ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> recall = ml.score_recall(model, ml.load_sequences("zoo", model)[:4], progress=False)
        >>> set(recall.table["exact_match"]) <= {0, 1}
        True
    """
    require_model(model)
    check_sequences(seqs, model, on_eos="raise" if ban_eos else "keep")
    extras = _Extras(
        metrics=metrics,  # pyright: ignore[reportArgumentType]
        min_k=min_k,
        sampling=sampling or Sampling(),
        n_samples=n_samples,
        probability=probability,
        rules=rules or TrivialRules(),
        taxonomy=taxonomy or TaxonomyRules(),
    )
    banned = _eos(model) if ban_eos else None
    seqs = seqs.with_table(seqs.table.drop(columns=list(SCORE_COLUMNS), errors="ignore"))
    stats, sampled = teacher_forced(
        model, seqs, extras.reducers(), batch_size=batch_size, banned=banned, progress=progress
    )
    columns = {**_teacher_forced_columns(stats), **extras.columns(model, seqs, stats, sampled)}
    if "likelihood" in extras.metrics and ALTERNATIVES in seqs.table:
        columns["truth_ratio"] = truth_ratio(model, seqs, stats, batch_size=batch_size, banned=banned)
    if generate:
        generated = generated_after(model, seqs, stats, batch_size, banned, progress)
        columns |= _generated_columns(model, seqs, generated)
        if "near_verbatim" in extras.metrics:
            truth = seqs.halves()[1]
            columns |= near_verbatim_columns(list(columns["generated"]), truth)
            if "generated_text" in columns:
                columns |= near_verbatim_texts(columns["generated_text"], decode(model.tokenizer, truth))
    ordered = {name: columns[name] for name in SCORE_COLUMNS if name in columns}
    settings = {"generate": generate, "ban_eos": ban_eos, "near_tie_margin": NEAR_TIE, **extras.settings()}
    attrs = {**describe(model), **settings, "batch_size": batch_size or 0}
    return RecallScores(seqs.table.assign(**ordered), seqs, attrs)


def _eos(model: Any) -> int:
    eos = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    if eos is None:
        raise SequenceError("ban_eos=True, but the model's tokenizer has no end-of-text token")
    return int(eos)


def _teacher_forced_columns(stats: TargetStats) -> dict[str, Any]:
    columns = {name: METRICS[name].of(stats).numpy() for name in BUILT_IN}
    for name in ("exact_match", "matching_prefix"):
        columns[name] = columns[name].astype(np.int64)
    columns["target_accuracy"] = _share(stats.correct, stats.mask)
    return {**columns, "near_tie": np.abs(columns["margin"]) < NEAR_TIE}


def _share(right: Tensor, mask: Tensor) -> np.ndarray:
    """Return the share of correct targets, in double precision: it is compared with thresholds."""
    return ((right & mask).sum(-1).double() / mask.sum(-1)).numpy()


@computes
def generated_after(
    model: Any,
    seqs: SequenceSet,
    stats: TargetStats,
    batch_size: int | None = None,
    banned: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Return the greedy continuations `[seq, target]`: the true one if there is no error."""
    generated = seqs.target_ids.clone()
    first_error = METRICS["matching_prefix"].of(stats).long()
    rows = (first_error < seqs.n_targets).nonzero()[:, 0]
    if len(rows):
        generated[rows] = greedy_continuations(
            model,
            seqs,
            rows,
            first_error[rows],
            first_token=stats.argmax[rows, first_error[rows]],
            batch_size=batch_size,
            banned=banned,
            progress=progress,
        )
    return generated


def _generated_columns(model: Any, seqs: SequenceSet, generated: Tensor) -> dict[str, Any]:
    lists = [row[:n] for row, n in zip(generated.tolist(), seqs.n_targets.tolist(), strict=True)]
    columns: dict[str, Any] = {
        "memorization_score": _share(generated == seqs.target_ids, seqs.target_mask),
        "generated": pd.Series(lists, dtype=object),
    }
    tokenizer = getattr(model, "tokenizer", None)
    return columns if tokenizer is None else {**columns, "generated_text": decode(tokenizer, lists)}
