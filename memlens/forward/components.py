"""Components of a model, and where their weights are in the parameters of a Hugging Face checkpoint.

A component is a head, a neuron, a layer's MLP, a layer's attention or a whole layer. Its weights are rows and
columns of the layer's linear maps, which have the same names in every architecture (`PARTS`): queries, keys
and values `q`, `k`, `v`, attention's output `o`, the MLP's `in`, `gate` and `out`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlens.errors import OptionError, SiteError, UnsupportedModelError

ComponentKind = Literal["head", "neuron", "layer_mlp", "layer_attention"]
"""What localizers rank and carriers are made of."""

COMPONENT_KINDS: tuple[ComponentKind, ...] = get_args(ComponentKind)

Part = Literal["q", "k", "v", "o", "in", "gate", "out"]
"""The linear maps of a layer: a head has rows of `q`, `k` and `v` and columns of `o` to itself, a neuron has
rows of `in` and `gate` and a column of `out`."""
NormPart = Literal["attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm", "q_norm", "k_norm"]
"""The norms of a layer: before attention and the MLP, after them, and of queries and keys."""

PARTS: tuple[Part, ...] = get_args(Part)
NORM_PARTS: tuple[NormPart, ...] = get_args(NormPart)


@dataclass(frozen=True, order=True)
class Component:
    """One component of a model.

    Attributes:
        kind: "head", "neuron", "layer_mlp", "layer_attention", or "layer" for all of a layer with its norms.
        layer: Its layer.
        index: The head or neuron in its layer; 0 for the other kinds.

    >>> str(Component("head", 3, 1)), str(Component("layer_mlp", 0))
    ('L3H1', 'L0 MLP')
    """

    kind: ComponentKind | Literal["layer"]
    layer: int
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Component:
        """Return the component that a text names: "L3H1", "L3N20", "L3 MLP", "L3 attention" or "L3".

        Raises:
            OptionError: It names none.

        >>> Component.parse("L3N20")
        Component(kind='neuron', layer=3, index=20)
        """
        found = re.fullmatch(r"\s*L(\d+)\s*(?:([HN])(\d+)|(MLP|attention))?\s*", text)
        if found is None:
            raise OptionError(
                f"{text!r} is not a component: write L3H1 (a head), L3N20 (a neuron), 'L3 MLP', "
                "'L3 attention' or L3 (a whole layer)."
            )
        layer, one, index, whole = found.groups()
        kinds: dict[str | None, ComponentKind | Literal["layer"]] = {
            "H": "head", "N": "neuron", "MLP": "layer_mlp", "attention": "layer_attention", None: "layer",
        }  # fmt: skip
        return cls(kinds[one or whole], int(layer), int(index or 0))

    def __str__(self) -> str:
        names = {"head": f"H{self.index}", "neuron": f"N{self.index}", "layer_mlp": " MLP", "layer": ""}
        return f"L{self.layer}{names.get(self.kind, ' attention')}"


@dataclass(frozen=True, eq=False)
class WeightSlice:
    """A group of rows or columns of a weight matrix, or of entries of a vector.

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

    prefix: str
    attention: dict[str, str]
    mlp_in: tuple[str, ...]
    mlp_out: str
    transposed: bool

    @property
    def rows(self) -> int:
        """The dimension of a matrix that counts its outputs."""
        return 1 if self.transposed else 0


_FUSED = ("query_key_value", "c_attn")
_ATTENTION_OUT = ("o_proj", "out_proj", "dense", "c_proj")
_MLP_OUT = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out")
_MLP_IN = ("gate_proj", "up_proj", "dense_h_to_4h", "c_fc", "fc1", "fc_in")
_GATE = "gate_proj"
_POST_MLP = "post_feedforward_layernorm"
_NORMS: dict[NormPart, tuple[str, ...]] = {
    "attn_norm": ("input_layernorm", "ln_1"),
    "attn_post_norm": (),
    "mlp_norm": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"),
    "mlp_post_norm": (_POST_MLP,),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
}
"""Names of norms inside a layer; with a norm after the MLP, `post_attention_layernorm` is after attention."""


class ComponentWeights:
    """Where the components of a Hugging Face model are in its parameters.

    Heads own the rows of the query (and of the key and value, unless heads share them) and the columns of the
    output projection; neurons own a column of the MLP's output matrix and, with `gates`, their rows of its
    input matrices. `slices` names matrices only; `matrix`, `bias` and `norm` find all that a layer has.

    Attributes:
        n_layers: Number of layers.
        n_heads: Query heads per layer.
        n_kv_heads: Heads of keys and values per layer.
        n_neurons: Hidden units of each layer's MLP.
        d_head: Width of a head.

    Raises:
        UnsupportedModelError: The model's weight matrices are not among the known forms.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
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
        self.n_kv_heads = self._kv_heads(first)

    def _kv_heads(self, block: _Block) -> int:
        if "fused" not in block.attention:
            return self._parameters[block.attention["k"]].shape[block.rows] // self.d_head
        size = self._parameters[block.attention["fused"]].shape[block.rows]
        return (size // self.d_head - self.n_heads) // 2

    def _prefixes(self) -> list[str]:
        for name, module in self._model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.n_layers:
                return [f"{name}.{layer}" for layer in range(self.n_layers)]
        raise UnsupportedModelError(
            f"there is no list of {self.n_layers} layers in a {type(self._model).__name__}."
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
                f"memlens does not know the weights of {prefix} in a {type(self._model).__name__}: "
                f"{', '.join(inside) or 'no matrices'}."
            )
        module = self._model.get_submodule(mlp_out[0].removesuffix(".weight"))
        return _Block(prefix, found, mlp_in, mlp_out[0], transposed=type(module).__name__ == "Conv1D")

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
        names = sorted(block.attention, key="out".__eq__)
        attention = [self._whole(block.attention[name], block) for name in names]
        mlp = [self._whole(name, block) for name in (*block.mlp_in, block.mlp_out)]
        if kind.startswith("layer"):
            return {"layer_attention": attention, "layer_mlp": mlp, "layer": [*attention, *mlp]}[kind]
        rows, columns = block.rows, 1 - block.rows
        own = torch.tensor([index])
        inputs = block.mlp_in if self._gates else ()
        return [WeightSlice(block.mlp_out, columns, own), *(WeightSlice(n, rows, own) for n in inputs)]

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the model by its name."""
        return self._parameters[name]

    def matrix(self, layer: int, part: Part) -> WeightSlice | None:
        """Return where a linear map's outputs are (of `o` and `out` its inputs); None where there is none."""
        block = self._blocks[layer]
        if part in ("o", "out"):
            name, columns = block.attention["out"] if part == "o" else block.mlp_out, 1 - block.rows
            return WeightSlice(name, columns, torch.arange(self._parameters[name].shape[columns]))
        if part in ("in", "gate"):
            named = {name.removesuffix(".weight").rsplit(".", 1)[-1] == _GATE: name for name in block.mlp_in}
            found = named.get(part == "gate")
            return None if found is None else self._whole(found, block)
        if "fused" not in block.attention:
            return self._whole(block.attention[part], block)
        name = block.attention["fused"]
        if part != "q" and self.n_kv_heads != self.n_heads:
            start = (self.n_heads + "kv".index(part) * self.n_kv_heads) * self.d_head
            return WeightSlice(name, block.rows, start + torch.arange(self.n_kv_heads * self.d_head))
        every = [self._fused(block, part, head) for head in range(self.n_heads)]
        return WeightSlice(name, block.rows, torch.cat(every))

    def bias(self, layer: int, part: Part) -> WeightSlice | None:
        """Return where a linear map's bias is, in the order of its outputs; None where it has none."""
        found = self.matrix(layer, part)
        name = "" if found is None else f"{found.name.removesuffix('.weight')}.bias"
        if found is None or name not in self._parameters:
            return None
        whole = part in ("o", "out")
        return WeightSlice(name, 0, torch.arange(len(self._parameters[name])) if whole else found.index)

    def norm(self, layer: int, part: NormPart) -> tuple[str, str | None] | None:
        """Return the names of a norm's weight and bias (None without a bias); None without such a norm."""
        prefix, post = self._blocks[layer].prefix, "post_attention_layernorm"
        after = f"{prefix}.{_POST_MLP}.weight" in self._parameters
        names = (post,) if part == "attn_post_norm" and after else _NORMS[part]
        for name in names:
            weight, bias = (f"{prefix}.{name}.{kind}" for kind in ("weight", "bias"))
            if weight in self._parameters and not (after and part == "mlp_norm" and name == post):
                return weight, bias if bias in self._parameters else None
        return None

    def _whole(self, name: str, block: _Block) -> WeightSlice:
        rows = block.rows
        return WeightSlice(name, rows, torch.arange(self._parameters[name].shape[rows]))

    def _fused(self, block: _Block, part: str, head: int) -> Tensor:
        """The rows of a head's queries, keys or values in a fused projection, where each head has its own."""
        d, n = self.d_head, self.n_heads
        own = torch.arange(head * d, (head + 1) * d)
        if self.n_kv_heads != n:
            return own  # queries, which come first
        i = "qkv".index(part)
        # GPT-NeoX: queries, keys and values of a head are together
        interleaved = block.attention["fused"].endswith("query_key_value.weight")
        return (3 * head + i) * d + torch.arange(d) if interleaved else i * n * d + own

    def _head(self, block: _Block, head: int) -> Iterator[WeightSlice]:
        rows, columns = block.rows, 1 - block.rows
        d = self.d_head
        own = torch.arange(head * d, (head + 1) * d)
        shared = self.n_kv_heads != self.n_heads
        for part in "q" if shared else "qkv":
            if "fused" in block.attention:
                yield WeightSlice(block.attention["fused"], rows, self._fused(block, part, head))
            else:
                yield WeightSlice(block.attention[part], rows, own)
        yield WeightSlice(block.attention["out"], columns, own)
