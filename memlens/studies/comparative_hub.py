"""The models of arXiv 2603.21658: hub names, revisions, corpora, and the shapes that a plan needs.

Families, how many models of each, and the sizes of all but Pythia's are known from readers of the full text;
which repository and revision stands behind a size is our choice, and `note` says where the paper's is not
known. Base models, no instruction tuning.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from memlens.errors import ModelNotFoundError, near_matches
from memlens.models.families import find_model

__all__ = ["HUB_MODELS", "HubModel", "hub_table", "shape_of"]


@dataclass(frozen=True)
class HubModel:
    """One model of the paper's list.

    Attributes:
        name: Hub name, as in the family table.
        n_layers: Blocks.
        d_model: Width.
        n_heads: Query heads of a block.
        n_kv_heads: Key and value heads.
        d_mlp: Width of the MLP.
        d_vocab: Rows of the embedding.
        gated: Whether the MLP has a gate (three matrices).
        parallel: Whether attention and MLP read the same input.
        tied: Whether embedding and unembedding share weights.
        revision: What is loaded.
        note: What of the paper's own choice is not known.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    d_vocab: int
    gated: bool
    parallel: bool = False
    tied: bool = False
    revision: str = "main"
    note: str = ""

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def n_params(self) -> int:
        """Weights of all matrices; biases, norms and position embeddings are left out."""
        attention = 2 * self.d_model * self.d_model + 2 * self.d_model * self.n_kv_heads * self.d_head
        mlp = (3 if self.gated else 2) * self.d_model * self.d_mlp
        return self.n_layers * (attention + mlp) + (2 - self.tied) * self.d_model * self.d_vocab


_PYTHIA = "sizes as in the authors' earlier code; deduplicated or not, and the step, is not known"
_DOLMA = "which Dolma 1.x is not known: OLMo-{size}-0724-hf is of a later version"
_STAGE = "main is the end of all training stages; which was taken, and what was sampled, is not known"
_PLAIN = "the size is known; repository and revision are the obvious ones"


def _pythia(size: str, layers: int, width: int, heads: int, vocab: int) -> HubModel:
    return HubModel(
        f"EleutherAI/pythia-{size}", layers, width, heads, heads, 4 * width, vocab, gated=False,
        parallel=True, revision="step143000", note=_PYTHIA,
    )  # fmt: skip


def _gated(
    name: str, layers: int, width: int, heads: int, kv: int, mlp: int, vocab: int, note: str, *,
    tied: bool = False,
) -> HubModel:  # fmt: skip
    return HubModel(name, layers, width, heads, kv, mlp, vocab, gated=True, tied=tied, note=note)


def _starcoder(size: str, layers: int, width: int, heads: int) -> HubModel:
    return HubModel(
        f"bigcode/starcoderbase-{size}", layers, width, heads, 1, 4 * width, 49152, gated=False, tied=True,
        note=_PLAIN,
    )  # fmt: skip


HUB_MODELS: tuple[HubModel, ...] = (
    _pythia("160m", 12, 768, 12, 50304),
    _pythia("410m", 24, 1024, 16, 50304),
    _pythia("1b", 16, 2048, 8, 50304),
    _pythia("2.8b", 32, 2560, 32, 50304),
    _pythia("6.9b", 32, 4096, 32, 50432),
    _pythia("12b", 36, 5120, 40, 50688),
    _gated("allenai/OLMo-1B-hf", 16, 2048, 16, 16, 8192, 50304, _DOLMA.format(size="1B"), tied=True),
    _gated("allenai/OLMo-7B-hf", 32, 4096, 32, 32, 11008, 50304, _DOLMA.format(size="7B")),
    _gated("allenai/OLMo-2-0425-1B", 16, 2048, 16, 16, 8192, 100352, _STAGE),
    _gated("allenai/OLMo-2-1124-7B", 32, 4096, 32, 32, 11008, 100352, _STAGE),
    _gated("allenai/OLMo-2-1124-13B", 40, 5120, 40, 40, 13824, 100352, _STAGE),
    _gated("allenai/OLMo-2-0325-32B", 64, 5120, 40, 8, 27648, 100352, _STAGE),
    _gated("allenai/Olmo-3-1025-7B", 32, 4096, 32, 32, 11008, 100278, _STAGE),
    _gated("allenai/Olmo-3-1125-32B", 64, 5120, 40, 8, 27648, 100278, _STAGE),
    _gated("openlm-research/open_llama_3b", 26, 3200, 32, 32, 8640, 32000, _PLAIN),
    _gated("openlm-research/open_llama_7b", 32, 4096, 32, 32, 11008, 32000, _PLAIN),
    _gated("openlm-research/open_llama_13b", 40, 5120, 40, 40, 13824, 32000, _PLAIN),
    _starcoder("1b", 24, 2048, 16),
    _starcoder("3b", 36, 2816, 22),
    _starcoder("7b", 42, 4096, 32),
)
"""The twenty models, in the order of families and sizes."""


def shape_of(name: str) -> HubModel:
    """Return the shape of a model of the list, with or without the organization.

    Raises:
        ModelNotFoundError: It is not in the list.

    >>> shape_of("starcoderbase-7b").n_layers * shape_of("starcoderbase-7b").n_heads
    1344
    """
    for model in HUB_MODELS:
        if name.lower() in (model.name.lower(), model.name.rpartition("/")[2].lower()):
            return model
    known = [model.name for model in HUB_MODELS]
    raise ModelNotFoundError(
        f"the paper's list has no model {name!r}: give one of {', '.join(known)}.{near_matches(name, known)}"
    )


def hub_table() -> pd.DataFrame:
    """Return one row a model: `family`, `model`, `size`, `revision`, `corpus`, `heads` (all), `note`.

    >>> hub_table()["family"].value_counts().to_dict()["pythia"]
    6
    """
    rows = []
    for model in HUB_MODELS:
        found = find_model(model.name)
        assert found is not None  # the tests hold the list against the family table
        family, entry = found
        rows.append(
            {
                "family": family.name,
                "model": model.name,
                "size": entry.size,
                "revision": model.revision,
                "corpus": entry.corpus or family.corpus,
                "heads": model.n_layers * model.n_heads,
                "note": model.note,
            }
        )
    return pd.DataFrame(rows)
