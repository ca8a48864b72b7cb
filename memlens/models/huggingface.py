"""Read a checkpoint's config, weights and tokenizer through transformers, with errors that name the cause."""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from threading import RLock
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, models
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from memlens.errors import (
    MemlensError,
    ModelLoadError,
    ModelNotFoundError,
    OptionError,
    UnsupportedModelError,
)
from memlens.files import is_failure, parsed_json, parsing, read_json
from memlens.models.bos import begins_with_bos
from memlens.models.checks import check_causal
from memlens.models.names import Source, hub_or_cache, unknown_name_error
from memlens.models.quiet import quiet

_LOG = logging.getLogger(__name__)
_UNKNOWN_ARCHITECTURE = (
    "not recognize this architecture",
    "Unrecognized model in",
    "Unrecognized configuration",
)
_OFFLINE = ("offline", "couldn't connect", "LocalEntryNotFound")
_NO_WEIGHTS = ("no file named model.safetensors", "does not appear to have a file named")


@contextmanager
def named_errors(source: Source, revision: str | None) -> Iterator[None]:
    """Turn errors while reading a checkpoint into memlens errors, with the original as the cause.

    Every error about a local checkpoint names the files that it may be about. Without a network, one on the
    hub is read from its cache.
    """
    try:
        with hub_or_cache(source.location):
            yield
    except MemlensError as error:
        _name_files(error, source)
        raise
    except MemoryError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        found = _translate(error, source, revision)
        _name_files(found, source)
        raise found from error


def _translate(error: BaseException, source: Source, revision: str | None) -> MemlensError:
    chain = list(_causes(error))
    text = " ".join(map(str, chain))
    found = _about_hub(chain, text, source, revision) or _about_code(error, text, source)
    return found or _about_files(error, chain, text, source)


def _name_files(error: MemlensError, source: Source) -> None:
    files = ["config.json"] if source.gguf_file is None else []
    if files and source.local and (Path(source.location) / "generation_config.json").is_file():
        files.append("generation_config.json")
    files += [file.name for file in weight_files(source)]
    if source.local and not any(name in str(error) for name in files[1:] or files):
        more = f" and {len(files) - 8} more" if len(files) > 8 else ""
        error.args = (f"{error} (Read from {source.location}: {', '.join(files[:8])}{more}.)",)


def weight_files(source: Source) -> list[Path]:
    """Return the files of a local checkpoint's weights, the index of several first."""
    folder = Path(source.location)
    if source.gguf_file is not None:
        return [folder / source.gguf_file] if source.local else []
    kinds = ("*.index.json", "*.safetensors", "*.bin")
    return [file for kind in kinds for file in sorted(folder.glob(kind))] if source.local else []


def _about_hub(
    chain: list[BaseException], text: str, source: Source, revision: str | None
) -> MemlensError | None:
    if any(isinstance(e, GatedRepoError) for e in chain):
        return ModelLoadError(
            f"{source.name!r} is gated: accept its terms on the hub and run `hf auth login`."
        )
    if any(isinstance(e, RevisionNotFoundError) for e in chain) or "not a valid git identifier" in text:
        return ModelNotFoundError(
            f"{source.name!r} has no revision {revision!r}: check the branch, tag or commit."
        )
    if any(isinstance(e, RepositoryNotFoundError | HFValidationError) for e in chain):
        return unknown_name_error(source.name)
    return None


def _about_code(error: BaseException, text: str, source: Source) -> MemlensError | None:
    if "trust_remote_code" in text or "contains custom code" in text:
        return UnsupportedModelError(
            f"{source.name!r} comes with Python code of its own, which memlens does not run unasked: "
            f"pass trust_remote_code=True if you trust it."
        )
    if any(sign in text for sign in _UNKNOWN_ARCHITECTURE):
        return UnsupportedModelError(
            f"The installed transformers does not know the architecture of {source.name!r}: "
            f"upgrade transformers, or check its config.json ({_first_line(error)})."
        )
    if isinstance(error, ImportError):
        return ModelLoadError(f"{source.name!r} cannot be read without another package: {_first_line(error)}")
    return None


def _about_files(error: BaseException, chain: list[BaseException], text: str, source: Source) -> MemlensError:
    if any(sign in text for sign in _NO_WEIGHTS) and "config.json" not in text:
        return _no_weights(source)
    unread = isinstance(error, OSError) and "JSON" not in text and not source.local
    if unread and not any(isinstance(e, SafetensorError) for e in chain):
        offline = any(sign in text for sign in _OFFLINE)
        return unknown_name_error(source.name, "which could not be asked" if offline else "")
    return ModelLoadError(
        f"{source.name!r} could not be read ({_first_line(error)}): a file is damaged or incomplete, or "
        f"is not what its name says; download or copy it again."
    )


def _no_weights(source: Source) -> MemlensError:
    pickled = not source.local or any(Path(source.location).glob("*.bin"))
    if not pickled:
        return ModelLoadError(
            f"The folder {source.location!r} has a config.json but no weights: copy them there."
        )
    return ModelLoadError(
        f"{source.name!r} has no safetensors weights: convert them, or pass allow_pickle=True to read a .bin "
        f"file (only from a source you trust, as it can run code)."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


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
        if source.local and source.gguf_file is None:
            _check_depth(
                parsed_json((Path(source.location) / "config.json").read_text(encoding="utf-8"), dict)
            )
        config = AutoConfig.from_pretrained(
            source.location,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            **_gguf_options(source),
        )
        _check_depth(config.to_dict())
        check_causal(config, source.name)
    return config


_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_MOST_LAYERS = 1024


def _check_depth(facts: Mapping[str, Any]) -> None:
    """Refuse a number of layers for which the libraries would make lists and modules without end."""
    for name in _DEPTHS:
        if isinstance(value := facts.get(name), int | float) and not value <= _MOST_LAYERS:
            raise ModelLoadError(
                f"config.json says {name}={value:g}: memlens reads up to {_MOST_LAYERS} layers."
            )


def _check_size(source: Source, config: PreTrainedConfig) -> None:
    """Refuse a config of a far larger model than its files can hold, before anything is allocated."""
    files = weight_files(source)
    if not files:
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    n = sum(tensor.numel() for tensor in (*shell.parameters(), *shell.buffers()))
    stored = sum(file.stat().st_size for file in files)
    if n > _LEAST + 8 * stored:  # no format has under a bit for a weight
        raise ModelLoadError(
            f"config.json describes {n:,} numbers, which the {stored:,} bytes of {source.name!r} cannot "
            "hold: the two do not belong together."
        )


_LEAST = 10**8
"""Numbers that a model may have whatever its files hold: buffers, and what `_check_complete` names."""


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
    attention: str | None = "eager",
) -> PreTrainedModel:
    """Return the checkpoint as a Hugging Face model in evaluation mode, by default with eager attention.

    Quantized GGUF weights are dequantized to `dtype`. Weights are read from safetensors only, unless
    `allow_pickle`. For an untrained source the weights are those that its training began from.

    Raises:
        ModelLoadError: No weights, damaged ones, or missing, surplus or reshaped ones against the config; or
            an index that names files outside of the folder.
        OptionError: `device_map` for an untrained model.
    """
    if source.untrained:
        if device_map is not None:
            raise OptionError(f"device_map={device_map!r} has no effect on an untrained model: use device=.")
        return _untrained(source, config, dtype).to(device)  # pyright: ignore[reportArgumentType]
    with quiet(), named_errors(source, revision), _no_gguf_bar(source):
        _check_stays_inside(source)
        _check_headers(source)
        if not trust_remote_code:
            _check_size(source, config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            revision=revision or "main",
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle or source.gguf_file else True,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_complete` refuses them by name
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
    """Return a zoo model as before training, by its recorded seed, rounded to float16 like checkpoints."""
    path = Path(source.location) / "training.json"
    with parsing(path, ModelLoadError):
        seed = operator.index(read_json(path)["training"]["spec"]["seed"])
    with torch.random.fork_rng(devices=[]), quiet(), named_errors(source, None):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return model.half().to(dtype).eval()


@contextmanager
def _no_gguf_bar(source: Source) -> Iterator[None]:
    """Hide the bar of dequantizing, which transformers always shows: in a notebook it stays in the cell."""
    if source.gguf_file is None:
        yield
        return
    reading: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    with _GGUF_LOCK:
        own = reading.tqdm
        reading.tqdm = partial(tqdm, disable=True)
        try:
            yield
        finally:
            reading.tqdm = own


@contextmanager
def gguf_read_once(source: Source) -> Iterator[None]:
    """Read a GGUF file's header once for all that transformers reads of it inside a `with` statement.

    Transformers reads the header anew for config, tokenizer and weights, entry by entry, and asks for the
    table of tensor names once per module, which at 135 million parameters takes more than half of the time
    of loading. Another thread that wants to load a GGUF file waits.
    """
    if source.gguf_file is None or find_spec("gguf") is None:
        yield
        return
    import gguf

    class Reader(gguf.GGUFReader):
        """Reads from a plain array: each slice of a `numpy.memmap` costs far more than its few bytes."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._plain = mapped.view(np.ndarray)

    with _GGUF_LOCK:
        own = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader = cache(Reader)
        gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = own


_GGUF_LOCK = RLock()


def _gguf_options(source: Source) -> dict[str, str]:
    return {} if source.gguf_file is None else {"gguf_file": source.gguf_file}


def _forget_quantization(model: PreTrainedModel) -> None:
    """The weights are dequantized: TransformerLens must not take them for packed weights."""
    for holder, attributes in (
        (model.config, ("quantization_config",)),
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
    ):
        for attribute in attributes:
            if attribute in vars(holder):
                delattr(holder, attribute)


_NOT_WEIGHTS = re.compile(r"(^|\.)(inv_freq|masked_bias|(attn|attention)\.bias)$")
"""Buffers in old checkpoints, computed anew by transformers: rotary frequencies and causal masks."""


def _check_complete(source: Source, report: dict[str, Any]) -> None:
    """Raise unless checkpoint and config have the same tensors, of the same shapes.

    Transformers only warns: it fills what is missing with random numbers and leaves out what is too much, so
    that a config with a layer fewer would give a truncated model.
    """
    surplus = [name for name in report["unexpected_keys"] if not _NOT_WEIGHTS.search(name)]
    reshaped = [
        f"{name!r} ({list(there)} instead of {list(wanted)})"
        for name, there, wanted in report["mismatched_keys"]
    ]
    wrong = {
        "lack": [*map(repr, report["missing_keys"])],
        "also hold": [*map(repr, surplus)],
        "give another shape to": reshaped,
    }
    found = [f"{what} {_listed(sorted(names))}" for what, names in wrong.items() if names]
    if found:
        raise ModelLoadError(
            f"The weights of {source.name!r} {' and '.join(found)}, against its config.json: the two do not "
            "belong together, or a file is incomplete."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_stays_inside(source: Source) -> None:
    """Refuse an index of weights that names files outside of its folder; the hub's client does so itself."""
    for path in Path(source.location).glob("*.index.json") if source.local else ():
        content = read_json(path, kind=ModelLoadError)
        with parsing(path, ModelLoadError):
            names = TypeAdapter(dict[str, str]).validate_python(content["weight_map"]).values()
        for name in names:
            inside = PureWindowsPath(name)  # which takes both slashes as separators
            if inside.anchor or ".." in inside.parts:
                raise ModelLoadError(
                    f"{str(path)!r} names {name!r}, which is outside of the checkpoint's folder: "
                    "download the checkpoint again, from a source you trust."
                )


def _check_headers(source: Source) -> None:
    """Open each file of weights, so that a damaged one is named."""
    for path in weight_files(source):
        if path.suffix == ".safetensors":
            with parsing(path, ModelLoadError), safe_open(path, "pt"):
                pass


_FIRST_TRANSFORMERS = (5, 13)
"""The first release that reads all tokenizers rightly; `pyproject.toml` asks for it too."""


def load_tokenizer(
    source: Source,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    prepared: bool = True,
) -> PreTrainedTokenizerBase | None:
    """Return the checkpoint's tokenizer, or None (with a line in the log) where it has none of a known kind.

    It is in the form of `prepare_tokenizer` if `prepared`, else as it stands in the checkpoint.

    Raises:
        ModelLoadError: Its `tokenizer.json` or a file beside it is damaged, or the installed transformers is
            one that reads some tokenizers wrongly.
    """
    if tuple(map(int, transformers.__version__.split(".")[:2])) < _FIRST_TRANSFORMERS:
        raise ModelLoadError(
            f"transformers {transformers.__version__} gives text of some models (OLMo 2) other token ids "
            f"than their tokenizers do: install {'.'.join(map(str, _FIRST_TRANSFORMERS))} or later."
        )
    place = source.tokenizer_location or source.location
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **_gguf_options(source)}
    try:
        with (
            quiet(),
            hub_or_cache(place),
            parsing(f"The tokenizer of {source.name!r}", ModelLoadError, _TOKENIZER_ADVICE),
        ):
            tokenizer = AutoTokenizer.from_pretrained(place, revision=revision or "main", **options)
            _check_vocabulary(tokenizer)
            return prepare_tokenizer(tokenizer) if prepared else tokenizer
    except MemlensError as error:  # of nearly any kind, for a folder without tokenizer files
        own = source.local and source.gguf_file is None
        files = [file.name for file in sorted(Path(place).glob("*token*.json"))] if own else []
        if "tokenizer.json" in files and not isinstance(error.__cause__, ImportError):
            error.args = (f"{error} (Read from {place}: {', '.join(files)}.)",)
            raise
        _LOG.warning("%r has no readable tokenizer (%s): the model takes token ids only.", source.name, error)
        return None


_TOKENIZER_ADVICE = "copy it again, or give another one in tokenizer="


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    """For a folder without tokenizer files transformers invents a tokenizer with special tokens only."""
    known = set(tokenizer.get_vocab().values())
    if known <= set(tokenizer.all_special_ids):
        raise ValueError("no vocabulary")
    if max(known) > _LARGEST_ID:
        raise ValueError(f"the token id {max(known)}")


_LARGEST_ID = 2**24
"""Larger ids are mistakes; the tokenizers library would count up to them."""


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that puts the BOS token before text by default, if it has such a token.

    TransformerLens expects this form (`to_tokens(..., prepend_bos=False)` removes the token again) and
    otherwise reads the tokenizer again from its original name, which fails for one created in memory or read
    from a GGUF file. So it is created here, by a round trip through a temporary folder. The given tokenizer
    is not changed; what it does itself is recorded as `bos_by_own_rule` (see `memlens.models.bos`). Pass
    `add_special_tokens=False` to get the bare tokens of a text.
    """
    if tokenizer.bos_token is None or tokenizer.init_kwargs.get("add_bos_token"):
        return tokenizer
    with TemporaryDirectory(prefix="memlens-") as folder, quiet():
        tokenizer.save_pretrained(folder)
        try:
            prepared = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
        except ValueError:  # tokenizers whose special tokens do not fit a template: they never prepend BOS
            prepared = AutoTokenizer.from_pretrained(folder)
            prepared.init_kwargs["add_bos_token"] = True
    prepared.bos_by_own_rule = begins_with_bos(tokenizer)
    prepared.name_or_path = tokenizer.name_or_path
    prepared.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return prepared


def placeholder_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with one word: a bridge cannot be built without one. It is removed afterwards."""
    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
