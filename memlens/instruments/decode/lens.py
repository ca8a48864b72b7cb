"""The tuned lens: an affine translator for each layer before the model's own norm and unembedding."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from memlens.errors import OptionError, ResultError, check_option
from memlens.forward.trunk import Trunk
from memlens.instruments.decode.lens_files import LensContent, digest, read_lens, write_own, write_published
from memlens.models.provenance import describe

LENS_LAYOUTS = ("memlens", "published")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TunedLens:
    r"""Affine translators from the residual of each layer to that of the last one.

    The lens of the residual :math:`h` at the input of block i is
    :math:`\mathrm{softmax}(W_U\,\mathrm{LN}_f(h + W_i h + b_i))`. Translators are numbered as in published
    files: translator i reads the *input* of block i, so that the output of block l (`resid_post`) is read by
    translator l + 1. The output of the last block is what the model itself unembeds and has no translator.
    With :math:`W_i = 0` and :math:`b_i = 0` it is the logit lens, exactly.

    Source: Belrose et al. 2023, arXiv 2303.08112; the residual form and the numbering are those of the
    `tuned-lens` library's files.

    Attributes:
        weight: :math:`W_i`, `[layer, d_model, d_model]`, float32; it multiplies column vectors.
        bias: :math:`b_i`, `[layer, d_model]`.
        facts: What the lens belongs to and how it came about: `base_model`, `revision`,
            `processed_weights`, and for a lens trained here `training` (every parameter) and `heldout`
            (see `heldout_kl`).

    Raises:
        OptionError: Shapes that do not fit each other.

    Example:
        >>> lens = TunedLens.identity(n_layers=2, d_model=3)
        >>> lens.translate(torch.ones(1, 3), layer=0)
        tensor([[1., 1., 1.]])
    """

    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.weight.shape)
        if len(shape) != 3 or shape[1] != shape[2] or tuple(self.bias.shape) != shape[:2]:
            raise OptionError(
                f"translators of shapes {shape} and {tuple(self.bias.shape)} do not fit: give "
                "[layer, d_model, d_model] and [layer, d_model]."
            )

    @classmethod
    def identity(cls, n_layers: int, d_model: int, **facts: Any) -> TunedLens:
        """Return the lens that changes nothing: the logit lens."""
        return cls(torch.zeros(n_layers, d_model, d_model), torch.zeros(n_layers, d_model), facts)

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read a lens that `save` wrote, or a published one (`config.json` and `params.pt`).

        Args:
            path: The folder, or a file in it. Published files are read as tensors; no code in them runs.

        Raises:
            SourceNotFoundError: There is nothing at `path`.
            FileFormatError: The folder is not a lens, or its files are damaged or do not belong together.
        """
        content = read_lens(path)
        return cls(content.weight, content.bias, content.facts)

    def save(self, path: str | Path, *, layout: str = "memlens") -> Path:
        """Write the lens to a folder, each file whole or not at all.

        Args:
            path: The folder; made where it is missing.
            layout: "memlens" (`lens.safetensors`, and `lens.json` with all facts) or "published" (`params.pt`
                and `config.json` as the `tuned-lens` library reads them; training facts are left out).

        Returns:
            The folder.

        Raises:
            OptionError: Another layout.
        """
        check_option("layout", layout, LENS_LAYOUTS)
        content = LensContent(self.weight, self.bias, dict(self.facts))
        return (write_own if layout == "memlens" else write_published)(path, content)

    @property
    def n_layers(self) -> int:
        """Layers of the model that the lens is for."""
        return len(self.weight)

    @property
    def d_model(self) -> int:
        """Width of the residual."""
        return self.weight.shape[-1]

    @cached_property
    def fingerprint(self) -> str:
        """A short name of the numbers in the lens; results record it."""
        return digest(self.weight, self.bias)

    @property
    def name(self) -> str:
        """The model that the lens was made for, and its fingerprint."""
        return f"{self.facts.get('base_model') or 'unnamed'} {self.fingerprint}"

    def translate(
        self, resid: Float[Tensor, "*batch d_model"], layer: int
    ) -> Float[Tensor, "*batch d_model"]:
        """Translate the output of a block (`resid_post`).

        Args:
            resid: Residuals at the output of block `layer`.
            layer: The block; -1 for the embedding (the input of block 0). The last block's output is
                returned as it is.

        Returns:
            :math:`h + W_{l+1} h + b_{l+1}`, computed in float32 and returned in the type of `resid`.
        """
        if layer + 1 >= self.n_layers:
            return resid
        weight, bias = self.weight[layer + 1].to(resid.device), self.bias[layer + 1].to(resid.device)
        wide = resid.float()
        return (wide + torch.nn.functional.linear(wide, weight, bias)).to(resid.dtype)

    def check_fits(self, model: Any) -> None:
        """Raise `ResultError` unless the lens has the depth and width of a model, and its kind of weights.

        Processed weights (LayerNorms folded, writing weights centered) give other residuals than those that
        the translators were trained on. Another name of the model is only logged: names differ by folder.
        """
        trunk, about = Trunk(model), describe(model)
        if (self.n_layers, self.d_model) != (trunk.n_layers, trunk.d_model):
            raise ResultError(
                f"the tuned lens has {self.n_layers} layers of width {self.d_model} and the model "
                f"{trunk.n_layers} of width {trunk.d_model}: load the lens that was trained on this model."
            )
        trained = bool(self.facts.get("processed_weights", False))
        if bool(about["processed_weights"]) != trained:
            raise ResultError(
                f"the tuned lens was trained with processed_weights={trained} and the model has "
                f"{not trained}: load the model with process_weights={trained}."
            )
        base = str(self.facts.get("base_model") or "")
        if base and _short(base) != _short(str(about["model"])):
            _LOG.warning("the tuned lens was trained on %r and reads %r", base, about["model"])

    def heldout_kl(self) -> pd.DataFrame:
        r"""Return how far each layer's lens stood from the model on held-out text, before and after training.

        Returns:
            One row per layer: `layer` (-1 is the embedding), `logit_lens` and `tuned_lens`, the mean
            :math:`D_{KL}(p_{L-1} \,\|\, p_l)` in nats, and `n_tokens`.

        Raises:
            ResultError: The lens does not say: it was not trained by memlens.
        """
        if "heldout" not in self.facts:
            raise ResultError(
                f"the tuned lens {self.name} holds no held-out divergence: only `train_tuned_lens` keeps one."
            )
        return pd.DataFrame(self.facts["heldout"])

    def __repr__(self) -> str:
        return f"TunedLens({self.name!r}, {self.n_layers} layers, d_model={self.d_model})"


def as_lens(lens: str | Path | TunedLens, model: Any) -> TunedLens | None:
    """Return the lens that an option means and check that it fits; None for the logit lens.

    Args:
        lens: "logit", a `TunedLens`, or the folder of one.
        model: The model that is to be read.

    Raises:
        SourceNotFoundError: No such folder.
        FileFormatError: The folder is not a lens.
        ResultError: The lens is of another shape than the model, or for processed weights.
    """
    if isinstance(lens, str) and lens == "logit":
        return None
    found = lens if isinstance(lens, TunedLens) else TunedLens.load(lens)
    found.check_fits(model)
    return found


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
