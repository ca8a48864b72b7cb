"""What one block computes, read from either backend into one plain form.

`FunctionalBlocks` runs on these. They hold views (or small rearranged copies) of the model's current weights,
so they are read again for each use and never kept. Callers first compare the output with the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memlens.errors import UnsupportedModelError
from memlens.forward.components import NormPart, Part
from memlens.forward.read_weights import Linear, Norm, attention_post_norm, read_linear, read_mlp, read_norm


@dataclass(frozen=True)
class Surroundings:
    """What a block receives in addition to the residual.

    Attributes:
        visible: True where a query (row) sees a key (column).
        rotary: Cosines and sines by position, for rotating the two halves of features; None without rotation.
    """

    visible: Bool[Tensor, "pos pos"]
    rotary: tuple[Float[Tensor, "pos rotary"], Float[Tensor, "pos rotary"]] | None


@dataclass(frozen=True)
class BlockWeights:
    """One block.

    Attributes:
        attn_norm: Before attention; None where there is none.
        attn_post_norm: Between attention and the residual; None where there is none.
        mlp_norm: Before the MLP.
        mlp_post_norm: Between the MLP and the residual.
        qkv: Returns the map to queries, keys and values, in this order, head by head: a copy, not to be kept.
        q_norm: Norm of the queries of a position: of all heads together (OLMo 2), or of each head (Qwen 3).
        k_norm: Norm of the keys likewise.
        clip: Bound of queries, keys and values; None for no bound.
        scale: Factor of the attention scores.
        o: Attention's output projection.
        mlp: The MLP.
        parallel: Whether the MLP reads the block's input instead of the residual after attention.
        around: What the block receives in addition to the residual.
    """

    attn_norm: Callable[[Tensor], Tensor] | None
    attn_post_norm: Callable[[Tensor], Tensor] | None
    mlp_norm: Callable[[Tensor], Tensor] | None
    mlp_post_norm: Callable[[Tensor], Tensor] | None
    qkv: Callable[[], Linear]
    q_norm: Norm | None
    k_norm: Norm | None
    clip: float | None
    scale: float
    o: Linear
    mlp: Callable[[Tensor], Tensor]
    parallel: bool
    around: Surroundings


def read_block(model: Any, layer: int, around: Surroundings, *, parallel: bool) -> BlockWeights:
    """Read one block of a `HookedTransformer` or a `TransformerBridge`.

    Args:
        model: The model.
        layer: The block.
        around: Its entry of `Trunk.surroundings`.
        parallel: Whether attention and MLP read the same input.

    Raises:
        UnsupportedModelError: A part has an unknown form.
    """
    block = model.blocks[layer]
    bridge = hasattr(model, "original_model")
    like = torch.empty(0, dtype=next(model.parameters()).dtype, device=next(block.parameters()).device)
    attn_norm, attn_post, mlp_norm, mlp_post = (
        None if module is None else read_norm(module, model.cfg.d_model, model.cfg, like)
        for module in _block_norms(model, layer)
    )
    if attn_post is not None and parallel:
        raise UnsupportedModelError("a parallel block with a norm after its attention.")
    if parallel and mlp_norm is None:  # one norm feeds both (GPT-J, Phi, Cohere)
        mlp_norm = attn_norm
        if mlp_norm is None:
            raise UnsupportedModelError("a parallel block without a norm.")
    qkv, o, scale, clip = (_bridge_attention if bridge else _hooked_attention)(model, block.attn)
    q_norm, k_norm = (_inner_norm(block.attn, n, model.cfg, like) for n in ("q_norm", "k_norm"))
    return BlockWeights(
        attn_norm=attn_norm,
        attn_post_norm=attn_post,
        mlp_norm=mlp_norm,
        mlp_post_norm=mlp_post,
        qkv=qkv,
        q_norm=q_norm,
        k_norm=k_norm,
        clip=clip,
        scale=scale,
        o=o,
        mlp=_mlp(model, layer),
        parallel=parallel,
        around=around,
    )


def _mlp(model: Any, layer: int) -> Callable[[Tensor], Tensor]:
    """Return the MLP from its matrices, or the module where it has another form."""
    try:
        return read_mlp(model, layer)
    except UnsupportedModelError:
        return model.blocks[layer].mlp


@dataclass(frozen=True)
class LayerParts:
    """A layer's linear maps and norms by the names of `memlens.forward.components`.

    Attributes:
        maps: `q`, `k`, `v`, `o`, `in`, `out`, and `gate` where the MLP has one.
        norms: Those that the layer has.
        act: The MLP's activation function.
        parallel: Whether attention and MLP read the same input.
    """

    maps: dict[Part, Linear]
    norms: dict[NormPart, Norm]
    act: Callable[[Tensor], Tensor]
    parallel: bool


def read_parts(model: Any, layer: int, *, parallel: bool) -> LayerParts:
    """Read a layer's weights from either backend; arguments as of `read_block`.

    Raises:
        UnsupportedModelError: A part has an unknown form.
    """
    alone = Surroundings(causal(1, next(model.blocks[layer].parameters()).device), None)
    block, mlp = read_block(model, layer, alone, parallel=parallel), read_mlp(model, layer)
    n_q, qkv = block.o.weight.shape[1], block.qkv()
    n_kv = (qkv.weight.shape[0] - n_q) // 2
    maps: dict[Part, Linear] = {
        "q": qkv.rows(slice(0, n_q)),
        "k": qkv.rows(slice(n_q, n_q + n_kv)),
        "v": qkv.rows(slice(n_q + n_kv, None)),
        "o": block.o,
        "in": mlp.into,
        "out": mlp.out,
        **({} if mlp.gate is None else {"gate": mlp.gate}),
    }
    named: dict[NormPart, Any] = {
        "attn_norm": block.attn_norm, "attn_post_norm": block.attn_post_norm, "mlp_norm": block.mlp_norm,
        "mlp_post_norm": block.mlp_post_norm, "q_norm": block.q_norm, "k_norm": block.k_norm,
    }  # fmt: skip
    norms: dict[NormPart, Norm] = {name: norm for name, norm in named.items() if norm is not None}
    return LayerParts(maps, norms, mlp.act.fn, parallel)


def _block_norms(model: Any, layer: int) -> tuple[Any, Any, Any, Any]:
    """Return the norms before and after attention and before and after the MLP; None where there is none.

    Releases of TransformerLens differ in the names of post-norms: `ln1` and `ln2`, or these with `_post`.
    """
    block = model.blocks[layer]
    first, second = getattr(block, "ln1", None), getattr(block, "ln2", None)
    post = attention_post_norm(model, layer)
    if post is None:
        return first, None, second, None
    mlp_post = getattr(block, "ln2_post", second)
    return None if first is post else first, post, None if second is mlp_post else second, mlp_post


def read_unembedding(model: Any) -> tuple[Norm, Linear]:
    """Read the final norm and the unembedding.

    Raises:
        UnsupportedModelError: The unembedding has an unknown form.
    """
    dtype, place = next(model.parameters()).dtype, next(model.unembed.parameters()).device
    norm = read_norm(model.ln_final, model.cfg.d_model, model.cfg, torch.empty(0, dtype=dtype, device=place))
    if hasattr(model, "original_model"):
        return norm, _linear(model.unembed)
    bias = model.unembed.b_U.detach()  # zeros in a model without one: not worth the time
    return norm, Linear(model.unembed.W_U.detach().T, bias if bool(bias.any()) else None)


def _inner_norm(attn: Any, name: str, cfg: Any, like: Tensor) -> Norm | None:
    """The norm of queries or keys; its width is its weight's."""
    module = getattr(attn, name, None)
    if module is None:
        return None
    inner = getattr(module, "original_component", module)
    weight = next(iter(inner.parameters()))
    return read_norm(module, weight.numel(), cfg, like)


def _hooked_attention(model: Any, attn: Any) -> tuple[Callable[[], Linear], Linear, float, float | None]:
    def part(name: str) -> tuple[Tensor, Tensor]:
        weight = getattr(attn, f"_W_{name}", None)
        own = "_" if weight is not None else ""
        return getattr(attn, f"{own}W_{name}").detach(), getattr(attn, f"{own}b_{name}").detach()

    def qkv() -> Linear:
        parts = [part(name) for name in "QKV"]
        # laid out input by output, since that way the copy reads and writes whole rows
        weight = torch.cat([w.transpose(0, 1).flatten(1) for w, _ in parts], 1).T
        return Linear(weight, torch.cat([b.reshape(-1) for _, b in parts]))

    w_o = attn.W_O.detach().reshape(-1, model.cfg.d_model).T
    clip = getattr(model.cfg, "clip_qkv", None)
    return qkv, Linear(w_o, attn.b_O.detach()), 1 / float(attn.attn_scale), clip


def _bridge_attention(model: Any, attn: Any) -> tuple[Callable[[], Linear], Linear, float, float | None]:
    hf = attn.original_component

    def qkv() -> Linear:
        parts = [_linear(getattr(attn, name)) for name in "qkv"]
        weight = torch.cat([p.weight for p in parts])
        biases = [torch.zeros_like(p.weight[:, 0]) if p.bias is None else p.bias for p in parts]
        return Linear(weight, None if all(p.bias is None for p in parts) else torch.cat(biases))

    clip = getattr(getattr(hf, "config", None), "clip_qkv", None)
    return qkv, _linear(attn.o), float(getattr(hf, "scaling", 1.0)), clip


def _linear(component: Any) -> Linear:
    found = read_linear(component)
    if found is None:
        name = type(getattr(component, "original_component", component)).__name__
        raise UnsupportedModelError(f"a projection is a {name}, not a plain nn.Linear.")
    return found


def causal(width: int, device: torch.device, window: int | None = None) -> Bool[Tensor, "pos pos"]:
    """Return which keys each query sees: itself and those before it, at most `window` of them."""
    place = torch.arange(width, device=device)
    gap = place[:, None] - place[None]
    return (gap >= 0) & (gap < (window or width + 1))


def hooked_surroundings(model: Any, width: int) -> list[Surroundings]:
    """Return what `HookedTransformer` passes to its blocks in addition to the residual."""
    cfg, found = model.cfg, []
    for block in model.blocks:
        attn, rotary = block.attn, None
        device = attn.W_O.device
        if cfg.positional_embedding_type == "rotary":
            if cfg.rotary_adjacent_pairs:
                raise UnsupportedModelError("rotary embeddings that rotate adjacent pairs.")
            rotary = (attn.rotary_cos[:width], attn.rotary_sin[:width])
        window = cfg.window_size if attn.attn_type == "local" else None
        found.append(Surroundings(causal(width, device, window), rotary))
    return found


def bridge_surroundings(
    model: Any, given: Sequence[tuple[Tensor | None, Any]], width: int
) -> list[Surroundings]:
    """Return the same from the masks and rotations that a bridge's blocks were seen to receive."""
    found = []
    for block, (mask, rotary) in zip(model.blocks, given, strict=True):
        own = getattr(block.attn.original_component, "bias", None)
        device = next(block.parameters()).device
        visible = causal(width, device)
        if isinstance(own, Tensor) and own.dtype == torch.bool:  # GPT-Neo's local layers
            visible &= own[0, 0, :width, :width]
        if mask is not None:
            mask = mask[0, 0, :width, :width].to(device)
            visible = visible & (mask if mask.dtype == torch.bool else mask == 0)
        turns = None if rotary is None else (rotary[0][0].to(device), rotary[1][0].to(device))
        found.append(Surroundings(visible, turns))
    return found
