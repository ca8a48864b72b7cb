r"""Training a tuned lens: each layer's translator learns to predict the final prediction of the model.

The loss of translator i is :math:`D_{KL}(p_{L-1} \,\|\, p_i)`, a mean over tokens. Its gradient at the logits
is :math:`(p_i - p_{L-1}) / n`, so the backward pass only runs through the unembedding and the final norm. The
residuals of all layers are read once per batch, without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from memlens.errors import NonFiniteError, SequenceError
from memlens.forward.capture import run_capturing
from memlens.forward.exclusive import computes
from memlens.forward.hooks import hook_name
from memlens.forward.trunk import Trunk
from memlens.instruments.decode.decoding import STATISTICS, compare_to_final, portions
from memlens.instruments.decode.lens import TunedLens
from memlens.instruments.decode.lens_options import LensOptions
from memlens.models.provenance import describe
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet

_KL = STATISTICS.index("kl_to_final")


@computes
def train_tuned_lens(
    model: Any,
    sequences: SequenceSet | Int[Tensor, "seq pos"] | Int[np.ndarray, "seq pos"] | Sequence[Sequence[int]],
    options: LensOptions | None = None,
    *,
    progress: bool = True,
    **changes: Any,
) -> TunedLens:
    r"""Train the translators of all layers at once; the model stays unchanged.

    Every token of every sequence counts, prefix and continuation alike. Do not train on the sequences to be
    decoded: the translators would learn their continuations, and early layers would seem to know them.

    Args:
        model: A TransformerLens model; training runs on its device.
        sequences: The training text: a set, token ids `[seq, pos]`, or lists of token ids.
        options: See `LensOptions`.
        progress: Show a progress bar.
        changes: Fields of `LensOptions` to set, such as `steps=80`.

    Returns:
        The lens; `lens.heldout_kl()` reports the gain of each layer on the held-out sequences.

    Raises:
        OptionError: An unknown option, or a value that is not allowed.
        SequenceError: Fewer than two sequences, or sequences that do not fit the model.
        NonFiniteError: The divergence is not finite because the learning rate was too high.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> rows = ml.load_sequences("zoo", model)[:8]
        >>> lens = ml.lens.train_tuned_lens(model, rows, steps=2, batch_size=4, progress=False)
        >>> lens.heldout_kl().columns.tolist()
        ['layer', 'logit_lens', 'tuned_lens', 'n_tokens']
    """
    options = replace(options or LensOptions(), **changes)
    trunk, seqs = Trunk(model), _as_set(sequences)
    check_sequences(seqs, model, on_eos="keep")
    if len(seqs) < 2:
        raise SequenceError("one sequence cannot be both trained on and held out: give two or more.")
    order = torch.randperm(len(seqs), generator=torch.Generator().manual_seed(options.seed)).tolist()
    n_held = min(options.max_holdout, max(1, round(options.holdout * len(seqs))), len(seqs) - 1)
    held, trained = seqs[order[:n_held]], seqs[order[n_held:]]
    translators = _Translators(trunk, options)
    with tqdm(total=options.steps, disable=not progress, desc="train tuned lens", unit="step") as bar:
        for tokens, mask in _batches(trained, options):
            loss = translators.step(tokens, mask)
            bar.set_postfix(kl=f"{loss:.3f}", refresh=False)
            bar.update()
    weight, bias = translators.weight.detach().cpu(), translators.bias.detach().cpu()
    lens = TunedLens(weight, bias, _facts(model, options, len(trained)))
    table = _heldout(trunk, held, lens, options.batch_size)
    return TunedLens(weight, bias, {**lens.facts, "heldout": table})


class _Translators:
    """The translators being trained, and their optimizer."""

    def __init__(self, trunk: Trunk, options: LensOptions) -> None:
        shape, device = (trunk.n_layers, trunk.d_model), trunk.device
        self.trunk, self.options = trunk, options
        self.weight = nn.Parameter(torch.zeros(*shape, trunk.d_model, device=device))
        self.bias = nn.Parameter(torch.zeros(*shape, device=device))
        self.n_steps = 0
        self.optimizer = _optimizer([self.weight, self.bias], options)
        self.highest = self.optimizer.param_groups[0]["lr"]

    def step(self, tokens: Int[Tensor, "seq pos"], mask: Bool[Tensor, "seq pos"]) -> float:
        """Do one update and return the divergence before it, a mean over layers."""
        with torch.no_grad():
            hidden, final = _hidden(self.trunk, tokens, mask)
            translated = hidden + torch.baddbmm(self.bias[:, None], hidden, self.weight.mT)
            loss, slope = _divergence(self.trunk, translated, final)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the tuned lens' divergence is {loss} at step {self.n_steps}: give a smaller lr than "
                f"{self.options.highest_lr:g}."
            )
        self.weight.grad, self.bias.grad = slope.mT @ hidden, slope.sum(1)
        nn.utils.clip_grad_norm_([self.weight, self.bias], self.options.clip)
        self.optimizer.param_groups[0]["lr"] = self.highest * self.options.rate(self.n_steps)
        self.optimizer.step()
        self.n_steps += 1
        return loss


def _optimizer(parameters: list[nn.Parameter], options: LensOptions) -> torch.optim.Optimizer:
    lr, decay, beta = options.highest_lr, options.weight_decay, options.momentum
    if options.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, betas=(beta, 0.999), weight_decay=decay, amsgrad=True)
    lr *= 1 - beta  # in the long run, momentum multiplies steps by 1 / (1 - beta)
    return torch.optim.SGD(parameters, lr=lr, momentum=beta, nesterov=True, weight_decay=decay)


def _hidden(
    trunk: Trunk, tokens: Int[Tensor, "seq pos"], mask: Bool[Tensor, "seq pos"]
) -> tuple[Float[Tensor, "layer row d_model"], Float[Tensor, "row d_model"]]:
    """The inputs of all layers, in float32, and the output of the last one, where `mask` is True."""
    names = [hook_name("resid_pre", layer) for layer in range(trunk.n_layers)]
    final, acts = run_capturing(trunk, tokens, names)
    return torch.stack([acts[name][mask] for name in names]).float(), final[mask]


def _divergence(
    trunk: Trunk, translated: Float[Tensor, "layer row d_model"], final: Float[Tensor, "row d_model"]
) -> tuple[float, Float[Tensor, "layer row d_model"]]:
    """Return the mean divergence over layers and rows, and the gradient of their sum over layers."""
    total, slope = torch.zeros((), device=final.device), torch.empty_like(translated)
    n_layers, n_rows = translated.shape[:2]
    for part in portions(trunk, n_rows, n_layers + 1):
        logp = trunk.unembed(final[part]).float().log_softmax(-1)
        leaf = translated[:, part].to(final.dtype).requires_grad_()
        with torch.enable_grad():
            logits = trunk.unembed(leaf)
        logq = logits.detach().float().log_softmax(-1)
        probs = logp.exp()
        total += (probs * (logp - logq)).sum()
        at_logits = (logq.exp_() - probs).to(logits.dtype)
        slope[:, part] = torch.autograd.grad(logits, leaf, at_logits)[0].float() / n_rows
    return float(total) / (n_layers * n_rows), slope


@torch.no_grad()
def _heldout(trunk: Trunk, seqs: SequenceSet, lens: TunedLens, batch_size: int) -> list[dict[str, Any]]:
    """Divergence of each layer on held-out sequences, with the logit lens and with the tuned lens."""
    sums, n = torch.zeros(trunk.n_layers + 1, 2), 0
    layers = range(-1, trunk.n_layers - 1)
    for first in range(0, len(seqs), batch_size):
        part = seqs[first : first + batch_size]
        mask = part.mask.to(trunk.device)
        hidden, final = _hidden(trunk, part.tokens.to(trunk.device), mask)
        hidden = hidden.to(final.dtype)
        read = [lens.translate(h, layer) for h, layer in zip(hidden, layers, strict=True)]
        sites = torch.stack([*hidden, *read, final], dim=1)
        ids = torch.zeros(len(final), dtype=torch.long, device=final.device)
        kl = compare_to_final(trunk, sites, final, ids, sites.shape[1] - 1)[..., _KL].sum(0).cpu()
        sums[:-1] += torch.stack([kl[: trunk.n_layers], kl[trunk.n_layers : -1]], dim=1)
        n += len(final)
    return [
        {"layer": layer, "logit_lens": float(before), "tuned_lens": float(after), "n_tokens": n}
        for layer, (before, after) in zip(range(-1, trunk.n_layers), (sums / n).tolist(), strict=True)
    ]


def _batches(seqs: SequenceSet, options: LensOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one batch per step from shuffled passes over the sequences."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    order: list[int] = []
    for _ in range(options.steps):
        while len(order) < options.batch_size:
            order += torch.randperm(len(seqs), generator=generator).tolist()
        rows = order[: options.batch_size]  # a row may occur twice where two passes meet
        del order[: options.batch_size]
        width = int(seqs.lengths[rows].max())
        yield seqs.tokens[rows, :width], seqs.mask[rows, :width]


def _as_set(sequences: Any) -> SequenceSet:
    if isinstance(sequences, SequenceSet):
        return sequences
    rows = sequences.tolist() if isinstance(sequences, Tensor | np.ndarray) else sequences
    return SequenceSet.from_tokens(rows, prefix_len=1)


def _facts(model: Any, options: LensOptions, n_trained: int) -> Mapping[str, Any]:
    about = describe(model)
    kept = {name: about[name] for name in ("revision", "processed_weights", "memlens", "dtype")}
    training = {**asdict(options), "lr": options.highest_lr, "n_sequences": n_trained, "loss": "kl"}
    return {"base_model": about["model"], **kept, "training": training}
