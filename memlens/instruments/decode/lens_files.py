"""Files of tuned lenses: memlens' own folder (safetensors and JSON) and the published one (`tuned-lens`).

Both number translators by the hidden state that they read: translator 0 reads the embedding (the input of
block 0) and translator i the input of block i, which is the output of block i - 1. The output of the last
block has none. The published folder holds `config.json` and `params.pt`, a state dict with the keys
`"{i}.weight"` `[d_model, d_model]` and `"{i}.bias"` `[d_model]`; it is read with ``weights_only=True``, so
that no pickled code ever runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from memlens.errors import FileFormatError, SourceNotFoundError
from memlens.files import replacing, write_atomically

OWN_FILES = ("lens.json", "lens.safetensors")
PUBLISHED_FILES = ("config.json", "params.pt")
FORMAT = "memlens tuned lens 1"


@dataclass(frozen=True)
class LensContent:
    """What a lens' files hold.

    Attributes:
        weight: One matrix a translator, float32.
        bias: One vector a translator, float32.
        facts: Everything else, as JSON types.
    """

    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    facts: dict[str, Any]


def digest(weight: Tensor, bias: Tensor) -> str:
    """Return a short name of the numbers of a lens: equal for equal translators.

    >>> digest(torch.zeros(1, 2, 2), torch.zeros(1, 2)) == digest(torch.ones(1, 2, 2), torch.zeros(1, 2))
    False
    """
    found = hashlib.sha256()
    for tensor in (weight, bias):
        array = tensor.detach().cpu().float().contiguous().numpy()
        found.update(repr(array.shape).encode())
        found.update(array.data)
    return found.hexdigest()[:16]


def read_lens(path: str | Path) -> LensContent:
    """Read a lens from its folder, of either layout.

    Args:
        path: The folder, or one of the two files in it.

    Raises:
        SourceNotFoundError: There is nothing at `path`.
        FileFormatError: The folder is not a lens, or its files are damaged or do not belong together.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise SourceNotFoundError(
            f"there is no tuned lens at {folder}: give the folder that holds its files, or 'logit'."
        )
    folder = folder if folder.is_dir() else folder.parent
    for files, read in ((OWN_FILES, _read_own), (PUBLISHED_FILES, _read_published)):
        if all((folder / name).is_file() for name in files):
            content = read(folder)
            _check_finite(content, folder)
            return content
    raise FileFormatError(
        f"{folder} is not a tuned lens: it needs {' and '.join(OWN_FILES)}, or "
        f"{' and '.join(PUBLISHED_FILES)}."
    )


def write_own(folder: str | Path, content: LensContent) -> Path:
    """Write memlens' layout, each file whole or not at all; the JSON names the numbers that it belongs to."""
    folder = Path(folder)
    tensors = {"weight": content.weight.detach().cpu().contiguous(), "bias": content.bias.detach().cpu()}
    with replacing(folder / OWN_FILES[1]) as part:
        save_file(tensors, part)
    about = {"format": FORMAT, "fingerprint": digest(content.weight, content.bias), **content.facts}
    write_atomically(folder / OWN_FILES[0], json.dumps(about, indent=1).encode())
    return folder


def write_published(folder: str | Path, content: LensContent) -> Path:
    """Write the layout of the `tuned-lens` library, each file whole or not at all."""
    folder = Path(folder)
    state: dict[str, Tensor] = {}
    for i, (weight, bias) in enumerate(zip(content.weight, content.bias, strict=True)):
        state |= {f"{i}.weight": weight.detach().cpu().clone(), f"{i}.bias": bias.detach().cpu().clone()}
    config = {
        "base_model_name_or_path": content.facts.get("base_model", ""),
        "base_model_revision": content.facts.get("revision") or None,
        "d_model": content.weight.shape[-1],
        "num_hidden_layers": len(content.weight),
        "bias": True,
        "lens_type": "linear_tuned_lens",
    }
    with replacing(folder / PUBLISHED_FILES[1]) as part:
        torch.save(state, part)
    write_atomically(folder / PUBLISHED_FILES[0], json.dumps(config, indent=1).encode())
    return folder


def _read_own(folder: Path) -> LensContent:
    about = _read_json(folder / OWN_FILES[0])
    if about.get("format") != FORMAT:
        raise FileFormatError(
            f"{folder / OWN_FILES[0]} says format {about.get('format')!r}: this memlens reads {FORMAT!r}."
        )
    try:
        tensors = load_file(folder / OWN_FILES[1])
        weight, bias = tensors["weight"].float(), tensors["bias"].float()
    except Exception as error:  # safetensors raises a class of its own for damaged files
        raise FileFormatError(
            f"{folder / OWN_FILES[1]} is damaged ({_reason(error)}): save the lens again."
        ) from error
    if digest(weight, bias) != about.get("fingerprint"):
        raise FileFormatError(
            f"{OWN_FILES[1]} in {folder} is not the file that {OWN_FILES[0]} describes: save the lens again."
        )
    facts = {key: value for key, value in about.items() if key not in ("format", "fingerprint")}
    return LensContent(weight, bias, facts)


def _read_published(folder: Path) -> LensContent:
    config = _read_json(folder / PUBLISHED_FILES[0])
    depth, width = config.get("num_hidden_layers"), config.get("d_model")
    if not isinstance(depth, int) or not isinstance(width, int) or depth < 1 or width < 1:
        raise FileFormatError(
            f"{folder / PUBLISHED_FILES[0]} gives num_hidden_layers={depth!r} and d_model={width!r}: a tuned "
            "lens' configuration has both as whole numbers."
        )
    state = _load_state(folder / PUBLISHED_FILES[1])
    biased = bool(config.get("bias", True))
    wanted = {f"{i}.{part}" for i in range(depth) for part in (("weight", "bias") if biased else ("weight",))}
    if set(state) != wanted:
        wrong = ", ".join(sorted(set(state) ^ wanted)[:4])
        raise FileFormatError(
            f"{folder / PUBLISHED_FILES[1]} does not hold the translators of {depth} layers (see {wrong}): "
            "give a lens of the present tuned-lens layout, with keys such as '0.weight'."
        )
    _check_shapes(state, width, folder / PUBLISHED_FILES[1])
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
    return LensContent(weight, bias, facts)


def _load_state(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and type errors alike: the file is not a plain state dict
        raise FileFormatError(
            f"{path} cannot be read as plain tensors ({_reason(error)}): download it again."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileFormatError(f"{path} holds a {type(state).__name__}, not named tensors: download it again.")
    return state


def _check_shapes(state: Mapping[str, Tensor], width: int, path: Path) -> None:
    for name, tensor in state.items():
        want = (width, width) if name.endswith("weight") else (width,)
        if tuple(tensor.shape) != want:
            raise FileFormatError(
                f"{name!r} in {path} has the shape {tuple(tensor.shape)}, and the configuration says {want}: "
                "the two files are not of one lens."
            )


def _check_finite(content: LensContent, folder: Path) -> None:
    if not (content.weight.isfinite().all() and content.bias.isfinite().all()):
        raise FileFormatError(
            f"the tuned lens in {folder} holds NaN or infinity: train or download it again."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path} is not JSON ({_reason(error)}): the lens is damaged.") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} holds a {type(found).__name__}, not an object: the lens is damaged.")
    return found


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:120]
