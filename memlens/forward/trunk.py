"""`Trunk`: run some of a model's layers from a residual, and unembed only the requested positions.

Both backends offer the same three steps, `embed`, `run` and `unembed`, whose composition is the model's own
forward pass up to rounding. TransformerLens hooks fire in the layers that run.

A model may be spread over devices (`device_map`): its layers run where their weights are, and what comes out
of a step is on the device of the embedding.

Layers before `start` are really skipped: `HookedTransformer` can start at a layer; in a `TransformerBridge`
the skipped blocks are replaced by a pass-through for the duration of one call.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memlens.errors import UnsupportedModelError
from memlens.forward.exclusive import computation, known_of
from memlens.forward.hooks import check_layer, hook_points
from memlens.forward.read_blocks import Surroundings, bridge_surroundings, hooked_surroundings


def is_bridge(model: Any) -> bool:
    """Whether the model is a `TransformerBridge` (otherwise it is taken to be a `HookedTransformer`)."""
    return hasattr(model, "original_model")


def require_model(model: Any) -> None:
    """Raise `UnsupportedModelError` unless this is a TransformerLens model without active dropout."""
    if not hasattr(model, "blocks") or not hasattr(model, "cfg"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a TransformerLens model: load it with memlens.load_model first."
        )
    inner = getattr(model, "original_model", None)
    for module in (model if inner is None else inner).modules():
        facts = vars(module)
        if facts["training"] and any(isinstance(p := facts.get(n), float) and p > 0 for n in _DROPOUT_RATES):
            raise UnsupportedModelError(
                "the model is in training mode and has dropout, so every number would be random: call "
                "model.eval() first."
            )


_DROPOUT_RATES = ("p", "attention_dropout", "attn_dropout", "dropout")
"""Attributes of modules that hold a rate: that of `nn.Dropout`, and those of attention modules."""


def has_own_forward(model: Any) -> bool:
    """Whether the user has replaced the forward of the whole model, which running its layers would go around.

    A replaced forward of a layer, or of a part of one, is what the layers run.
    """
    for module in (model, getattr(model, "original_model", model)):
        forward = vars(module).get("forward")
        if forward is not None and not hasattr(module, "_hf_hook"):  # accelerate's does the same and more
            return True
        home = getattr(inspect.unwrap(type(module).forward), "__module__", "")
        if home != type(module).__module__ and not home.startswith(_LIBRARIES):
            return True
    return False


_LIBRARIES = ("transformer_lens.", "transformers.", "transformers_modules.", "torch.")


class Trunk:
    """A view of a model as embedding, layers and unembedding, without weights of its own.

    Args:
        model: A `HookedTransformer` or a `TransformerBridge`.

    Raises:
        UnsupportedModelError: The model is not a causal stack of layers that can be run from the middle, or
            it is in training mode and has dropout.

    Example:
        >>> import memlens as ml, torch
        >>> model = ml.load_model("zoo/pythia-s")
        >>> trunk, tokens = ml.Trunk(model), torch.tensor([[5, 6, 7]])
        >>> resid = trunk.run(trunk.embed(tokens), 0)
        >>> torch.allclose(trunk.unembed(resid), model(tokens), atol=1e-4)
        True
    """

    logit_scale: float
    logit_softcap: float | None

    def __init__(self, model: Any) -> None:
        require_model(model)
        self.model = model
        cfg = model.cfg
        self.n_layers: int = len(model.blocks)
        self.n_heads: int = cfg.n_heads
        self.n_kv_heads: int = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        self.d_model: int = cfg.d_model
        self.d_head: int = cfg.d_head
        self.d_vocab: int = cfg.d_vocab
        self.n_ctx: int = cfg.n_ctx
        self.parallel: bool = "blocks.0.hook_resid_mid" not in hook_points(model)
        self.logit_scale, self.logit_softcap = _after_unembedding(model)
        self._run = _BridgeRunner(model) if is_bridge(model) else _HookedRunner(model)

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where tokens must be."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights."""
        return next(self.model.parameters()).dtype

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual at the input of layer 0 (with position embeddings, where there are any).

        Raises:
            UnsupportedModelError: The forward of the whole model was replaced (`has_own_forward`).
        """
        if has_own_forward(self.model):
            raise UnsupportedModelError(
                "the forward of the whole model was replaced, and running its layers would go around it: "
                "replace the forward of a layer or of a part of one, or use engine='reference'."
            )
        with computation(self.model):
            return self._run.embed(tokens.to(self.device)).to(self.device)

    def run(
        self, resid: Float[Tensor, "batch pos d_model"], start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run layers ``start .. stop-1``.

        Args:
            resid: The residual at the input of layer `start`.
            start: First layer that runs.
            stop: First layer that does not run; by default all layers from `start` on run.

        Returns:
            The residual at the input of layer `stop`, before any final norm.
        """
        stop = self.n_layers if stop is None else stop
        if start >= stop:
            return resid
        check_layer(start, self.n_layers)
        check_layer(stop - 1, self.n_layers)
        with computation(self.model):
            return self._run.run(resid, start, stop).to(self.device)

    def unembed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Return the logits of final residuals: final norm, unembedding, then `finish_logits`."""
        flat = resid.reshape(1, -1, self.d_model)
        with computation(self.model):
            logits = self.model.unembed(self.model.ln_final(flat)).to(self.device)
        return self.finish_logits(logits.reshape(*resid.shape[:-1], logits.shape[-1]))

    def finish_logits(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
        r"""Return what the model makes of its unembedding's output :math:`x`: :math:`c\tanh(s x / c)`.

        The factor `logit_scale` :math:`s` (Granite, Cohere) and the cap `logit_softcap` :math:`c` (Gemma 2)
        are the model's own; most models have neither, and the logits are :math:`x`.
        """
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = (logits / self.logit_softcap).tanh() * self.logit_softcap
        return logits

    def surroundings(self, width: int) -> list[Surroundings]:
        """Return what each block receives in addition to the residual, for `width` positions.

        Raises:
            UnsupportedModelError: Positions enter in a way that this form cannot express.
        """
        with computation(self.model):
            return self._run.surroundings(width)

    def final_norm(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the final norm of residuals."""
        return self.model.ln_final(resid.reshape(1, -1, self.d_model)).reshape(resid.shape).to(self.device)


def _after_unembedding(model: Any) -> tuple[float, float | None]:
    """Return the factor and the soft cap that a model applies to its logits."""
    if not is_bridge(model):
        cap = float(getattr(model.cfg, "output_logits_soft_cap", -1.0) or -1.0)
        return 1.0, cap if cap > 0 else None
    config = model.original_model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    return scale / divisor, None if cap is None else float(cap)


_EXTRA = "extra outputs of a block"


@contextmanager
def noting_block_outputs(model: Any, known: dict[str, Any]) -> Iterator[None]:
    """Note the form of what a bridge's blocks return, in a pass of the body, so that `Trunk` needs none."""
    if not is_bridge(model):
        yield
        return

    def look(_module: nn.Module, _args: Any, out: Any) -> None:
        known[_EXTRA] = len(out) - 1 if isinstance(out, tuple) else None

    handle = model.blocks[0].register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


class _HookedRunner:
    def __init__(self, model: Any) -> None:
        self.model = model

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, stop_at_layer=0)

    def run(self, resid: Tensor, start: int, stop: int) -> Tensor:
        return self.model(resid, start_at_layer=start, stop_at_layer=stop)

    def surroundings(self, width: int) -> list[Surroundings]:
        return hooked_surroundings(self.model, width)


class _BridgeRunner:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks: Sequence[nn.Module] = list(model.blocks)
        hf = model.original_model
        self.base: Any = hf.base_model
        if self.base is hf or not hasattr(model, "ln_final") or not hasattr(model, "unembed"):
            raise UnsupportedModelError(
                f"{type(hf).__name__} has no inner decoder that memlens can enter at a layer: "
                "use engine='reference'."
            )
        self.norm: nn.Module = _inner_norm(model, self.base)

    @property
    def extra_outputs(self) -> int | None:
        """Number of a block's outputs besides the residual (None for a bare tensor), found once."""
        known = known_of(self.model)
        if _EXTRA not in known:
            device = next(self.model.parameters()).device
            with torch.no_grad(), noting_block_outputs(self.model, known):
                self.base(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
        return known[_EXTRA]

    @contextmanager
    def _skipping(self, blocks: Sequence[nn.Module], extra_outputs: int | None) -> Iterator[None]:
        changed = {"forward": _pass_through(extra_outputs)}
        own = []  # a user may have set a forward, and hooks, which must not act on what is passed through
        try:
            for block in blocks:
                facts = block.__dict__
                hooks = {name: _library_hooks(facts[name]) for name in _HOOKS}
                own.append((facts, {name: facts[name] for name in ("forward", *_HOOKS) if name in facts}))
                facts |= changed | hooks
            yield
        finally:
            for facts, before in own:
                facts.pop("forward", None)
                facts |= before

    def _forward(self, start: int, stop: int, **inputs: Tensor) -> Tensor:
        skipped = [*self.blocks[:start], *self.blocks[stop:]]
        with self._skipping(skipped, self.extra_outputs), self._skipping([self.norm], None):
            return self.base(use_cache=False, **inputs).last_hidden_state

    def embed(self, tokens: Tensor) -> Tensor:
        return self._forward(0, 0, input_ids=tokens)

    def run(self, resid: Tensor, start: int, stop: int) -> Tensor:
        def swap(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (resid, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": resid}

        _ = self.extra_outputs  # finding it runs the blocks, which must not receive this residual
        handle = self.blocks[start].register_forward_pre_hook(swap, with_kwargs=True)
        try:
            return self._forward(start, stop, inputs_embeds=resid)
        finally:
            handle.remove()

    def surroundings(self, width: int) -> list[Surroundings]:
        """Skipped blocks still receive their masks and rotations."""
        _ = self.extra_outputs  # finding it runs the blocks, so it must be known before
        given: list[tuple[Tensor | None, Any]] = []

        def look(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            given.append((kwargs.get("attention_mask"), kwargs.get("position_embeddings")))

        handles = [b.register_forward_pre_hook(look, with_kwargs=True) for b in self.blocks]
        try:
            device = next(self.model.parameters()).device
            self.embed(torch.zeros((1, width), dtype=torch.long, device=device))
        finally:
            for handle in handles:
                handle.remove()
        return bridge_surroundings(self.model, given, width)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _library_hooks(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """Return the hooks that are not a user's."""
    libraries = (*_LIBRARIES, "memlens.")
    return OrderedDict((n, hook) for n, hook in hooks.items() if module_of(hook).startswith(libraries))


def module_of(hook: Any) -> str:
    """Return the name of the module that defines a hook."""
    return getattr(getattr(hook, "func", hook), "__module__", None) or ""


def _pass_through(extra_outputs: int | None) -> Callable[..., Any]:
    """Return a forward that returns its input, in the form that the surrounding model expects."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if extra_outputs is None else (hidden, *[None] * extra_outputs)

    return forward


def _inner_norm(model: Any, base: nn.Module) -> nn.Module:
    """Return the final norm as the inner decoder calls it (the bridge's component takes its place)."""
    inside = {id(m) for m in base.modules()}
    if id(model.ln_final) not in inside:
        raise UnsupportedModelError(
            f"the final norm of {type(model.original_model).__name__} lies outside its decoder: "
            "use engine='reference'."
        )
    return model.ln_final
