"""Noise in the residual: how recall breaks, and how far later layers take the noise out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from memlens.attribution.noise import NoiseSource, check_alpha, residual_noise
from memlens.attribution.replacing import where
from memlens.attribution.sources import ActivationSource
from memlens.errors import OptionError, check_option
from memlens.models.hooks import HookFn, check_layer, hook_name
from memlens.models.trunk import Trunk
from memlens.results import Result
from memlens.sequences import SequenceSet
from memlens.sweeps import Batch, ByBatch, Intervention, sweep
from memlens.sweeps.metrics import MetricLike
from memlens.sweeps.run import kept

__all__ = ["SIMILARITY_AT", "perturb_residual"]

SIMILARITY_AT = ("prompt", "last_prompt", "targets")


def perturb_residual(
    model: Any,
    sequences: SequenceSet,
    *,
    alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    layer: int = 0,
    site: str = "resid_post",
    positions: str = "prompt",
    scale: str = "norm",
    n_draws: int = 1,
    seed: int = 0,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match", "matching_prefix"),
    recovery: bool = True,
    similarity_at: str = "prompt",
    **options: Any,
) -> Result:
    r"""Add relative Gaussian noise to the residual stream, at several strengths, and measure recall.

    With the residual :math:`h_t` of position :math:`t` and :math:`\epsilon_t \sim N(0, I_d)`,

    .. math:: h'_t = h_t + \alpha \, \frac{\lVert h_t \rVert_2}{\sqrt{d}} \, \epsilon_t

    (``scale="norm"``: the noise is about :math:`\alpha` times as long as the residual), or with the standard
    deviation of :math:`h_t` over its features in place of the root mean square (``scale="std"``).
    :math:`\epsilon` is drawn once for a sequence and is the same for all strengths. That arXiv 2603.21658
    adds such noise at the first layer, with :math:`\alpha` from 0 to 0.5, and looks at how far later layers
    return to the clean state, is second-hand knowledge; the formula, the grid, site, positions, draws, and
    cosine as the similarity are our choices.

    *Recovery*: with the clean and the noisy residual :math:`h_l, h'_l` after block :math:`l`,

    .. math:: s_l = \cos(h_l, h'_l), \qquad R = s_{L-1} - s_\text{noise}

    where :math:`s_\text{noise}` is taken right after the noise was added; each is a mean over positions.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        alphas: Strengths, each once.
        layer: The block whose site is disturbed.
        site: "resid_post" (the block's output) or "resid_pre" (its input: at block 0 the embeddings).
        positions: Where noise is added: "prompt" (the positions given to the model), "all" (the continuation
            that is fed to the model, too), "targets" or "last_prompt".
        scale: "norm" or "std".
        n_draws: Draws of the noise; more than one adds a dimension `draw`.
        seed: A sequence's noise depends on the seed, its row and the draw only.
        metrics: As for `sweep`.
        recovery: Measure similarities too: every later block then runs at all positions, which takes longer.
        similarity_at: Which positions similarities are averaged over: "prompt", "last_prompt" (the one that
            predicts the first target) or "targets" (all predicting positions).
        options: Further options of `sweep`.

    Returns:
        Kind "residual_perturbation": each metric `(sequence, alpha)` and its baseline `(sequence)`; with
        `recovery` also `similarity` `(sequence, alpha, layer)` from the disturbed block on,
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
    _check(alphas, n_draws, similarity_at)
    check_layer(layer, Trunk(model).n_layers)
    layers = range(layer, Trunk(model).n_layers)
    places = [hook_name(site, layer), *(hook_name("resid_post", n) for n in layers)]
    clean = ActivationSource(model, sequences, list(dict.fromkeys(places)))
    interventions = []
    for draw in range(n_draws):
        source = NoiseSource(seed, draw)  # shared, so that each batch's noise is drawn once
        for alpha in alphas:
            coords = {"alpha": alpha} | ({"draw": draw} if n_draws > 1 else {})
            noise = residual_noise(
                model, source, alpha=alpha, layer=layer, site=site, positions=positions, scale=scale,
                coords=coords,
            )  # fmt: skip
            looks = _Similarities(clean, places, similarity_at).intervention()
            interventions.append(noise + looks if recovery else noise)
    settings = {
        "alphas": alphas, "layer": layer, "site": site, "positions": positions, "scale": scale,
        "n_draws": n_draws, "seed": seed, "recovery": recovery, "similarity": "cosine",
        "similarity_at": similarity_at,
    }  # fmt: skip
    result = sweep(
        model, sequences, interventions, metrics, kind="residual_perturbation", settings=settings, **options
    )
    if not recovery:
        return result
    return kept(Result(_with_recovery(result.data, layers)), options.get("out"))


class _Similarities:
    """Looks at the residual of one disturbed run and compares it with the clean one.

    Args:
        clean: The clean residual.
        places: Where to look, the noise's own place first; a hook may stand twice.
        positions: Which positions are averaged over.
    """

    def __init__(self, clean: ActivationSource, places: Sequence[str], positions: str) -> None:
        self.clean, self.places, self.positions = clean, list(places), positions
        self._seen: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What it is, without what it happens to hold."""
        return {**self.__dict__, "_seen": {}}

    def intervention(self) -> Intervention:
        """Return the looking as an intervention that changes nothing."""
        hooks = [(name, self._look(name)) for name in dict.fromkeys(self.places)]
        return Intervention("similarity", hooks, observed=self.observed)

    def observed(self, batch: Batch) -> dict[str, Tensor]:
        """Return the similarities of the batch that was run last."""
        return {f"similarity {i}": self._seen[name] for i, name in enumerate(self.places)}

    def _look(self, name: str) -> ByBatch:
        def make(batch: Batch) -> HookFn:
            clean, at = self.clean.of(batch)[name], where(batch, self.positions)
            assert at is not None

            def look(x: Tensor, hook: Any) -> None:
                self._seen[name] = _mean_cosine(clean, x, at)

            return look

        return ByBatch(make)


def _mean_cosine(
    clean: Float[Tensor, "batch pos d"], noisy: Float[Tensor, "batch pos d"], at: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """The mean over some positions of the cosine of two residuals."""
    width = min(clean.shape[1], noisy.shape[1])
    clean, noisy, at = clean[:, :width].float(), noisy[:, :width].float(), at[:, :width].to(clean.device)
    cosine = torch.cosine_similarity(clean, noisy, dim=-1)
    return torch.where(at, cosine, 0).sum(1) / at.sum(1)


def _with_recovery(data: xr.Dataset, layers: Sequence[int]) -> xr.Dataset:
    """Put the similarities of all places into one array, and take their difference."""
    parts = [data[f"similarity {i}"] for i in range(len(layers) + 1)]
    curve = xr.concat(parts[1:], "layer").assign_coords(layer=list(layers))
    rest = [dim for dim in parts[0].dims if dim not in ("sequence", "alpha")]
    return data.drop_vars([str(part.name) for part in parts]).assign(
        similarity=curve.transpose("sequence", "alpha", "layer", *rest),
        similarity_at_noise=parts[0],
        recovery=parts[-1] - parts[0],
    )


def _check(alphas: Sequence[float], n_draws: int, similarity_at: str) -> None:
    check_option("similarity_at", similarity_at, SIMILARITY_AT)
    if not alphas or len(set(alphas)) < len(alphas):
        raise OptionError(f"alphas={list(alphas)}: give at least one strength, and each only once.")
    for alpha in alphas:
        check_alpha(alpha)
    if n_draws < 1:
        raise OptionError(f"n_draws={n_draws}: draw at least once.")
