"""The families of models that memlens is made for, each declared in one entry of `families.yaml`.

Every family here has an open pretraining corpus, so that a sequence can be known to have been seen.
Other architectures that `TransformerBridge` supports load too; they are not in the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pandas as pd
import yaml

from memlens.errors import OptionError
from memlens.models import hooked_forms
from memlens.models.hooked_forms import HookedForm
from memlens.registry import Registry


@dataclass(frozen=True)
class Shape:
    """The sizes of a model: its costs can be planned from them without loading it.

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
        head_width: Width of a head where it is not `d_model` over `n_heads`.
        itemsize: Bytes per weight and activation.
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
    head_width: int | None = None
    itemsize: int = 2

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.head_width or self.d_model // self.n_heads

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

    Raises:
        OptionError: One of the models is no `ModelEntry`.
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

    def __post_init__(self) -> None:
        for model in self.models:
            if not isinstance(model, ModelEntry):
                raise OptionError(
                    f"the family {self.name!r} has {model!r} as a model: give a ModelEntry(name, size)."
                )


FAMILIES: Registry[Family] = Registry("family of models", of=Family)
"""The families by name."""


def register_family(family: Family) -> Family:
    """Make a family known by its name, and return it.

    Raises:
        OptionError: Another family has this name.
    """
    return FAMILIES.add(family.name, family)


def _declared(name: str, facts: dict[str, Any]) -> Family:
    """Return a family of `families.yaml`."""
    traits = facts.pop("traits", {})
    entries = []
    for hub_name, entry in facts.pop("models").items():
        sizes, own = entry.pop("shape", None), {"tied": True} if entry.pop("tied", False) else {}
        shape = None if sizes is None else Shape(*sizes, **(traits | own))
        entries.append(ModelEntry(hub_name, **entry, shape=shape))
    form = facts.pop("hooked", None)
    hooked = None if form is None else getattr(hooked_forms, form)
    return Family(name=name, models=tuple(entries), hooked=hooked, **facts)


_FILE = resources.files("memlens.models").joinpath("families.yaml")
for _name, _facts in yaml.safe_load(_FILE.read_text(encoding="utf-8")).items():
    register_family(_declared(_name, _facts))


def family_by_architecture(architecture: str) -> Family | None:
    """Return the family that a class of transformers belongs to; None if it belongs to none or to several."""
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
