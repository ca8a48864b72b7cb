"""Read a checkpoint's config and weights through transformers, with errors that say what is wrong with it."""

from __future__ import annotations

import io
import json
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from memlens.errors import ModelLoadError, OptionError
from memlens.models.checks import check_causal
from memlens.models.load_errors import named_errors
from memlens.models.names import Source
from memlens.models.quiet import quiet

__all__ = ["load_config", "load_weights", "parse_dtype"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype for a dtype or its name.

    Raises:
        OptionError: No such floating dtype.

    >>> parse_dtype("bfloat16"), parse_dtype(torch.float32)
    (torch.bfloat16, torch.float32)
    """
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise OptionError(f"dtype={dtype!r} is not known: choose one of {', '.join(map(repr, _DTYPES))}.")
    return found


def load_config(
    source: Source, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Return the checkpoint's Hugging Face config.

    Raises:
        ModelNotFoundError: No repository, or no revision, of this name.
        ModelLoadError: The config is damaged.
        UnsupportedModelError: Transformers does not know the architecture, or it is not a causal one.
    """
    with quiet(), named_errors(source, revision):
        config = AutoConfig.from_pretrained(
            source.location,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            **_gguf_options(source),
        )
    check_causal(config, source.name)
    return config


def load_weights(
    source: Source,
    config: PreTrainedConfig,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """Return the checkpoint as a Hugging Face model in evaluation mode, with attention computed step by step.

    Quantized GGUF weights are dequantized to `dtype`. Weights are read from safetensors only, unless
    `allow_pickle`. An untrained source gets the weights that its model's training began from.

    Raises:
        ModelLoadError: No weights, damaged ones, or some that the config asks for are missing.
        OptionError: `device_map` for an untrained model.
    """
    if source.untrained:
        if device_map is not None:
            raise OptionError(f"device_map={device_map!r} cannot act on an untrained model: use device=.")
        return _untrained(source, config, dtype).to(device)  # pyright: ignore[reportArgumentType]
    with quiet(), named_errors(source, revision), _no_gguf_bar(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            revision=revision or "main",
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle or source.gguf_file else True,
            attn_implementation="eager",
            output_loading_info=True,
            **_gguf_options(source),
        )
    model, report = loaded
    _check_complete(source, report)
    if source.gguf_file is not None:
        _forget_quantization(model)
    if device_map is None:
        model.to(device)
    return model.eval()


def _untrained(source: Source, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a zoo model as its training began, by the seed in its record, in float16 as checkpoints are."""
    record = json.loads((Path(source.location) / "training.json").read_text(encoding="utf-8"))
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(record["training"]["spec"]["seed"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return model.half().to(dtype).eval()


def _no_gguf_bar(source: Source) -> AbstractContextManager[Any]:
    """Dequantizing draws a bar that no switch turns off; for a hub file the download's bar is worth more."""
    return redirect_stderr(io.StringIO()) if source.gguf_file and source.local else nullcontext()


def _gguf_options(source: Source) -> dict[str, str]:
    return {} if source.gguf_file is None else {"gguf_file": source.gguf_file}


def _forget_quantization(model: PreTrainedModel) -> None:
    """The weights are dequantized: TransformerLens must not take them for packed ones."""
    for holder, attributes in (
        (model.config, ("quantization_config",)),
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
    ):
        for attribute in attributes:
            if attribute in vars(holder):
                delattr(holder, attribute)


def _check_complete(source: Source, report: dict[str, Any]) -> None:
    """Transformers fills missing weights with random numbers and only warns: here that is an error."""
    missing = sorted(map(str, [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(
            f"The weights of {source.name!r} lack {missing[0]!r}{more}, which its config asks for: "
            f"the checkpoint and its config.json do not belong together, or the file is incomplete."
        )
