"""The families of models memlens is made for: names, sizes, training corpora and backends, in one table.

Every family here has an open pretraining corpus, so that a sequence can be known to have been seen.
Other architectures that `TransformerBridge` supports load too; they are not in the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class ModelEntry:
    """One model on the Hugging Face hub.

    Attributes:
        name: Its hub name, `"organization/model"`.
        size: Number of parameters as its authors state it.
        corpus: What it was pretrained on, where this differs from the family's entry.
    """

    name: str
    size: str
    corpus: str | None = None

    @property
    def short_name(self) -> str:
        """The name without the organization."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Family:
    """Models of one architecture by one group, with an open training corpus.

    Attributes:
        name: The family's name in memlens, e.g. `"olmo2"`.
        architecture: Class name in transformers.
        corpus: Pretraining corpus.
        license: Of the weights.
        hooked: Whether `HookedTransformer` (TransformerLens 3.x) runs it; `TransformerBridge` always does.
        checkpoints: How revisions of training checkpoints are named, or `""` if there are none.
        models: The models.
    """

    name: str
    architecture: str
    corpus: str
    license: str
    hooked: bool
    checkpoints: str
    models: tuple[ModelEntry, ...]


def _entries(prefix: str, sizes: str, suffix: str = "", corpus: str | None = None) -> tuple[ModelEntry, ...]:
    """One entry a size, the hub name being prefix + size + suffix."""
    return tuple(ModelEntry(f"{prefix}{size}{suffix}", size.upper(), corpus) for size in sizes.split())


_PILE = "The Pile"
_PYTHIA_SIZES = "70m 160m 410m 1b 1.4b 2.8b 6.9b 12b"

FAMILIES: tuple[Family, ...] = (
    Family(
        name="pythia",
        architecture="GPTNeoXForCausalLM",
        corpus=_PILE,
        license="Apache-2.0",
        hooked=True,
        checkpoints="step{step}",
        models=(
            *_entries("EleutherAI/pythia-", "14m 31m " + _PYTHIA_SIZES),
            *_entries("EleutherAI/pythia-", _PYTHIA_SIZES, "-deduped", "The Pile, deduplicated"),
        ),
    ),
    Family(
        name="gpt-neo",
        architecture="GPTNeoForCausalLM",
        corpus=_PILE,
        license="MIT",
        hooked=True,
        checkpoints="",
        models=_entries("EleutherAI/gpt-neo-", "125m 1.3B 2.7B"),
    ),
    Family(
        name="olmo1",
        architecture="OlmoForCausalLM",
        corpus="Dolma",
        license="Apache-2.0",
        hooked=True,
        checkpoints="step{step}-tokens{tokens}B",
        models=(
            ModelEntry("allenai/OLMo-1B-hf", "1B"),
            ModelEntry("allenai/OLMo-1B-0724-hf", "1B"),
            ModelEntry("allenai/OLMo-7B-hf", "7B"),
            ModelEntry("allenai/OLMo-7B-0424-hf", "7B"),
            ModelEntry("allenai/OLMo-7B-0724-hf", "7B"),
        ),
    ),
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        corpus="OLMo-mix-1124, then Dolmino-mix-1124",
        license="Apache-2.0",
        hooked=True,
        checkpoints="stage1-step{step}-tokens{tokens}B",
        models=(
            ModelEntry("allenai/OLMo-2-0425-1B", "1B"),
            ModelEntry("allenai/OLMo-2-1124-7B", "7B"),
            ModelEntry("allenai/OLMo-2-1124-13B", "13B"),
            ModelEntry("allenai/OLMo-2-0325-32B", "32B"),
        ),
    ),
    Family(
        name="olmo3",
        architecture="Olmo3ForCausalLM",
        corpus="Dolma 3",
        license="Apache-2.0",
        hooked=True,
        checkpoints="stage1-step{step}",
        models=(ModelEntry("allenai/Olmo-3-1025-7B", "7B"), ModelEntry("allenai/Olmo-3-1125-32B", "32B")),
    ),
    Family(
        name="openllama",
        architecture="LlamaForCausalLM",
        corpus="RedPajama-Data-1T",
        license="Apache-2.0",
        hooked=False,
        checkpoints="",
        models=_entries("openlm-research/open_llama_", "3b 7b 13b"),
    ),
    Family(
        name="starcoder",
        architecture="GPTBigCodeForCausalLM",
        corpus="The Stack v1.2 (starcoderdata)",
        license="BigCode OpenRAIL-M v1",
        hooked=False,
        checkpoints="",
        models=(
            *_entries("bigcode/starcoderbase-", "1b 3b 7b"),
            ModelEntry("bigcode/starcoderbase", "15.5B"),
        ),
    ),
    Family(
        name="starcoder2",
        architecture="Starcoder2ForCausalLM",
        corpus="The Stack v2",
        license="BigCode OpenRAIL-M v1",
        hooked=False,
        checkpoints="",
        models=_entries("bigcode/starcoder2-", "3b 7b 15b"),
    ),
)

_BY_ARCHITECTURE = {f.architecture: f.name for f in FAMILIES if f.architecture != "LlamaForCausalLM"}


def _all_entries() -> Iterator[tuple[Family, ModelEntry]]:
    for family in FAMILIES:
        for entry in family.models:
            yield family, entry


def known_names() -> list[str]:
    """Return the hub name of every model in the table."""
    return [entry.name for _, entry in _all_entries()]


def find_model(name: str) -> tuple[Family, ModelEntry] | None:
    """Return the table's family and entry for a hub name, with or without the organization.

    >>> family, entry = find_model("pythia-70m")
    >>> family.name, entry.name
    ('pythia', 'EleutherAI/pythia-70m')
    >>> find_model("gpt2") is None
    True
    """
    wanted = name.lower()
    for family, entry in _all_entries():
        if wanted in (entry.name.lower(), entry.short_name.lower()):
            return family, entry
    return None


def families_table() -> pd.DataFrame:
    """Return one row a model: what `memlens models` prints.

    Columns: `model` (hub name), `family`, `size`, `architecture`, `corpus`, `license`, `checkpoints` (how
    revisions of training checkpoints are named), `HookedTransformer` and `TransformerBridge` (the releases of
    TransformerLens in which each class runs it, `""` for none), `backend` (what `backend="auto"` gives here).

    >>> table = families_table().set_index("model")
    >>> table.loc["bigcode/starcoder2-3b", "TransformerBridge"]
    '3.9, 4.x'
    """
    from memlens.models.names import has_hooked_transformer

    def row(family: Family, entry: ModelEntry) -> dict[str, str]:
        hooked_here = family.hooked and has_hooked_transformer()
        return {
            "model": entry.name,
            "family": family.name,
            "size": entry.size,
            "architecture": family.architecture,
            "corpus": entry.corpus or family.corpus,
            "license": family.license,
            "checkpoints": family.checkpoints,
            "HookedTransformer": "3.9" if family.hooked else "",
            "TransformerBridge": "3.9, 4.x",
            "backend": "HookedTransformer" if hooked_here else "TransformerBridge",
        }

    return pd.DataFrame([row(family, entry) for family, entry in _all_entries()])


def architecture_of(model_or_config: Any) -> str:
    """Return the transformers class name of a model (TransformerLens' or Hugging Face's) or of a config.

    Returns `""` where nothing tells it, as for a `HookedTransformer` that was not made from a checkpoint.
    """
    for holder in (getattr(model_or_config, "cfg", None), model_or_config):
        for attribute in ("original_architecture", "architecture"):
            value = getattr(holder, attribute, None)
            if isinstance(value, str) and value:
                return value
    config = getattr(model_or_config, "config", model_or_config)
    architectures = getattr(config, "architectures", None) or []
    return str(architectures[0]) if architectures else _architecture_by_model_type(config)


def _architecture_by_model_type(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(getattr(config, "model_type", ""), "")
    return name if isinstance(name, str) else name[0]


def family_of(model_or_config: Any, *, name: str = "") -> str:
    """Return the family's name: by the model's name where it is in the table, else by its architecture.

    Llama is an architecture that many families share: a model of it is `"openllama"` only by name (on the
    hub or in the zoo), else `"llama"`. A model of any other architecture is called by its architecture.

    Args:
        model_or_config: A TransformerLens model, a Hugging Face model, or either one's config.
        name: The hub name, if known.

    Example:
        >>> from transformers import Olmo2Config, LlamaConfig
        >>> family_of(Olmo2Config())
        'olmo2'
        >>> family_of(LlamaConfig()), family_of(LlamaConfig(), name="openlm-research/open_llama_3b")
        ('llama', 'openllama')
    """
    found = find_model(name) if name else None
    architecture = architecture_of(model_or_config)
    if found is not None and architecture in ("", found[0].architecture):
        return found[0].name
    if architecture == "LlamaForCausalLM":
        return "openllama" if name.removeprefix("zoo/").startswith("openllama-") else "llama"
    return _BY_ARCHITECTURE.get(architecture, architecture or "unknown")
