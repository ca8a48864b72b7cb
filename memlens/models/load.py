"""`load_model`: from a name, a folder, a file or a loaded model to TransformerLens' own object."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from memlens.choices import Backend
from memlens.errors import OptionError, UnsupportedModelError, check_option
from memlens.models.adapters import merged_adapters, without_peft
from memlens.models.bridge import build_bridge, check_bridge_supports
from memlens.models.checks import check_causal, check_plain_weights
from memlens.models.families import architecture_of, family_of
from memlens.models.hooked import build_hooked, hooked_obstacle
from memlens.models.huggingface import (
    gguf_read_once,
    load_config,
    load_tokenizer,
    load_weights,
    named_errors,
    parse_dtype,
    prepare_tokenizer,
)
from memlens.models.names import Source, checkpoint_revision, local_checkpoint, resolve_source
from memlens.models.provenance import Origin, remember, remember_origin, remember_recipe
from memlens.models.state import keep_fresh

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


_LOG = logging.getLogger(__name__)
BACKENDS: tuple[str, ...] = get_args(Backend)


@dataclass(frozen=True)
class _Options:
    """The checked options of a call of `load_model`."""

    backend: str
    dtype: torch.dtype
    device: torch.device
    device_map: Any
    process_weights: bool
    check_weights: bool | str


def load_model(
    name: str | Path | nn.Module,
    *,
    backend: str = "auto",
    revision: str | None = None,
    checkpoint_step: int | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    device_map: Any = None,
    process_weights: bool = False,
    gguf_file: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    check_weights: bool | Literal["always"] = True,
) -> HookedTransformer | TransformerBridge:
    """Load a causal language model as TransformerLens' own object.

    Weights are unprocessed unless asked for: activations and logits equal Hugging Face's.

    Args:
        name: A model of the zoo (`"zoo/pythia-s"`; `"zoo/pythia-s-untrained"` has the weights that its
            training began from), a hub name (`"EleutherAI/pythia-70m"`; the organization may
            be left out for models of `families_table()`), a local checkpoint folder, a `.gguf` file, a loaded
            Hugging Face model (it is bridged in place, with its dtype; PEFT adapters are merged into a copy
            of it), or a TransformerLens model (returned as it is).
        backend: `"hooked"` for `HookedTransformer` (TransformerLens 3.9 with Pythia, GPT-Neo or OLMo),
            `"bridge"` for `TransformerBridge`, `"auto"` for the first where it can run the model, else the
            second. A loaded Hugging Face model becomes a bridge under `"auto"`.
        revision: Branch, tag or commit on the hub.
        checkpoint_step: Training step, for models with published checkpoints (Pythia, OLMo) and those of the
            zoo that were trained with them.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or a torch dtype.
        device: Device; by default CUDA if available, else the CPU.
        device_map: Spread a large model over devices (see `accelerate`); bridge only, instead of `device`.
        process_weights: TransformerLens' classic form: LayerNorms folded, weights centered. Predictions stay
            the same; activations do not, and logits differ by a constant at each position.
        gguf_file: A GGUF file in the folder or repository. Its weights are dequantized.
        tokenizer: Used instead of the checkpoint's own.
        trust_remote_code: Allow Python code that comes with the checkpoint to run.
        allow_pickle: Allow weights in `.bin` files, which can run code, where there are no safetensors.
        check_weights: Refuse weights with NaN or infinity, and a model that fails `check_model`: on a few
            tokens its logits must equal Hugging Face's, and its hooks must do what their names claim. That a
            large model passed is kept in memlens' cache, and the same files are not checked again;
            `"always"` checks them all the same.

    Returns:
        A `HookedTransformer` or a `TransformerBridge`, in evaluation mode. `.tokenizer` is None where the
        checkpoint has none.

    Raises:
        ModelNotFoundError: There is no model of this name, or no such revision or step of it.
        ModelLoadError: The checkpoint's files are damaged, incomplete, or hold no safetensors; or the loaded
            model fails `check_model`.
        UnsupportedModelError: Not a causal language model, or the backend cannot run it.
        NonFiniteError: NaN or infinity in the weights.
        OptionError: Options that do not exist or contradict each other.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        >>> config = GPTNeoXConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                        intermediate_size=32, bos_token_id=0, eos_token_id=0)
        >>> model = load_model(GPTNeoXForCausalLM(config), device="cpu")
        >>> type(model).__name__, model.cfg.n_layers
        ('TransformerBridge', 2)
    """
    given = {key: value for key, value in locals().items() if key != "name"}
    options = _check_options(backend, dtype, device, device_map, process_weights, check_weights)
    if isinstance(name, nn.Module):
        misplaced: dict[str, Any] = {"revision": revision, "checkpoint_step": checkpoint_step}
        misplaced |= {"gguf_file": gguf_file, "device_map": device_map}
        if _is_transformer_lens(name):
            misplaced |= {"tokenizer": tokenizer, "device": device}
            misplaced |= {"process_weights": process_weights or None}
            return _as_it_is(name, backend, misplaced)
        _refuse(misplaced, name)
        return _from_huggingface(name.to(options.device) if device is not None else name, options, tokenizer)
    begun = time.time()
    source = resolve_source(name, gguf_file=gguf_file)
    if source.local:
        source, revision = local_checkpoint(source, revision=revision, step=checkpoint_step), None
    else:
        revision = checkpoint_revision(source, revision=revision, step=checkpoint_step)

    def read() -> PreTrainedModel:
        return load_weights(
            source,
            config,
            revision=revision,
            dtype=options.dtype,
            device=options.device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )

    def wrapped(hf_model: PreTrainedModel, options: _Options) -> Any:
        fact = source.checkpoint if source.local else revision or "main"
        place = source if device_map is None else None
        with named_errors(source, revision):
            return _wrap(
                hf_model, tokenizer, options, name=source.name, revision=fact, source=place, begun=begun
            )

    with gguf_read_once(source):
        config = load_config(source, revision=revision, trust_remote_code=trust_remote_code)
        options = _choose_backend(options, config, source.name)
        if tokenizer is None:
            tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
        hf_model = read()
    model = wrapped(hf_model, options)
    if model is None:
        del hf_model
        gc.collect()  # of the model that has just been made, whose parts refer to one another
        model = wrapped(read(), replace(options, check_weights="always"))
    keep_fresh(model)
    remember_origin(model, Origin(source, revision, trust_remote_code, allow_pickle))
    remember_recipe(model, name, given)
    return model


def _check_options(
    backend: str, dtype: Any, device: Any, device_map: Any, process_weights: bool, check_weights: Any
) -> _Options:
    check_option("backend", backend, BACKENDS)
    if check_weights not in (True, False, "always"):
        raise OptionError(f"check_weights={check_weights!r} is not known: give True, False or 'always'.")
    if device_map is not None and device is not None:
        raise OptionError(
            f"device={str(device)!r} and device_map={device_map!r} contradict each other: give one."
        )
    if device_map is not None and backend == "hooked":
        raise OptionError(
            f"device_map={device_map!r} does not go with HookedTransformer: use backend='bridge', or device=."
        )
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise OptionError(
            f"device={device!r} is not a device that torch knows: give 'cpu', 'cuda' or 'mps'."
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"device={str(device)!r} was asked for, but torch finds no CUDA device: use device='cpu'."
        )
    return _Options(backend, parse_dtype(dtype), place, device_map, process_weights, check_weights)


def _choose_backend(options: _Options, config: PreTrainedConfig, name: str) -> _Options:
    """Decide between the two classes, before any weight is read."""
    obstacle = hooked_obstacle(config)
    if options.backend == "hooked" and obstacle:
        raise UnsupportedModelError(
            f"{name!r} cannot be a HookedTransformer: {obstacle}; use backend='bridge'."
        )
    hooked = options.backend == "hooked" or (
        options.backend == "auto" and not obstacle and options.device_map is None
    )
    if not hooked:
        check_bridge_supports(config, name)
    return replace(options, backend="hooked" if hooked else "bridge")


def _is_transformer_lens(model: nn.Module) -> bool:
    return isinstance(model, TransformerBridge) or type(model).__name__ == "HookedTransformer"


def _refuse(misplaced: dict[str, Any], model: nn.Module) -> None:
    """Raise `OptionError` for an option that has no effect."""
    for option, value in misplaced.items():
        if value is not None:
            raise OptionError(
                f"{option}={value!r} has no effect on a loaded {type(model).__name__}: leave it out."
            )


def _as_it_is(model: Any, backend: str, misplaced: dict[str, Any]) -> Any:
    _refuse(misplaced, model)
    kind = "bridge" if isinstance(model, TransformerBridge) else "hooked"
    if backend not in ("auto", kind):
        raise OptionError(
            f"backend={backend!r} was asked for, but this is a {type(model).__name__}: load it by name."
        )
    keep_fresh(model)
    return model


def _from_huggingface(model: nn.Module, options: _Options, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    model = without_peft(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"A {type(model).__name__} is not a model that memlens can use: give a HookedTransformer, a "
            f"TransformerBridge, or a Hugging Face PreTrainedModel."
        )
    name = str(model.config._name_or_path or type(model).__name__)
    check_causal(model.config, name)
    backend = "bridge" if options.backend == "auto" else options.backend
    options = replace(options, backend=backend, dtype=model.dtype, device=model.device)
    options, weights = _choose_backend(options, model.config, name), list(model.parameters())
    found = _wrap(model.eval(), tokenizer, options, name=name, revision="")
    keep_fresh(found, weights)
    return found


def _wrap(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    options: _Options,
    *,
    name: str,
    revision: str,
    source: Source | None = None,
    begun: float = 0.0,
) -> Any:
    """Check the weights and build the TransformerLens model.

    Args:
        hf_model: The Hugging Face model.
        tokenizer: Its tokenizer.
        options: Those of `load_model`.
        name: What to call it.
        revision: What to say of its revision.
        source: Where it was read from; None where no verdict on it is to be kept.
        begun: When reading it began, in seconds.

    Returns:
        The model; None if it is not the one that the kept verdict is on, and must be read and checked anew.
    """
    from memlens.forward.check.at_load import CheckAtLoad

    check_plain_weights(hf_model, name)
    check = None
    if options.check_weights:
        made = {name: value for name, value in vars(options).items() if name != "check_weights"}
        anew = options.check_weights == "always"
        check = CheckAtLoad.begin(hf_model, name, made, source=source, begun=begun, anew=anew)
    hf_model, adapters = merged_adapters(hf_model, name)
    if tokenizer is not None:
        tokenizer = prepare_tokenizer(tokenizer)
    facts = {
        "model": name,
        "revision": revision,
        "family": family_of(hf_model, name=name),
        "architecture": architecture_of(hf_model),
        "n_params": hf_model.num_parameters(),
        "processed_weights": options.process_weights,
        **({"adapters": adapters} if adapters else {}),
    }
    common: dict[str, Any] = {"name": name, "dtype": options.dtype}
    common["process_weights"] = options.process_weights
    model: Any
    if options.backend == "hooked":
        model = build_hooked(hf_model, tokenizer, device=options.device, **common)
    else:
        model = build_bridge(hf_model, tokenizer, **common)
    remember(model, **facts)
    _keep_to_one_rotation(model, hf_model)
    return model if check is None or check.finish(model) else None


def _keep_to_one_rotation(model: Any, hf_model: PreTrainedModel) -> None:
    """Limit the context of a model that rotates its positions in another way in longer texts (LongRoPE).

    There the length of the longest text in a batch would decide on the rotation of the others as well.
    """
    config: Any = hf_model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    found = next((part for part in kinds if part.get("rope_type") == "longrope"), None)
    if found is None:
        return
    known = found.get("original_max_position_embeddings")
    length = known or getattr(config, "original_max_position_embeddings", None)
    if length is not None and length < model.cfg.n_ctx:
        _LOG.warning(
            "the model rotates positions in another way in texts of more than %d tokens: its context is "
            "limited to them",
            length,
        )
        model.cfg.n_ctx = int(length)
