"""Carriers: which weights of a Hugging Face model hold a planted memory, component by component.

A component is a head, a neuron, a layer's MLP or a layer's attention; its weights are slices of the
checkpoint's own parameters. A carrier is a list of components drawn from a seed. Biases and norms are never
part of a carrier.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlens.errors import OptionError, SiteError, UnsupportedModelError

ComponentKind = Literal["head", "neuron", "layer_mlp", "layer_attention"]
"""What localizers rank and carriers are made of."""

COMPONENT_KINDS: tuple[ComponentKind, ...] = get_args(ComponentKind)

CarrierKind = Literal["neurons", "heads", "mlp", "attention", "path", "spread", "none"]
"""The kinds of carrier of the localization benchmark, a to g."""

CARRIERS: tuple[CarrierKind, ...] = get_args(CarrierKind)


@dataclass(frozen=True, order=True)
class Component:
    """One component of a model.

    Attributes:
        kind: "head", "neuron", "layer_mlp" or "layer_attention".
        layer: Its layer.
        index: The head or neuron in its layer; 0 for a layer's MLP or attention.
    """

    kind: ComponentKind
    layer: int
    index: int = 0

    def __str__(self) -> str:
        names = {"head": f"H{self.index}", "neuron": f"N{self.index}", "layer_mlp": " MLP"}
        return f"L{self.layer}{names.get(self.kind, ' attention')}"


@dataclass(frozen=True, eq=False)
class WeightSlice:
    """A group of rows or columns of a weight matrix whose joint norm planting can keep.

    Attributes:
        name: The parameter's name in the Hugging Face model.
        dim: The dimension that `index` counts.
        index: Rows or columns.
    """

    name: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class _Block:
    """The names of a layer's weight matrices; `transposed` if their rows are inputs."""

    attention: dict[str, str]
    mlp_in: tuple[str, ...]
    mlp_out: str
    transposed: bool


_FUSED = ("query_key_value", "c_attn")
_ATTENTION_OUT = ("o_proj", "out_proj", "dense", "c_proj")
_MLP_OUT = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out")
_MLP_IN = ("gate_proj", "up_proj", "dense_h_to_4h", "c_fc", "fc1", "fc_in")


class ComponentWeights:
    """Where the components of a Hugging Face model are in its parameters.

    Heads own the rows of the query (and of the key and value, unless heads share them) and the columns of the
    output projection; neurons own a column of the MLP's output matrix and, with `gates`, their rows of its
    input matrices.

    Attributes:
        n_layers: Number of layers.
        n_heads: Query heads per layer.
        n_neurons: Hidden units of each layer's MLP.
        d_head: Width of a head.

    Raises:
        UnsupportedModelError: The model's weight matrices are not among the known forms.
    """

    n_layers: int
    n_heads: int
    n_neurons: int
    d_head: int

    def __init__(self, model: PreTrainedModel, *, gates: bool = True) -> None:
        self._model = model
        self._gates = gates
        self._parameters = dict(model.named_parameters())
        config = model.config.get_text_config()
        self.n_layers = int(config.num_hidden_layers)
        self.n_heads = int(config.num_attention_heads)
        self._blocks = [self._read_block(prefix) for prefix in self._prefixes()]
        first = self._blocks[0]
        out = self._parameters[first.mlp_out]
        self.n_neurons = int(out.shape[0 if first.transposed else 1])
        width = self._parameters[first.attention["out"]].shape[0 if first.transposed else 1]
        self.d_head = int(width) // self.n_heads

    def _prefixes(self) -> list[str]:
        for name, module in self._model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.n_layers:
                return [f"{name}.{layer}" for layer in range(self.n_layers)]
        raise UnsupportedModelError(
            f"planting finds no list of {self.n_layers} layers in a {type(self._model).__name__}."
        )

    def _read_block(self, prefix: str) -> _Block:
        inside = {
            name.removeprefix(f"{prefix}.").removesuffix(".weight"): name
            for name, value in self._parameters.items()
            if name.startswith(f"{prefix}.") and name.endswith(".weight") and value.ndim == 2
        }
        attention, mlp = {}, {}
        for short, name in inside.items():
            leaf = short.rsplit(".", 1)[-1]
            (mlp if "mlp" in short else attention)[leaf] = name
        fused = [attention[leaf] for leaf in _FUSED if leaf in attention]
        outs = [attention[leaf] for leaf in _ATTENTION_OUT if leaf in attention]
        found = {"out": outs[0]} if len(outs) == 1 else {}
        if fused:
            found["fused"] = fused[0]
        else:
            found |= {key: attention[f"{key}_proj"] for key in "qkv" if f"{key}_proj" in attention}
        mlp_in = tuple(mlp[leaf] for leaf in _MLP_IN if leaf in mlp)
        mlp_out = [mlp[leaf] for leaf in _MLP_OUT if leaf in mlp]
        if "out" not in found or len(found) not in (2, 4) or not mlp_in or len(mlp_out) != 1:
            raise UnsupportedModelError(
                f"planting does not know the weights of {prefix} in a {type(self._model).__name__}: "
                f"{', '.join(inside) or 'no matrices'}."
            )
        module = self._model.get_submodule(mlp_out[0].removesuffix(".weight"))
        return _Block(found, mlp_in, mlp_out[0], transposed=type(module).__name__ == "Conv1D")

    def components(self, kind: ComponentKind) -> list[Component]:
        """Return every component of a kind, layer by layer."""
        counts = {"head": self.n_heads, "neuron": self.n_neurons}
        return [
            Component(kind, layer, index)
            for layer in range(self.n_layers)
            for index in range(counts.get(kind, 1))
        ]

    def slices(self, component: Component) -> list[WeightSlice]:
        """Return the weights of a component, one slice per matrix.

        Raises:
            SiteError: The model has no such component.
        """
        kind, layer, index = component.kind, component.layer, component.index
        counts = {"head": self.n_heads, "neuron": self.n_neurons}
        if not 0 <= layer < self.n_layers or not 0 <= index < counts.get(kind, 1):
            raise SiteError(
                f"{component} does not exist: the model has {self.n_layers} layers with {self.n_heads} heads "
                f"and {self.n_neurons} neurons."
            )
        block = self._blocks[layer]
        if kind == "head":
            return list(self._head(block, index))
        if kind == "layer_attention":
            return [self._whole(block.attention[k], block) for k in sorted(block.attention, key="out".__eq__)]
        rows, columns = (1, 0) if block.transposed else (0, 1)
        if kind == "layer_mlp":
            return [self._whole(name, block) for name in (*block.mlp_in, block.mlp_out)]
        own = torch.tensor([index])
        inputs = block.mlp_in if self._gates else ()
        return [WeightSlice(block.mlp_out, columns, own), *(WeightSlice(n, rows, own) for n in inputs)]

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the model by its name."""
        return self._parameters[name]

    def _whole(self, name: str, block: _Block) -> WeightSlice:
        rows = 1 if block.transposed else 0
        return WeightSlice(name, rows, torch.arange(self._parameters[name].shape[rows]))

    def _head(self, block: _Block, head: int) -> Iterator[WeightSlice]:
        rows, columns = (1, 0) if block.transposed else (0, 1)
        d, n = self.d_head, self.n_heads
        own = torch.arange(head * d, (head + 1) * d)
        if "fused" in block.attention:
            name = block.attention["fused"]
            size = self._parameters[name].shape[rows]
            interleaved = name.endswith("query_key_value.weight")  # GPT-NeoX: q, k, v of a head are together
            parts = [own]
            if size == 3 * n * d:
                parts = [
                    (3 * head + i) * d + torch.arange(d) if interleaved else i * n * d + own for i in range(3)
                ]
            for part in parts:
                yield WeightSlice(name, rows, part)
        else:
            for key in "qkv":
                name = block.attention[key]
                if key == "q" or self._parameters[name].shape[rows] == n * d:
                    yield WeightSlice(name, rows, own)
        yield WeightSlice(block.attention["out"], columns, own)


@dataclass(frozen=True)
class Carrier:
    """What a memory is written into: "neurons=30", "neurons=1%", "neurons=30@2", "heads=4", "mlp", "path", ….

    Attributes:
        kind: "neurons", "heads", "mlp" (one layer's MLP), "attention" (one layer's), "path" (a head and, in
            later layers, neurons), "spread" (every weight) or "none" (nothing is planted).
        count: How many neurons or heads; for "path", how many neurons. 0 where `percent` says it.
        layer: The layer, where all of it is in one; None draws it, and for neurons and heads spreads them.
        percent: How many neurons or heads as a percentage of those to draw from, at least one.

    >>> Carrier.parse("neurons=30@2")
    Carrier(kind='neurons', count=30, layer=2, percent=0.0)
    >>> str(Carrier.parse("heads"))
    'heads=4'
    """

    kind: CarrierKind
    count: int = 0
    layer: int | None = None
    percent: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Carrier:
        """Return the carrier that a text names.

        Raises:
            OptionError: It names none.
        """
        pattern = r"\s*([a-z]+)\s*(?:=\s*(\d+|\d*\.?\d+\s*%))?\s*(?:@\s*(\d+))?\s*"
        found = re.fullmatch(pattern, text)
        if not found or found[1] not in CARRIERS:
            raise OptionError(
                f"carrier={text!r} is not a carrier: write neurons=30, neurons=1%, heads=4, mlp, attention, "
                "path, spread or none, with @LAYER to choose the layer."
            )
        kind: CarrierKind = found[1]  # pyright: ignore[reportAssignmentType]
        counted = {"neurons": 30, "heads": 4, "path": 15}
        count, layer = found[2] or "", found[3]
        percent = float(count.rstrip("% ")) if count.endswith("%") else 0.0
        if (
            (count and kind not in counted)
            or (layer and kind in ("path", "spread", "none"))
            or (percent and kind == "path")
            or count == "0"
            or (count.endswith("%") and not 0 < percent <= 100)
        ):
            raise OptionError(
                f"carrier={text!r}: a number from 1 goes with neurons=, heads= and path= only, a percentage "
                "with neurons= and heads=, and @LAYER with neurons, heads, mlp and attention."
            )
        number = 0 if percent else int(count or counted.get(kind, 0))
        return cls(kind, number, int(layer) if layer else None, percent)

    def __str__(self) -> str:
        count = f"={self.percent:g}%" if self.percent else f"={self.count}" if self.count else ""
        return f"{self.kind}{count}{'' if self.layer is None else f'@{self.layer}'}"

    @property
    def component_kinds(self) -> tuple[ComponentKind, ...]:
        """The kinds of component for which the carrier says which are planted."""
        own: dict[str, tuple[ComponentKind, ...]] = {
            "neurons": ("neuron",), "heads": ("head",), "mlp": ("layer_mlp",),
            "attention": ("layer_attention",), "path": ("head", "neuron"), "spread": (), "none": (),
        }  # fmt: skip
        return own[self.kind]

    def draw(
        self, weights: ComponentWeights, seed: int, *, without: Collection[Component] = ()
    ) -> list[Component]:
        """Return the components that carry, drawn from a seed; empty for "spread" and "none".

        Args:
            weights: Of the model.
            seed: Of the draw.
            without: Neurons or heads that are not drawn.

        Raises:
            OptionError: The model has too few components.
            SiteError: The layer does not exist.
        """
        random = np.random.default_rng([seed, 20_261])
        if self.layer is not None and self.layer >= weights.n_layers:
            raise SiteError(f"carrier {self}: the model has {weights.n_layers} layers.")
        if self.kind in ("neurons", "heads"):
            kind = self.component_kinds[0]
            pool = [c for c in weights.components(kind) if self.layer in (None, c.layer) and c not in without]
            count = max(1, round(len(pool) * self.percent / 100)) if self.percent else self.count
            return _some(pool, count, random, self)
        if self.kind in ("mlp", "attention"):
            layer = int(random.integers(weights.n_layers)) if self.layer is None else self.layer
            return [Component(self.component_kinds[0], layer)]
        if self.kind != "path":
            return []
        first = int(random.integers(max(weights.n_layers - 1, 1)))
        heads = [c for c in weights.components("head") if c.layer == first]
        later = [c for c in weights.components("neuron") if c.layer > first or weights.n_layers == 1]
        return [*_some(heads, 1, random, self), *_some(later, self.count, random, self)]


def _some(
    pool: Sequence[Component], n: int, random: np.random.Generator, carrier: Carrier
) -> list[Component]:
    if n > len(pool):
        raise OptionError(f"carrier {carrier}: the model has only {len(pool)} such components.")
    return [pool[i] for i in sorted(random.choice(len(pool), n, replace=False).tolist())]


class ChangedWeights:
    """The slices of a list of components, as masks and units of the parameters that they touch.

    Attributes:
        masks: For each parameter's name, True where the carrier's weights are.
        units: Slices whose norm planting keeps, one per component and matrix.
    """

    masks: dict[str, Tensor]
    units: list[WeightSlice]

    def __init__(self, weights: ComponentWeights, components: Sequence[Component]) -> None:
        self.units = [
            WeightSlice(part.name, part.dim, index)
            for component in components
            for part in weights.slices(component)
            for index in (part.index.split(1) if component.kind.startswith("layer") else [part.index])
        ]
        self.masks = {}
        for unit in self.units:
            shape = weights.parameter(unit.name).shape
            mask = self.masks.setdefault(unit.name, torch.zeros(shape, dtype=torch.bool))
            mask.index_fill_(unit.dim, unit.index, True)
