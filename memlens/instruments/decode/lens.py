"""The tuned lens: an affine translator for each layer before the model's own norm and unembedding."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memlens.errors import FileFormatError, OptionError, ResultError, SourceNotFoundError, check_option
from memlens.files import (
    expanded,
    finish_replacing,
    parsing,
    plain_tensors,
    read_json,
    reason_of,
    replacing,
    replacing_files,
    write_json,
)
from memlens.forward.trunk import Trunk
from memlens.models.provenance import describe

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TunedLens:
    r"""Affine translators from the residual of each layer to that of the last one.

    With the lens, the prediction from the residual :math:`h` at the input of block i is
    :math:`\mathrm{softmax}(W_U\,\mathrm{LN}_f(h + W_i h + b_i))`. Translators are numbered as in published
    files: translator i reads the *input* of block i, so the output of block l (`resid_post`) is read by
    translator l + 1. The output of the last block, which the model itself unembeds, has no translator. With
    :math:`W_i = 0` and :math:`b_i = 0` this is exactly the logit lens.

    Source: Belrose et al. 2023, arXiv 2303.08112; the residual form and the numbering are those of the files
    of the `tuned-lens` library.

    Attributes:
        weight: :math:`W_i`, `[layer, d_model, d_model]`, float32; it multiplies column vectors.
        bias: :math:`b_i`, `[layer, d_model]`.
        facts: The model that the lens belongs to and its training: `base_model`, `revision`,
            `processed_weights`, and if it was trained by memlens `training` (all options) and `heldout` (see
            `heldout_kl`).

    Raises:
        OptionError: The shapes of weight and bias do not fit.

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
        folder = expanded(path)
        if not folder.exists():
            raise SourceNotFoundError(
                f"there is no tuned lens at {folder}: give the folder that holds its files, or 'logit'."
            )
        folder = finish_replacing(folder if folder.is_dir() else folder.parent)
        for files, read in ((OWN_FILES, _read_own), (PUBLISHED_FILES, _read_published)):
            if all((folder / name).is_file() for name in files):
                lens = read(folder)
                if not (lens.weight.isfinite().all() and lens.bias.isfinite().all()):
                    raise FileFormatError(
                        f"the tuned lens in {folder} holds NaN or infinity: train or download it again."
                    )
                return lens
        raise FileFormatError(
            f"{folder} is not a tuned lens: it needs {' and '.join(OWN_FILES)}, or "
            f"{' and '.join(PUBLISHED_FILES)}."
        )

    def save(self, path: str | Path, *, layout: str = "memlens") -> Path:
        """Write the lens to a folder and return the folder.

        An older lens there stays until all of the new one is written.

        Args:
            path: The folder; created if it does not exist.
            layout: "memlens" (`lens.safetensors`, and `lens.json` with all facts) or "published" (`params.pt`
                and `config.json` as the `tuned-lens` library reads them, without the training facts).

        Raises:
            OptionError: Another layout.
            WriteError: A file cannot be written.
        """
        layouts = {"memlens": _write_own, "published": _write_published}
        check_option("layout", layout, list(layouts))
        with replacing_files(path) as part:
            layouts[layout](part, self)
        return expanded(path)

    @property
    def n_layers(self) -> int:
        """Number of layers of the model."""
        return len(self.weight)

    @property
    def d_model(self) -> int:
        """Width of the residual."""
        return self.weight.shape[-1]

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the numbers in the lens, which results record."""
        found = hashlib.sha256()
        for tensor in (self.weight, self.bias):
            array = tensor.detach().cpu().float().contiguous().numpy()
            found.update(repr(array.shape).encode())
            found.update(array.data)
        return found.hexdigest()[:16]

    @property
    def name(self) -> str:
        """The model that the lens belongs to, and its fingerprint."""
        return f"{self.facts.get('base_model') or 'unnamed'} {self.fingerprint}"

    def translate(
        self, resid: Float[Tensor, "*batch d_model"], layer: int
    ) -> Float[Tensor, "*batch d_model"]:
        """Translate the output of a block (`resid_post`).

        Args:
            resid: Residuals at the output of block `layer`.
            layer: The block; -1 for the embedding (the input of block 0). The output of the last block is
                returned unchanged.

        Returns:
            :math:`h + W_{l+1} h + b_{l+1}`, computed in float32 and returned in the type of `resid`.
        """
        if layer + 1 >= self.n_layers:
            return resid
        weight, bias = self.weight[layer + 1].to(resid.device), self.bias[layer + 1].to(resid.device)
        wide = resid.float()
        return (wide + torch.nn.functional.linear(wide, weight, bias)).to(resid.dtype)

    def check_fits(self, model: Any) -> None:
        """Raise `ResultError` unless the lens fits the depth, the width and the processing of a model.

        Processed weights (LayerNorms folded, writing weights centered) change the residuals that the
        translators were trained on. A different model name is only logged, because names depend on folders.
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
        r"""Return the divergence of each layer's lens from the model on held-out text.

        Returns:
            One row per layer: `layer` (-1 is the embedding), the mean :math:`D_{KL}(p_{L-1} \,\|\, p_l)` in
            nats of the `logit_lens` and the `tuned_lens`, and `n_tokens`.

        Raises:
            ResultError: The lens was not trained by memlens.
        """
        if "heldout" not in self.facts:
            raise ResultError(
                f"the tuned lens {self.name} holds no held-out divergence: only `train_tuned_lens` keeps one."
            )
        return pd.DataFrame(self.facts["heldout"])

    def __repr__(self) -> str:
        return f"TunedLens({self.name!r}, {self.n_layers} layers, d_model={self.d_model})"


def as_lens(lens: str | Path | TunedLens, model: Any) -> TunedLens | None:
    """Return the lens that an option names, after `TunedLens.check_fits`; None for the logit lens."""
    if isinstance(lens, str) and lens == "logit":
        return None
    found = lens if isinstance(lens, TunedLens) else TunedLens.load(lens)
    found.check_fits(model)
    return found


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


# Both layouts number translators as `TunedLens` does. In the published one, `params.pt` is a state dict with
# the keys "{i}.weight" `[d_model, d_model]` and "{i}.bias" `[d_model]`. It is read with `weights_only=True`,
# so that no pickled code runs.
OWN_FILES = ("lens.json", "lens.safetensors")
PUBLISHED_FILES = ("config.json", "params.pt")
FORMAT = "memlens tuned lens 1"


def _write_own(folder: Path, lens: TunedLens) -> None:
    """Write memlens' layout; the JSON file records the fingerprint of the numbers that it belongs to."""
    tensors = {"weight": lens.weight.detach().cpu().contiguous(), "bias": lens.bias.detach().cpu()}
    with replacing(folder / OWN_FILES[1]) as part, _disk_errors():
        save_file(tensors, part)
    write_json(folder / OWN_FILES[0], {"format": FORMAT, "fingerprint": lens.fingerprint, **lens.facts})


def _write_published(folder: Path, lens: TunedLens) -> None:
    """Write the layout of the `tuned-lens` library."""
    state: dict[str, Tensor] = {}
    for i, (weight, bias) in enumerate(zip(lens.weight, lens.bias, strict=True)):
        state |= {f"{i}.weight": weight.detach().cpu().clone(), f"{i}.bias": bias.detach().cpu().clone()}
    config = {
        "base_model_name_or_path": lens.facts.get("base_model", ""),
        "base_model_revision": lens.facts.get("revision") or None, "d_model": lens.d_model,
        "num_hidden_layers": lens.n_layers, "bias": True, "lens_type": "linear_tuned_lens",
    }  # fmt: skip
    with replacing(folder / PUBLISHED_FILES[1]) as part, _disk_errors():
        torch.save(state, part)
    write_json(folder / PUBLISHED_FILES[0], config)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """The libraries have other classes for a full disk."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(reason_of(error)) from error


def _read_own(folder: Path) -> TunedLens:
    about = read_json(folder / OWN_FILES[0])
    if about.get("format") != FORMAT:
        raise FileFormatError(
            f"{folder / OWN_FILES[0]} has the format {about.get('format')!r}: this memlens reads {FORMAT!r}."
        )
    facts = {key: value for key, value in about.items() if key not in ("format", "fingerprint")}
    with parsing(folder / OWN_FILES[1], advice="save the lens again"):
        tensors = load_file(folder / OWN_FILES[1])
        lens = TunedLens(tensors["weight"].float(), tensors["bias"].float(), facts)
    if lens.fingerprint != about.get("fingerprint"):
        raise FileFormatError(
            f"{OWN_FILES[1]} in {folder} is not the file that {OWN_FILES[0]} describes: save the lens again."
        )
    return lens


def _read_published(folder: Path) -> TunedLens:
    config = read_json(folder / PUBLISHED_FILES[0])
    depth, width, biased = config.get("num_hidden_layers"), config.get("d_model"), config.get("bias", True)
    numbers = isinstance(depth, int) and isinstance(width, int) and depth > 0 and width > 0
    if not numbers or not isinstance(biased, bool):
        raise FileFormatError(
            f"{folder / PUBLISHED_FILES[0]} gives num_hidden_layers={depth!r}, d_model={width!r} and bias="
            f"{biased!r}: a tuned lens has positive whole numbers, and true or false."
        )
    state = _load_state(folder / PUBLISHED_FILES[1])
    parts = ("weight", "bias") if biased else ("weight",)
    layers = range(min(depth, len(state) + 1))  # the file may claim any number
    wanted = {f"{i}.{part}" for i in layers for part in parts}
    if set(state) != wanted:
        wrong = ", ".join(sorted(map(str, set(state) ^ wanted))[:4])
        raise FileFormatError(
            f"{folder / PUBLISHED_FILES[1]} does not hold the translators of {depth} layers (see {wrong}) "
            f"that {PUBLISHED_FILES[0]} says: give a lens in the current layout of tuned-lens, with keys "
            "such as '0.weight'."
        )
    for name, tensor in state.items():
        want = (width, width) if name.endswith("weight") else (width,)
        if tuple(tensor.shape) != want:
            raise FileFormatError(
                f"{name!r} in {folder / PUBLISHED_FILES[1]} has the shape {tuple(tensor.shape)}, and the "
                f"{PUBLISHED_FILES[0]} says {want}: the two files do not belong to the same lens."
            )
    weight = torch.stack([state[f"{i}.weight"].float() for i in range(depth)])
    bias = torch.zeros(depth, width)
    if biased:
        bias = torch.stack([state[f"{i}.bias"].float() for i in range(depth)])
    facts = {
        "base_model": str(config.get("base_model_name_or_path") or ""),
        "revision": str(config.get("base_model_revision") or ""),
        "processed_weights": False,
        "source": "tuned-lens files",
    }
    return TunedLens(weight, bias, facts)


def _load_state(path: Path) -> Mapping[str, Tensor]:
    with parsing(path, advice="download it again"):
        state = plain_tensors(path, otherwise="it is damaged, or not a lens.")
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileFormatError(f"{path} holds a {type(state).__name__}, not named tensors: download it again.")
    return state
