r"""Training a tuned lens: each layer's translator learns to say what the model will say in the end.

The loss of translator i is :math:`D_{KL}(p_{L-1} \,\|\, p_i)`, a mean over tokens. Its gradient at the logits
is :math:`(p_i - p_{L-1}) / n`, so only the unembedding and the final norm are gone back through, never the
blocks: the residuals of all layers are read once a batch, without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from memlens.errors import NonFiniteError, OptionError, SequenceError, check_option
from memlens.forward.hooks import capturing, hook_name
from memlens.forward.trunk import Trunk
from memlens.instruments.decode.decoding import STATISTICS, compare_to_final, portions
from memlens.instruments.decode.lens import TunedLens
from memlens.models.provenance import describe
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet

LENS_OPTIMIZERS = ("sgd", "adam")
_RATES = {"sgd": 1.0, "adam": 1e-3}
_KL = STATISTICS.index("kl_to_final")


@dataclass(frozen=True)
class _Options:
    """Every parameter of a training; kept in the lens."""

    steps: int
    lr: float
    batch_size: int
    optimizer: str
    momentum: float
    weight_decay: float
    clip: float
    holdout: float
    max_holdout: int
    seed: int

    def __post_init__(self) -> None:
        check_option("optimizer", self.optimizer, LENS_OPTIMIZERS)
        for name in ("steps", "lr", "batch_size", "clip", "max_holdout"):
            if getattr(self, name) <= 0:
                raise OptionError(f"{name}={getattr(self, name)} trains nothing: give a number above 0.")
        if not 0 < self.holdout < 1:
            raise OptionError(f"holdout={self.holdout} is not a share: give a number between 0 and 1.")
        if self.weight_decay < 0 or not 0 < self.momentum < 1:
            raise OptionError(
                f"weight_decay={self.weight_decay} or momentum={self.momentum} is out of range: give at "
                "least 0, and a number between 0 and 1."
            )

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step: a linear fall to 0, for Adam after a warm-up."""
        warm = min(1000, self.steps // 5) if self.optimizer == "adam" else 0
        return (step + 1) / warm if step < warm else (self.steps - step) / (self.steps - warm)


def train_tuned_lens(
    model: Any,
    sequences: SequenceSet | Int[Tensor, "seq pos"] | Int[np.ndarray, "seq pos"] | Sequence[Sequence[int]],
    *,
    steps: int = 250,
    lr: float | None = None,
    batch_size: int = 16,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    clip: float = 1.0,
    holdout: float = 0.1,
    max_holdout: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    r"""Train the translators of all layers at once; the model stays as it is.

    Every token of every sequence counts, prefix and continuation alike. Do not train on the sequences that
    are to be decoded: translators would learn to bring their very continuations forward, and early layers
    would seem to know them.

    Args:
        model: A TransformerLens model; training runs on its device.
        sequences: What it reads: a set, token ids `[seq, pos]`, or lists of token ids.
        steps: Updates.
        lr: Learning rate at its highest; 1 for "sgd" (multiplied by 1 - `momentum`) and 1e-3 for "adam".
            It falls linearly to 0.
        batch_size: Sequences of an update.
        optimizer: "sgd" (Nesterov momentum, as in Belrose et al. 2023) or "adam" (AMSGrad, with a warm-up of
            a fifth of the steps, 1,000 at most).
        momentum: Of SGD; Adam's first beta.
        weight_decay: Pulls translators to the identity.
        clip: Largest norm of the gradient of all translators together.
        holdout: Share of the sequences that is not trained on.
        max_holdout: Most sequences that are held out.
        seed: Of the split and of the order of sequences. The same seed gives the same lens on the same
            device and number of threads.
        progress: Show a bar.

    Returns:
        The lens; `lens.heldout_kl()` says for each layer what was gained on the held-out sequences.

    Raises:
        OptionError: An unknown optimizer or a number out of range.
        SequenceError: Fewer than two sequences, or sequences that do not fit the model.
        NonFiniteError: The divergence is not finite: the learning rate was too high.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> rows = ml.load_sequences("zoo", model)[:8]
        >>> lens = ml.lens.train_tuned_lens(model, rows, steps=2, batch_size=4, progress=False)
        >>> lens.heldout_kl().columns.tolist()
        ['layer', 'logit_lens', 'tuned_lens', 'n_tokens']
    """
    rate = _RATES.get(optimizer, 1.0) if lr is None else lr
    options = _Options(
        steps, rate, batch_size, optimizer, momentum, weight_decay, clip, holdout, max_holdout, seed
    )  # fmt: skip
    trunk, seqs = Trunk(model), _as_set(sequences)
    check_sequences(seqs, model, on_eos="keep")
    if len(seqs) < 2:
        raise SequenceError("one sequence cannot be both trained on and held out: give two or more.")
    order = torch.randperm(len(seqs), generator=torch.Generator().manual_seed(seed)).tolist()
    n_held = min(max_holdout, max(1, round(holdout * len(seqs))), len(seqs) - 1)
    held, trained = seqs[order[:n_held]], seqs[order[n_held:]]
    translators = _Translators(trunk, options)
    with tqdm(total=steps, disable=not progress, desc="train tuned lens", unit="step") as bar:
        for tokens, mask in _batches(trained, options):
            loss = translators.step(tokens, mask)
            bar.set_postfix(kl=f"{loss:.3f}", refresh=False)
            bar.update()
    weight, bias = translators.weight.detach().cpu(), translators.bias.detach().cpu()
    lens = TunedLens(weight, bias, _facts(model, options, len(trained)))
    table = _heldout(trunk, held, lens, batch_size)
    return TunedLens(weight, bias, {**lens.facts, "heldout": table})


class _Translators:
    """The translators in training, and their optimizer."""

    def __init__(self, trunk: Trunk, options: _Options) -> None:
        shape, device = (trunk.n_layers, trunk.d_model), trunk.device
        self.trunk, self.options = trunk, options
        self.weight = nn.Parameter(torch.zeros(*shape, trunk.d_model, device=device))
        self.bias = nn.Parameter(torch.zeros(*shape, device=device))
        self.n_steps = 0
        self.optimizer = _optimizer([self.weight, self.bias], options)
        self.highest = self.optimizer.param_groups[0]["lr"]

    def step(self, tokens: Int[Tensor, "seq pos"], mask: Bool[Tensor, "seq pos"]) -> float:
        """Do one update; return the divergence before it, a mean over layers."""
        with torch.no_grad():
            hidden, final = _hidden(self.trunk, tokens, mask)
            translated = hidden + torch.baddbmm(self.bias[:, None], hidden, self.weight.mT)
            loss, slope = _divergence(self.trunk, translated, final)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the tuned lens' divergence is {loss} at step {self.n_steps}: give a smaller lr than "
                f"{self.options.lr}."
            )
        self.weight.grad, self.bias.grad = slope.mT @ hidden, slope.sum(1)
        nn.utils.clip_grad_norm_([self.weight, self.bias], self.options.clip)
        self.optimizer.param_groups[0]["lr"] = self.highest * self.options.rate(self.n_steps)
        self.optimizer.step()
        self.n_steps += 1
        return loss


def _optimizer(parameters: list[nn.Parameter], options: _Options) -> torch.optim.Optimizer:
    decay, beta = options.weight_decay, options.momentum
    if options.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=options.lr, betas=(beta, 0.999), weight_decay=decay, amsgrad=True
        )
    lr = options.lr * (1 - beta)  # momentum multiplies steps by 1 / (1 - beta) in the long run
    return torch.optim.SGD(parameters, lr=lr, momentum=beta, nesterov=True, weight_decay=decay)


def _hidden(
    trunk: Trunk, tokens: Int[Tensor, "seq pos"], mask: Bool[Tensor, "seq pos"]
) -> tuple[Float[Tensor, "layer row d_model"], Float[Tensor, "row d_model"]]:
    """The inputs of all blocks, in float32, and the output of the last one, where `mask` is True."""
    names = [hook_name("resid_post", layer) for layer in range(trunk.n_layers - 1)]
    start = trunk.embed(tokens)
    with capturing(trunk.model, names) as store:
        final = trunk.run(start)
    return torch.stack([start[mask], *(store[name][mask] for name in names)]).float(), final[mask]


def _divergence(
    trunk: Trunk, translated: Float[Tensor, "layer row d_model"], final: Float[Tensor, "row d_model"]
) -> tuple[float, Float[Tensor, "layer row d_model"]]:
    """The mean divergence over layers and rows, and the slope of the layers' sum at the residuals."""
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
    """Divergence of each layer on held-out sequences by the logit lens and by the tuned lens."""
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


def _batches(seqs: SequenceSet, options: _Options) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches: shuffled passes, one after the other."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    order: list[int] = []
    for _ in range(options.steps):
        while len(order) < options.batch_size:
            order += torch.randperm(len(seqs), generator=generator).tolist()
        rows = order[: options.batch_size]  # across two passes a row may stand here twice
        del order[: options.batch_size]
        width = int(seqs.lengths[rows].max())
        yield seqs.tokens[rows, :width], seqs.mask[rows, :width]


def _as_set(sequences: Any) -> SequenceSet:
    if isinstance(sequences, SequenceSet):
        return sequences
    rows = sequences.tolist() if isinstance(sequences, Tensor | np.ndarray) else sequences
    return SequenceSet.from_tokens(rows, prefix_len=1)


def _facts(model: Any, options: _Options, n_trained: int) -> Mapping[str, Any]:
    about = describe(model)
    kept = {name: about[name] for name in ("revision", "processed_weights", "memlens", "dtype")}
    training = {**asdict(options), "n_sequences": n_trained, "loss": "kl"}
    return {"base_model": about["model"], **kept, "training": training}
