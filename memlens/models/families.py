"""The families of models that memlens is made for, each declared in one row.

Every family here has an open pretraining corpus, so that a sequence can be known to have been seen.
Other architectures that `TransformerBridge` supports load too; they are not in the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from memlens.models import hooked_forms
from memlens.models.hooked_forms import HookedForm
from memlens.registry import Registry


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, from which costs can be planned without loading it.

    Attributes:
        n_layers: Layers.
        d_model: Width of the residual stream.
        n_heads: Query heads of a layer.
        n_kv_heads: Key and value heads of a layer.
        d_mlp: Width of the MLP.
        d_vocab: Rows of the embedding.
        gated_mlp: Whether the MLP has a gate (three matrices).
        parallel: Whether attention and MLP read the same input.
        tied: Whether embedding and unembedding share weights.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    d_vocab: int
    gated_mlp: bool
    parallel: bool = False
    tied: bool = False

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def n_params(self) -> int:
        """Weights of all matrices; biases, norms and position embeddings are left out."""
        attention = 2 * self.d_model * self.d_model + 2 * self.d_model * self.n_kv_heads * self.d_head
        mlp = (3 if self.gated_mlp else 2) * self.d_model * self.d_mlp
        return self.n_layers * (attention + mlp) + (2 - self.tied) * self.d_model * self.d_vocab


@dataclass(frozen=True)
class ModelEntry:
    """One model on the Hugging Face hub.

    Attributes:
        name: Its hub name, `"organization/model"`.
        size: Number of parameters as stated by its authors.
        corpus: What it was pretrained on, where this differs from the family's entry.
        shape: Its sizes; None where they are not recorded.
    """

    name: str
    size: str
    corpus: str | None = None
    shape: Shape | None = None

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
        license: License of the weights.
        cite: Key of the paper, see `memlens.report.bibliography`; `""` for none.
        models: The models.
        checkpoints: How revisions of training checkpoints are named, or `""` if there are none.
        bos: Whether each text began with a BOS token in training.
        post_norm: Whether a norm stands between a sublayer and the residual stream.
        hooked: How `HookedTransformer` (TransformerLens 3.x) runs it; None where it does not.
        by_name: Whether the architecture is shared with other families, so that only a name tells this one.
    """

    name: str
    architecture: str
    corpus: str
    license: str
    cite: str
    models: tuple[ModelEntry, ...]
    checkpoints: str = ""
    bos: bool = False
    post_norm: bool = False
    hooked: HookedForm | None = None
    by_name: bool = False


FAMILIES: Registry[Family] = Registry("family of models")
"""The families by name."""


def register_family(family: Family) -> Family:
    """Make a family known by its name, and return it.

    Raises:
        OptionError: Another family has this name.
    """
    return FAMILIES.add(family.name, family)


def _pythia(size: str, suffix: str = "", corpus: str | None = None) -> ModelEntry:
    layers, width, heads, vocab = {
        "14m": (6, 128, 4, 50304),
        "31m": (6, 256, 8, 50304),
        "70m": (6, 512, 8, 50304),
        "160m": (12, 768, 12, 50304),
        "410m": (24, 1024, 16, 50304),
        "1b": (16, 2048, 8, 50304),
        "1.4b": (24, 2048, 16, 50304),
        "2.8b": (32, 2560, 32, 50304),
        "6.9b": (32, 4096, 32, 50432),
        "12b": (36, 5120, 40, 50688),
    }[size]
    shape = Shape(layers, width, heads, heads, 4 * width, vocab, gated_mlp=False, parallel=True)
    return ModelEntry(f"EleutherAI/pythia-{size}{suffix}", size.upper(), corpus, shape)


def _gated(
    name: str,
    size: str,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    d_mlp: int,
    vocab: int,
    *,
    tied: bool = False,
) -> ModelEntry:
    return ModelEntry(
        name, size, None, Shape(layers, width, heads, kv_heads, d_mlp, vocab, gated_mlp=True, tied=tied)
    )


def _starcoder(size: str, layers: int, width: int, heads: int) -> ModelEntry:
    shape = Shape(layers, width, heads, 1, 4 * width, 49152, gated_mlp=False, tied=True)
    return ModelEntry(f"bigcode/starcoderbase-{size}", size.upper(), None, shape)


_PILE = "The Pile"
_PYTHIA_SIZES = ["70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]

register_family(
    Family(
        name="pythia",
        architecture="GPTNeoXForCausalLM",
        corpus=_PILE,
        license="Apache-2.0",
        cite="biderman2023",
        checkpoints="step{step}",
        hooked=hooked_forms.GPT_NEOX,
        models=(
            *(_pythia(size) for size in ["14m", "31m", *_PYTHIA_SIZES]),
            *(_pythia(size, "-deduped", "The Pile, deduplicated") for size in _PYTHIA_SIZES),
        ),
    )
)
register_family(
    Family(
        name="gpt-neo",
        architecture="GPTNeoForCausalLM",
        corpus=_PILE,
        license="MIT",
        cite="black2021",
        hooked=hooked_forms.GPT_NEO,
        models=tuple(
            ModelEntry(f"EleutherAI/gpt-neo-{size}", size.upper()) for size in ("125m", "1.3B", "2.7B")
        ),
    )
)
register_family(
    Family(
        name="olmo1",
        architecture="OlmoForCausalLM",
        corpus="Dolma",
        license="Apache-2.0",
        cite="groeneveld2024",
        checkpoints="step{step}-tokens{tokens}B",
        hooked=hooked_forms.OLMO,
        models=(
            _gated("allenai/OLMo-1B-hf", "1B", 16, 2048, 16, 16, 8192, 50304, tied=True),
            ModelEntry("allenai/OLMo-1B-0724-hf", "1B"),
            _gated("allenai/OLMo-7B-hf", "7B", 32, 4096, 32, 32, 11008, 50304),
            ModelEntry("allenai/OLMo-7B-0424-hf", "7B"),
            ModelEntry("allenai/OLMo-7B-0724-hf", "7B"),
        ),
    )
)
register_family(
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        corpus="OLMo-mix-1124, then Dolmino-mix-1124",
        license="Apache-2.0",
        cite="olmo2024",
        checkpoints="stage1-step{step}-tokens{tokens}B",
        post_norm=True,
        hooked=hooked_forms.OLMO2,
        models=(
            _gated("allenai/OLMo-2-0425-1B", "1B", 16, 2048, 16, 16, 8192, 100352),
            _gated("allenai/OLMo-2-1124-7B", "7B", 32, 4096, 32, 32, 11008, 100352),
            _gated("allenai/OLMo-2-1124-13B", "13B", 40, 5120, 40, 40, 13824, 100352),
            _gated("allenai/OLMo-2-0325-32B", "32B", 64, 5120, 40, 8, 27648, 100352),
        ),
    )
)
register_family(
    Family(
        name="olmo3",
        architecture="Olmo3ForCausalLM",
        corpus="Dolma 3",
        license="Apache-2.0",
        cite="olmo2025",
        checkpoints="stage1-step{step}",
        post_norm=True,
        hooked=hooked_forms.OLMO3,
        models=(
            _gated("allenai/Olmo-3-1025-7B", "7B", 32, 4096, 32, 32, 11008, 100278),
            _gated("allenai/Olmo-3-1125-32B", "32B", 64, 5120, 40, 8, 27648, 100278),
        ),
    )
)
register_family(
    Family(
        name="openllama",
        architecture="LlamaForCausalLM",
        corpus="RedPajama-Data-1T",
        license="Apache-2.0",
        cite="geng2023",
        bos=True,
        by_name=True,
        models=(
            _gated("openlm-research/open_llama_3b", "3B", 26, 3200, 32, 32, 8640, 32000),
            _gated("openlm-research/open_llama_7b", "7B", 32, 4096, 32, 32, 11008, 32000),
            _gated("openlm-research/open_llama_13b", "13B", 40, 5120, 40, 40, 13824, 32000),
        ),
    )
)
register_family(
    Family(
        name="starcoder",
        architecture="GPTBigCodeForCausalLM",
        corpus="The Stack v1.2 (starcoderdata)",
        license="BigCode OpenRAIL-M v1",
        cite="li2023",
        models=(
            _starcoder("1b", 24, 2048, 16),
            _starcoder("3b", 36, 2816, 22),
            _starcoder("7b", 42, 4096, 32),
            ModelEntry("bigcode/starcoderbase", "15.5B"),
        ),
    )
)
register_family(
    Family(
        name="starcoder2",
        architecture="Starcoder2ForCausalLM",
        corpus="The Stack v2",
        license="BigCode OpenRAIL-M v1",
        cite="lozhkov2024",
        models=tuple(ModelEntry(f"bigcode/starcoder2-{size}", size.upper()) for size in ("3b", "7b", "15b")),
    )
)


def family_by_architecture(architecture: str) -> Family | None:
    """Return the family that a class of transformers belongs to; None where it is of none or of several."""
    found = [f for f in FAMILIES.values() if f.architecture == architecture and not f.by_name]
    return found[0] if len(found) == 1 else None


def _all_entries() -> Iterator[tuple[Family, ModelEntry]]:
    for family in FAMILIES.values():
        for entry in family.models:
            yield family, entry


def step_of(revision: str) -> int | None:
    """Return the training step that a revision is named after in one of the families, or None.

    >>> step_of("step9"), step_of("stage1-step9-tokens5B"), step_of("main")
    (9, 9, None)
    """
    for named in dict.fromkeys(["step{step}", *(family.checkpoints for family in FAMILIES.values())]):
        pattern = re.escape(named).replace(r"\{step\}", r"(\d+)").replace(r"\{tokens\}", r"\d+")
        if named and (found := re.fullmatch(pattern, revision)):
            return int(found[1])
    return None


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
    """Return one row per model: what `memlens models` prints.

    Columns: `model` (hub name), `family`, `size`, `architecture`, `corpus`, `license`, `checkpoints` (how
    revisions of training checkpoints are named), `bos` (`"yes"` where training texts began with a BOS token),
    `HookedTransformer` and `TransformerBridge` (the releases of TransformerLens in which each class runs it,
    `""` for none), `backend` (what `backend="auto"` gives here).

    >>> table = families_table().set_index("model")
    >>> table.loc["bigcode/starcoder2-3b", "TransformerBridge"]
    '3.9, 4.x'
    """
    from memlens.models.names import has_hooked_transformer

    def row(family: Family, entry: ModelEntry) -> dict[str, str]:
        hooked_here = family.hooked is not None and has_hooked_transformer()
        return {
            "model": entry.name,
            "family": family.name,
            "size": entry.size,
            "architecture": family.architecture,
            "corpus": entry.corpus or family.corpus,
            "license": family.license,
            "checkpoints": family.checkpoints,
            "bos": "yes" if family.bos else "",
            "HookedTransformer": "3.9" if family.hooked is not None else "",
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
    if (own := family_by_architecture(architecture)) is not None:
        return own.name
    sharing = [f.name for f in FAMILIES.values() if f.by_name and f.architecture == architecture]
    named = [n for n in sharing if name.removeprefix("zoo/").startswith(f"{n}-")]
    if named:
        return named[0]
    short = architecture.removesuffix("ForCausalLM").lower() if sharing else architecture
    return short or "unknown"
