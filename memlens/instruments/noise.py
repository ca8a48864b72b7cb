"""Recall under perturbation: Gaussian noise in the residual stream, and replaced prefix tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Unpack, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from memlens.choices import NoiseScale, NoiseSite, Positions
from memlens.errors import OptionError, check_option
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource
from memlens.forward.exclusive import computes
from memlens.forward.hooks import HookFn, check_layer, hook_name
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.replacing import POSITIONS, where
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_strengths
from memlens.results.readings import read_strengths
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.corrupt import corrupt
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import ByBatch, Intervention
from memlens.sweeps.run import SweepOptions, kept, sweep

NOISE_SITES: tuple[str, ...] = get_args(NoiseSite)
SCALES: tuple[str, ...] = get_args(NoiseScale)


class NoiseSource:
    """Standard normal numbers for every sequence, kept while their batch runs.

    A sequence's numbers depend only on the seed, its row and the number of the draw.
    """

    seed: int
    draw: int

    def __init__(self, seed: int, draw: int) -> None:
        self.seed, self.draw = seed, draw
        self._key: tuple[Any, ...] = ()
        self._noise = torch.empty(0)

    def __getstate__(self) -> dict[str, int]:
        """What identifies it, without the numbers it currently holds."""
        return {"seed": self.seed, "draw": self.draw}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)

    def of(self, batch: Batch, width: int) -> Float[Tensor, "batch pos width"]:
        """Return `width` numbers per position; 0 where there is no token."""
        key = (width, *batch.rows.tolist())
        if key != self._key:
            out = np.zeros((*batch.tokens.shape, width), dtype=np.float32)
            for i, (row, n) in enumerate(zip(batch.rows.tolist(), batch.mask.sum(1).tolist(), strict=True)):
                rng = np.random.default_rng([self.seed % 2**64, row, self.draw])
                out[i, :n] = rng.standard_normal((n, width), dtype=np.float32)
            self._key, self._noise = key, torch.from_numpy(out).to(batch.tokens.device)
        return self._noise


@computes
def embedding_noise(
    model: Any,
    *,
    alphas: Sequence[float] = (0.5,),
    positions: Positions = "prompt",
    scale: str = "norm",
    n_draws: int = 1,
    seed: int = 0,
) -> list[Intervention]:
    r"""Return relative Gaussian noise on the embeddings, one intervention per strength.

    The noise corrupts the prompt. It is added to the residual at the input of layer 0 (token embeddings,
    plus position embeddings if the model adds them there). Formula and arguments are those of
    `perturb_residual`; more than one draw adds a coordinate `draw`.

    Raises:
        OptionError: Unknown positions or scale, or a strength that is negative, not finite or given twice.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> edits = ml.edits.embedding_noise(model, alphas=[0.5, 1.0])
        >>> ml.sweep(model, seqs, edits, progress=False)["target_logprob"].dims
        ('sequence', 'alpha')
    """
    where: dict[str, Any] = {"layer": 0, "site": "resid_pre", "positions": positions, "scale": scale}
    return residual_noise(model, alphas, **where, n_draws=n_draws, seed=seed, name="embedding noise")


@computes
def residual_noise(
    model: Any,
    alphas: Sequence[float],
    *,
    layer: int,
    site: str,
    positions: str,
    scale: str,
    n_draws: int,
    seed: int,
    name: str = "noise",
) -> list[Intervention]:
    """Return the noise of `perturb_residual`, one intervention per draw and strength."""
    check_option("site", site, NOISE_SITES)
    check_option("positions", positions, POSITIONS)
    check_option("scale", scale, SCALES)
    check_layer(layer, Trunk(model).n_layers)
    if not alphas or len(set(alphas)) < len(alphas):
        raise OptionError(f"alphas={list(alphas)}: give at least one strength, and each only once.")
    for alpha in alphas:
        if not 0 <= alpha < float("inf"):
            raise OptionError(f"alpha={alpha}: give a finite number, 0 or above.")
    _check_draws(n_draws)

    def noise(source: NoiseSource, alpha: float) -> ByBatch:
        def make(batch: Batch) -> HookFn:
            at = where(batch, positions)

            def fn(x: Tensor, hook: Any) -> Tensor:
                noise = source.of(batch, x.shape[-1])[:, : x.shape[1]].to(x)
                new = x + alpha * _size(x, scale) * noise
                return new if at is None else torch.where(at[:, : x.shape[1], None].to(x.device), new, x)

            return fn

        return ByBatch(make)

    sources = [NoiseSource(seed, draw) for draw in range(n_draws)]  # each is shared by all strengths
    return [
        Intervention(
            f"{name} {alpha:g}",
            [(hook_name(site, layer), noise(source, alpha))],
            {"alpha": alpha} | ({"draw": source.draw} if n_draws > 1 else {}),
        )
        for source in sources
        for alpha in alphas
    ]


def _check_draws(n_draws: int) -> None:
    if n_draws < 1:
        raise OptionError(f"n_draws={n_draws}: draw at least once.")


def _size(x: Float[Tensor, "*batch d"], scale: str) -> Float[Tensor, "*batch 1"]:
    """The standard deviation that one feature's noise of strength 1 has."""
    if scale == "std":
        return x.std(-1, keepdim=True, correction=0)
    return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5


SIMILARITY_AT = ("prompt", "last_prompt", "targets")


@computes
def perturb_residual(
    model: Any,
    sequences: SequenceSet,
    *,
    alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    layer: int = 0,
    site: str = "resid_post",
    positions: Positions = "prompt",
    scale: str = "norm",
    n_draws: int = 1,
    seed: int = 0,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match", "matching_prefix"),
    recovery: bool = True,
    similarity_at: str = "prompt",
    **options: Unpack[SweepOptions],
) -> Result:
    r"""Add relative Gaussian noise to the residual stream, at several strengths, and measure recall.

    With the residual :math:`h_t` of position :math:`t` and :math:`\epsilon_t \sim N(0, I_d)`,

    .. math:: h'_t = h_t + \alpha \, \frac{\lVert h_t \rVert_2}{\sqrt{d}} \, \epsilon_t

    (``scale="norm"``: the noise is about :math:`\alpha` times as long as the residual), or with the standard
    deviation of :math:`h_t` over its features in place of the root mean square (``scale="std"``).
    :math:`\epsilon` is drawn once per sequence and is the same for all strengths. That arXiv 2603.21658
    adds such noise at the first layer, with :math:`\alpha` from 0 to 0.5, and measures how far later layers
    return to the clean state, is second-hand knowledge; the formula, the strengths, site, positions, draws,
    and cosine as the similarity are our choices.

    *Recovery*: with the clean and the noisy residual :math:`h_l, h'_l` after layer :math:`l`,

    .. math:: s_l = \cos(h_l, h'_l), \qquad R = s_{L-1} - s_\text{noise}

    where :math:`s_\text{noise}` is taken right after the noise was added; each is a mean over positions.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        alphas: Strengths, each once.
        layer: The layer whose residual is perturbed.
        site: "resid_post" (the layer's output) or "resid_pre" (its input: at layer 0 the embeddings).
        positions: Where noise is added: "prompt" (the positions of the prompt), "all" (also the continuation
            that is fed to the model), "targets" or "last_prompt".
        scale: "norm" or "std".
        n_draws: Draws of the noise; more than one adds a dimension `draw`.
        seed: A sequence's noise depends only on the seed, its row and the draw.
        metrics: As for `sweep`.
        recovery: Also measure similarities: every later layer then runs at all positions, which takes longer.
        similarity_at: Positions over which similarities are averaged: "prompt", "last_prompt" (the one that
            predicts the first target) or "targets" (all predicting positions).
        options: Further options of `sweep`.

    Returns:
        Kind "residual_perturbation": each metric `(sequence, alpha)` and its baseline `(sequence)`; with
        `recovery` also `similarity` `(sequence, alpha, layer)` from the perturbed layer on,
        `similarity_at_noise` and `recovery` `(sequence, alpha)`.

    Raises:
        OptionError: An unknown option, a strength that is negative or not finite, or one given twice.
        SiteError: A layer that does not exist.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> result = ml.perturb_residual(model, seqs, alphas=[0, 0.5], progress=False)
        >>> result["similarity"].dims, bool((abs(result["recovery"].sel(alpha=0)) < 1e-5).all())
        (('sequence', 'alpha', 'layer'), True)
    """
    alphas = [float(alpha) for alpha in alphas]
    check_option("similarity_at", similarity_at, SIMILARITY_AT)
    noise: dict[str, Any] = {"layer": layer, "site": site, "positions": positions, "scale": scale}
    noise |= {"n_draws": n_draws, "seed": seed}
    interventions = residual_noise(model, alphas, **noise)
    layers = range(layer, Trunk(model).n_layers)
    if recovery:
        places = [hook_name(site, layer), *(hook_name("resid_post", n) for n in layers)]
        clean = ActivationSource(model, sequences, list(dict.fromkeys(places)))
        interventions = [edit + _similarities(clean, places, similarity_at) for edit in interventions]
    settings = {"alphas": alphas, **noise, "recovery": recovery, "similarity": "cosine"}
    settings |= {"similarity_at": similarity_at}
    result = sweep(
        model, sequences, interventions, metrics, kind="residual_perturbation", settings=settings, **options
    )
    if not recovery:
        return result
    return kept(Result(_with_recovery(result.data, layers)), options.get("out"))


def _similarities(clean: ActivationSource, places: Sequence[str], positions: str) -> Intervention:
    """An intervention that changes nothing and compares the residual at some places with the clean one."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> ByBatch:
        def make(batch: Batch) -> HookFn:
            before, at = clean.of(batch)[name], where(batch, positions)
            assert at is not None

            def fn(x: Tensor, hook: Any) -> None:
                seen[name] = _mean_cosine(before, x, at)

            return fn

        return ByBatch(make)

    def observed(batch: Batch) -> dict[str, Tensor]:
        return {f"similarity {i}": seen[name] for i, name in enumerate(places)}

    hooks = [(name, look(name)) for name in dict.fromkeys(places)]
    return Intervention("similarity", hooks, observed=observed)


def _mean_cosine(
    clean: Float[Tensor, "batch pos d"], noisy: Float[Tensor, "batch pos d"], at: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """The cosine of two residuals, averaged over the positions `at`."""
    width = min(clean.shape[1], noisy.shape[1])
    clean, noisy, at = clean[:, :width].float(), noisy[:, :width].float(), at[:, :width].to(clean.device)
    cosine = torch.cosine_similarity(clean, noisy, dim=-1)
    return torch.where(at, cosine, 0).sum(1) / at.sum(1)


def _with_recovery(data: xr.Dataset, layers: Sequence[int]) -> xr.Dataset:
    """Join the similarities of all layers into one array, and add the recovery."""
    parts = [data[f"similarity {i}"] for i in range(len(layers) + 1)]
    curve = xr.concat(parts[1:], "layer").assign_coords(layer=list(layers))
    rest = [dim for dim in parts[0].dims if dim not in ("sequence", "alpha")]
    return data.drop_vars([str(part.name) for part in parts]).assign(
        similarity=curve.transpose("sequence", "alpha", "layer", *rest),
        similarity_at_noise=parts[0],
        recovery=parts[-1] - parts[0],
    )


STRATEGIES = ("random", "first", "last")

_COUNTS = (0, 1, 2, 4, 8)


@computes
def perturb_prefix(
    model: Any,
    sequences: SequenceSet,
    *,
    counts: Sequence[int] | None = None,
    strategy: str = "random",
    n_draws: int = 1,
    seed: int = 0,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match", "matching_prefix"),
    **options: Unpack[SweepOptions],
) -> Result:
    """Replace more and more tokens of each prefix and measure recall of the unchanged continuation.

    The new tokens are drawn from the set's own unigram distribution and differ from those they replace, as
    in `corrupt`. Within a draw, a larger count repeats the replacements of the smaller ones and adds to them.
    A beginning-of-text token that memlens prepended stays. (Ours: a complement to the noise of
    `perturb_residual`, which corresponds to no token.)

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        counts: How many tokens are replaced, each number once; by default 0, 1, 2, 4 and 8, as far as every
            prefix is that long.
        strategy: Which tokens: "random" ones of the prefix, its "first" or its "last".
        n_draws: Draws; more than one adds a dimension `draw`.
        seed: The same seed gives the same replacements, whatever the batches.
        metrics: As for `sweep`.
        options: Further options of `sweep`.

    Returns:
        Kind "prefix_perturbation": each metric `(sequence, replaced)`, and its baseline `(sequence)`.

    Raises:
        OptionError: Unknown strategy, no counts, one given twice or below 0, or `n_draws` below 1.
        SequenceError: A prefix is shorter than a count (names the row).

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> result = ml.instruments.perturb_prefix(model, seqs, counts=[0, 4], progress=False)
        >>> result["exact_match"].dims
        ('sequence', 'replaced')
    """
    check_sequences(sequences, model, on_eos="keep")
    counts = _checked(sequences, counts, strategy)
    _check_draws(n_draws)
    draws: dict[str, Any] = {"strategy": strategy, "n_draws": n_draws, "seed": seed}
    interventions = [
        Intervention(
            f"{count} replaced, draw {draw}",
            [] if changed is None else [(hook_name("resid_pre", 0), _embedding(Trunk(model), changed))],
            {"replaced": count} | ({"draw": draw} if n_draws > 1 else {}),
        )
        for count, draw, changed in replaced_prefixes(sequences, counts, **draws)
    ]
    settings = {"counts": counts, **draws, "nested": True}
    return sweep(
        model, sequences, interventions, metrics, kind="prefix_perturbation", settings=settings, **options
    )


def _embedding(trunk: Trunk, sequences: SequenceSet) -> ByBatch:
    """Write the embeddings of other sequences, row by row."""

    def make(batch: Batch) -> HookFn:
        tokens = sequences.tokens[batch.rows, : batch.tokens.shape[1]].to(batch.tokens.device)
        new = trunk.embed(tokens)
        return lambda x, hook: new.to(x)

    return ByBatch(make)


def replaced_prefixes(
    sequences: SequenceSet, counts: Sequence[int], *, strategy: str, n_draws: int, seed: int
) -> Iterator[tuple[int, int, SequenceSet | None]]:
    """Yield each count, the number of each draw, and the changed set; None for a count of 0."""
    most = max(counts)
    first = 1 if sequences.attrs.get("prepend_bos") else 0
    table = sequences.table.drop(columns="text", errors="ignore")
    for draw in range(n_draws):
        own = int(np.random.SeedSequence([seed % 2**64, draw]).generate_state(1)[0])
        where = {"first": range(first, first + most), "last": range(-most, 0)}.get(strategy)
        full = corrupt(sequences, seed=own, n_tokens=most, positions=where) if most else sequences
        order = torch.from_numpy(_order(full, sequences, strategy, own))
        for count in counts:
            tokens = torch.where(order < count, full.tokens, sequences.tokens)
            attrs = {**sequences.attrs, "corruption": "replace_token", "replaced": count}
            changed = SequenceSet(tokens, sequences.mask, sequences.prefix_len, table, attrs)
            yield count, draw, changed if count else None


def _order(full: SequenceSet, clean: SequenceSet, strategy: str, seed: int) -> np.ndarray:
    """When each replaced position is replaced, 0 for the first; a large number elsewhere."""
    order = np.full(clean.tokens.shape, clean.tokens.numel() + 1)
    rng = np.random.default_rng(seed)
    for row, changed in enumerate((full.tokens != clean.tokens).numpy()):
        places = np.flatnonzero(changed)
        when = np.arange(len(places))
        if strategy == "last":
            when = when[::-1]
        elif strategy == "random":
            when = rng.permutation(when)
        order[row, places] = when
    return order


def _checked(sequences: SequenceSet, counts: Sequence[int] | None, strategy: str) -> list[int]:
    check_option("strategy", strategy, STRATEGIES)
    if counts is None:
        first = 1 if sequences.attrs.get("prepend_bos") else 0
        shortest = int(sequences.prefix_len.min()) - first if len(sequences) else 0
        return [n for n in _COUNTS if n <= shortest]
    if not counts or len(set(counts)) < len(counts) or min(counts) < 0:
        raise OptionError(f"counts={list(counts)}: give at least one number, 0 or above, each only once.")
    return list(counts)


register_kind("prefix_perturbation", plot=plot_strengths, reading=read_strengths)
register_kind("residual_perturbation", plot=plot_strengths, reading=read_strengths)
