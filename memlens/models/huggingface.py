"""Read a checkpoint's config and weights through transformers, with errors that say what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from memlens.errors import ModelLoadError, ModelNotFoundError, OptionError, UnsupportedModelError
from memlens.models.checks import check_causal
from memlens.models.names import Source, unknown_name_error
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
        UnsupportedModelError: Transformers does not know the architecture, or it is not a causal language model.
    """
    with quiet(), _named_errors(source, revision):
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
    `allow_pickle`.

    Raises:
        ModelLoadError: No weights, damaged weights, or weights that the config says must be there are missing.
    """
    with quiet(), _named_errors(source, revision):
        model, report = AutoModelForCausalLM.from_pretrained(
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
    _check_complete(source, report)
    if source.gguf_file is not None:
        _forget_quantization(model)
    if device_map is None:
        model.to(device)
    return model.eval().requires_grad_(False)


def _gguf_options(source: Source) -> dict[str, str]:
    return {} if source.gguf_file is None else {"gguf_file": source.gguf_file}


def _forget_quantization(model: PreTrainedModel) -> None:
    """The weights are dequantized: what still says otherwise would make TransformerLens treat them as packed."""
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


@contextmanager
def _named_errors(source: Source, revision: str | None) -> Iterator[None]:
    """Turn what transformers, the hub and safetensors raise into memlens' errors, keeping the cause."""
    try:
        yield
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ModelLoadError(
            f"The weights of {source.name!r} could not be read ({_first_line(error)}): "
            f"the file is damaged or incomplete; download or copy it again."
        ) from error
    except ImportError as error:
        raise ModelLoadError(
            f"{source.name!r} cannot be read without another package: {_first_line(error)}"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise _translate(error, source, revision) from error


def _translate(error: Exception, source: Source, revision: str | None) -> Exception:
    chain = list(_causes(error))
    text = " ".join(map(str, chain))
    if any(isinstance(e, GatedRepoError) for e in chain):
        return ModelLoadError(
            f"{source.name!r} is gated: accept its terms on the hub and log in with `hf auth login`."
        )
    if any(isinstance(e, RevisionNotFoundError) for e in chain) or "not a valid git identifier" in text:
        return ModelNotFoundError(
            f"{source.name!r} has no revision {revision!r}: check the branch, tag or commit."
        )
    if "trust_remote_code" in text or "contains custom code" in text:
        return UnsupportedModelError(
            f"{source.name!r} comes with Python code of its own, which memlens does not run unasked: "
            f"pass trust_remote_code=True if you trust it."
        )
    if "model type" in text and ("does not recognize" in text or "Unrecognized" in text):
        return UnsupportedModelError(
            f"transformers does not know the architecture of {source.name!r}: {_first_line(error)}"
        )
    if "Unrecognized model in" in text:
        return UnsupportedModelError(
            f"The config.json of {source.name!r} names no model_type: it is not a language model's."
        )
    if _lacks_weights(text):
        return ModelLoadError(
            f"{source.name!r} has no safetensors weights: convert them, or pass allow_pickle=True "
            f"to read a .bin file (only from a source you trust, as it can run code)."
        )
    if source.local or _mentions_json(text):
        return ModelLoadError(f"{source.name!r} could not be read: {_first_line(error)}")
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return unknown_name_error(source.name)
    if isinstance(error, OSError):
        return unknown_name_error(source.name, "and the hub could not be asked" if _is_offline(text) else "")
    return ModelLoadError(f"{source.name!r} could not be loaded: {_first_line(error)}")


def _lacks_weights(text: str) -> bool:
    return "model.safetensors" in text or "no file named" in text


def _mentions_json(text: str) -> bool:
    return "not a valid JSON file" in text or "valid JSON" in text


def _is_offline(text: str) -> bool:
    return "offline" in text.lower() or "couldn't connect" in text.lower()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
