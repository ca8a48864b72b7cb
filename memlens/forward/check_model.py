"""`check_model`: does the loaded model compute what it should, and do its hooks do what their names say?

Four things are compared on a few tokens, in the model's own precision:

- *Hugging Face*: the logits, and the residual at the input of every layer, against those of the Hugging Face
  model that the weights came from. They are recorded before TransformerLens touches that model
  (`record_reference`), because a bridge changes it in place.
- *trunk*: `Trunk`'s embed, each layer run alone from the model's own residual, and unembed, against the
  model's own forward pass. Where all layers are checked, this is their composition.
- *sites*: a zero written at each named site must do what the name claims. Zeroed `attn_out` leaves the
  residual without attention, zeroed `z` makes attention's output the same at every position, zeroed
  queries make attention the same for all tokens, and so on.
- *BOS* (only here, not when a model is loaded): the mean log-probability of a sentence's tokens with and
  without the beginning-of-text token in front, and which of the two `load_sequences` takes. This never fails.
- *fast path* (only here, too): whether the layers run as plain functions (fast) or as the model's own modules
  (slow, equally exact). This never fails.

`memlens.load_model` runs it on every model and refuses one that fails. Its logits are then those of all
layers; trunk and sites are checked in the first and last layer and in one layer of each further kind
(`kinds_of_layers`), such as one of those with a sliding window.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlens.errors import ModelLoadError, UnsupportedModelError
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.exclusive import computes, known_of
from memlens.forward.hooks import SITES, HookFn, attached, capturing, chosen_layers, hook_name, refuse_sites
from memlens.forward.trunk import Trunk, noting_block_outputs, require_model
from memlens.models.bos import expects_bos
from memlens.models.provenance import describe
from memlens.models.state import content_key
from memlens.sequences.tokenizing import encode

Status = Literal["ok", "failed", "refused", "ignored", "absent", "slow", "not compared"]
"""`ignored`: the site shows its activation, but what is written to it has no effect. `refused`: the site does
not do what its name claims, so hooks on it are errors; the rest of the model is right."""

_DISPENSABLE = ("q", "k", "pattern", "mlp_post")
"""Sites that a model can do without: only the site is refused, such as `mlp_post` of a mixture of experts."""

_ROWS, _LENGTH, _UNEMBEDDED = 2, 12, 3
_SENTENCE = "The quick brown fox jumps over the lazy dog."
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.04, torch.float16: 0.01}
"""Largest root mean square of a difference, relative to that of what it is compared with (centered).

In 16 bits rounding adds up over layers, so there these bounds are for four layers and grow with the square
root of the depth; what one layer adds is compared as well, from the same residual."""
_SAME = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
"""The same, where both sides run on the same modules or through one layer only."""


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    Attributes:
        name: What was compared, such as `"logits"` or `"site z"`.
        status: `"ok"`, or what was found instead (`Status`).
        difference: Root mean square of the difference relative to the reference's; NaN where none was taken.
        allowed: The largest `difference` that passes.
        layer: The first layer that differs, or None.
        note: One sentence.
    """

    name: str
    status: Status
    difference: float = float("nan")
    allowed: float = float("nan")
    layer: int | None = None
    note: str = ""


@dataclass(frozen=True)
class ModelCheck:
    """What `check_model` found; shows as a table.

    Attributes:
        model: The model's name.
        dtype: The precision in which it was checked.
        checks: One entry per comparison.
    """

    model: str
    dtype: str
    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[Check]:
        """The comparisons that failed."""
        return [check for check in self.checks if check.status == "failed"]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def to_frame(self) -> pd.DataFrame:
        """Return one row per comparison."""
        return pd.DataFrame([vars(check) for check in self.checks])

    def raise_if_failed(self) -> None:
        """Raise `ModelLoadError` with the first failure, if there is one."""
        for check in self.failures:
            where = "" if check.layer is None else f", first in layer {check.layer}"
            size = f" by {check.difference:.2g} (allowed: {check.allowed:.2g})"
            size = size if check.difference == check.difference else ""
            raise ModelLoadError(
                f"{self.model!r} in {self.dtype} fails the check of its {check.name}{where}: "
                f"{check.note}{size}. Numbers from it would be wrong, so it is refused; try the other "
                "backend."
            )

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else f"{len(self.failures)} failed"
        rows = [
            (
                check.name,
                check.status,
                "" if check.difference != check.difference else f"{check.difference:.1e}",
                "" if check.layer is None else str(check.layer),
                check.note,
            )
            for check in self.checks
        ]
        table = [("check", "status", "difference", "layer", "note"), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]).rstrip() for row in table]
        return "\n".join([f"{self.model} ({self.dtype}): {verdict}", *lines])

    def _repr_html_(self) -> str:
        head = f"<h4>{html.escape(self.model)} ({self.dtype}): {'ok' if self.ok else 'failed'}</h4>"
        return head + self.to_frame().to_html(index=False, float_format="{:.1e}".format, na_rep="")


@dataclass(frozen=True)
class Reference:
    """What the Hugging Face model computes on the probe tokens.

    Attributes:
        tokens: The probe tokens.
        resid: The residual at the input of each layer, `[layer, seq, pos, d_model]`; empty where the model
            does not give it.
        logits: Its logits.
    """

    tokens: Int[Tensor, "seq pos"]
    resid: list[Float[Tensor, "seq pos d_model"]]
    logits: Float[Tensor, "seq pos vocab"]


def probe_tokens(vocab: int, n_ctx: int | None) -> Int[Tensor, "seq pos"]:
    """Return the tokens that models are compared on: fixed, and spread over the vocabulary."""
    length = min(_LENGTH, n_ctx or _LENGTH)
    ids = torch.arange(_ROWS * length) * 7919 + 11
    return (ids % vocab).reshape(_ROWS, length)


@torch.no_grad()
def record_reference(hf_model: Any, name: str) -> Reference:
    """Run the Hugging Face model on the probe tokens, before anything changes it.

    Raises:
        ModelLoadError: It does not run.
    """
    config: Any = hf_model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    tokens = probe_tokens(config.vocab_size, getattr(config, "max_position_embeddings", None))
    was_training, attention = hf_model.training, getattr(config, "_attn_implementation", None)
    try:
        hf_model.set_attn_implementation("eager")  # as TransformerLens runs it: rounding alike
        out = hf_model.eval()(
            input_ids=tokens.to(next(hf_model.parameters()).device),
            output_hidden_states=True,
            use_cache=False,
        )
    except Exception as error:
        raise ModelLoadError(
            f"{name!r} does not run in transformers ({type(error).__name__}: {error})."
        ) from error
    finally:
        hf_model.train(was_training)
        if attention is not None:
            hf_model.set_attn_implementation(attention)
    states = getattr(out, "hidden_states", None) or ()
    return Reference(tokens, [state.detach() for state in states[:-1]], out.logits.detach())


@computes
@torch.no_grad()
def check_model(
    model: Any, *, reference: Reference | None = None, layers: Sequence[int] | None = None
) -> ModelCheck:
    """Check that a TransformerLens model is what it claims to be; see the module's docstring.

    Args:
        model: A TransformerLens model.
        reference: What the Hugging Face model computes (`record_reference`). `load_model` gives it; without
            it the result of that comparison is shown.
        layers: Layers whose sites are checked; all by default.

    Returns:
        A table of what was compared: `.ok`, `.failures`, `.to_frame()`, and `.raise_if_failed()`.

    Raises:
        UnsupportedModelError: Not a TransformerLens model, or one in training mode with dropout.

    Example:
        >>> import memlens as ml
        >>> found = ml.check_model(ml.load_model("zoo/pythia-s"))
        >>> found.ok, [check.name for check in found.checks][:3]
        (True, ['logits', 'trunk', 'site resid_pre'])
    """
    require_model(model)
    device = next(model.parameters()).device
    tokens = probe_tokens(model.cfg.d_vocab, model.cfg.n_ctx) if reference is None else reference.tokens
    tokens = tokens.to(device)
    n_layers = len(model.blocks)
    names = [hook_name("resid_pre", layer) for layer in range(n_layers)]
    names.append(hook_name("resid_post", n_layers - 1))
    points = model.hook_dict  # which a bridge makes anew each time
    names = [name for name in names if name in points]
    with capturing(model, names) as resid, noting_block_outputs(model, known_of(model)):
        logits = model(tokens)
    checks = [_against_huggingface(model, reference, resid, logits)]
    trunk = None
    try:
        trunk = Trunk(model)
        if reference is not None and checks[0].status == "ok" and logits.dtype.itemsize < 4:
            checks[0] = _by_layer(trunk, reference, checks[0])
        runs = _layer_runs(trunk, resid, chosen_layers(layers, n_layers))
        own, final = _trunk(trunk, tokens, resid, logits, runs)
        checks.append(own)
    except UnsupportedModelError as error:
        checks.append(Check("trunk", "slow", note=f"{error} Full forward passes are used."))
        trunk = None
    else:
        if own.status == "ok":
            found = _sites(trunk, runs)
            refuse_sites(model, [c.name.removeprefix("site ") for c in found if c.status == "refused"])
            checks += found
            checks += [_fast_path(trunk, resid, final)] if layers is None else []
    if reference is None:
        checks += _beginning(model, device)
    else:
        loaded = replace(checks[0], note=f"{checks[0].note}, when it was loaded")
        _AT_LOAD[model] = loaded, content_key(model)
    return ModelCheck(
        str(getattr(model.cfg, "model_name", "") or type(model).__name__),
        str(trunk.dtype if trunk else next(model.parameters()).dtype).removeprefix("torch."),
        tuple(checks),
    )


def _beginning(model: Any, device: torch.device) -> list[Check]:
    """Show how likely a sentence is with and without the BOS token, if the tokenizer has one."""
    tokenizer = getattr(model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return []
    ids = encode(tokenizer, [_SENTENCE])[0][: model.cfg.n_ctx - 1]
    if len(ids) < 2 or max(bos, *ids) >= model.cfg.d_vocab:
        return []
    rows = torch.tensor([[bos, *ids], [*ids, bos]], device=device)
    found = model(rows).float().log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
    begun, bare = float(found[0, 1:].mean()), float(found[1, :-1].mean())
    how = "with" if expects_bos(model, tokenizer) else "without"
    note = (
        f"mean log-probability of a sentence {begun:.2f} with the beginning-of-text token, {bare:.2f} "
        f"without; load_sequences reads text {how} it"
    )
    return [Check("BOS", "ok", note=note)]


def _size(x: Tensor) -> float:
    """Return the root mean square."""
    return float(_wide(x).square().mean().sqrt())


def _wide(x: Tensor) -> Tensor:
    """Return numbers in which sums of squares are far more exact than any bound here."""
    return x if x.dtype == torch.float64 else x.float()


def _compared(
    name: str, a: Tensor, b: Tensor, bounds: dict[torch.dtype, float], note: str = "", depth: int = 1
) -> Check:
    allowed = bounds.get(a.dtype, bounds[torch.float32])
    if a.dtype.itemsize < 4:
        allowed *= max(1.0, depth / 4) ** 0.5
    if a.shape != b.shape:
        return Check(name, "failed", allowed=allowed, note=f"shape {tuple(a.shape)}, not {tuple(b.shape)}")
    a, b = _wide(a), _wide(b).to(a.device)
    difference = _size(a - b) / max(_size(b - b.mean(-1, keepdim=True)), 1e-12)
    difference = difference if difference == difference else float("inf")
    status: Status = "ok" if difference <= allowed else "failed"
    return Check(name, status, difference, allowed, note=note)


def _against_huggingface(
    model: Any, reference: Reference | None, resid: dict[str, Tensor], logits: Tensor
) -> Check:
    if reference is None:
        found, key = _AT_LOAD.get(model, (None, None))
        if found is None:
            return Check("logits", "not compared", note="not loaded by memlens, or unchecked")
        if key != content_key(model):
            return Check("logits", "not compared", note="the model has been changed since it was loaded")
        return found
    expected = reference.logits.to(logits.device)
    depth = len(model.blocks)
    if _processed(model):  # centering the unembedding shifts all logits of a position by one constant
        logits, expected = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
        return _compared(
            "logits", logits, expected, _TOLERANCE, "log-probabilities against Hugging Face's", depth
        )
    found = _compared("logits", logits, expected, _TOLERANCE, "against Hugging Face's", depth)
    if found.status == "ok":
        return found
    for layer, own in enumerate(reference.resid):
        name = hook_name("resid_pre", layer)
        if name in resid and _compared("", resid[name], own, _TOLERANCE, depth=layer).status == "failed":
            first = max(0, layer - 1)
            note = "differs from Hugging Face's model" + (" in its embedding" if layer == 0 else "")
            return replace(found, layer=first, note=note)
    note = "differs from Hugging Face's model after the last layer's input"
    return replace(found, layer=depth - 1, note=note)


def _by_layer(trunk: Trunk, reference: Reference, found: Check) -> Check:
    """Compare what each layer adds to the residual, from Hugging Face's own residual: nothing adds up."""
    if _processed(trunk.model):
        return found
    allowed = _SAME[reference.logits.dtype]
    rounding = torch.finfo(reference.logits.dtype).eps
    for layer, (start, end) in enumerate(pairwise(reference.resid)):
        out = trunk.run(start.to(trunk.device), layer, layer + 1).to(end.device)
        added = _size(_wide(end) - start) + rounding * _size(end) / allowed
        off = _size(_wide(out) - end) / max(added, 1e-12)
        if not off <= allowed:
            note = "what the layer adds to the residual differs from Hugging Face's model"
            return Check("logits", "failed", off, allowed, layer, note)
    return found


def _processed(model: Any) -> bool:
    return bool(describe(model)["processed_weights"])


def kinds_of_layers(model: Any) -> list[int]:
    """Return the first and last layer, and the first layer of each further kind.

    Layers are of one kind if their modules have the same classes, shapes and plain attributes, apart from the
    layer's number.
    """
    facts = [_layer_facts(block) for block in model.blocks]
    numbers = [key for key in facts[0] if all(own.get(key) == layer for layer, own in enumerate(facts))]
    first: dict[Any, int] = {}
    for layer, own in enumerate(facts):
        first.setdefault(tuple(sorted((repr(k), repr(v)) for k, v in own.items() if k not in numbers)), layer)
    return sorted({0, len(facts) - 1, *first.values()})


def _layer_facts(block: Any) -> dict[tuple[int, str], Any]:
    """Return the class, the shapes and the plain attributes of each of a layer's modules."""
    facts: dict[tuple[int, str], Any] = {}
    for i, module in enumerate(block.modules()):
        facts[i, "class"] = type(module)
        facts[i, "shapes"] = [tuple(p.shape) for p in module.parameters(recurse=False)]
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)):
                facts[i, name] = _NUMBERS.sub("", value) if isinstance(value, str) else value
    return facts


_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True)
class _LayerRun:
    """One layer, run from the model's own residual for all sites at once.

    Attributes:
        layer: Its number.
        out: Its output without a change.
        names: The hook of each site that the model has.
        rows: The rows of the batch in which a site was zeroed; the first rows are without a change.
        store: The activations at each hook, all rows.
    """

    layer: int
    out: Float[Tensor, "seq pos d_model"]
    names: dict[str, str]
    rows: dict[str, slice]
    store: dict[str, Tensor]


def _layer_runs(trunk: Trunk, resid: dict[str, Tensor], layers: Sequence[int]) -> list[_LayerRun]:
    """Run each layer once: rows of the batch are copies of its residual, one with a zero at each site."""
    points, found = trunk.model.hook_dict, []
    for layer in layers:
        names = {site: hook_name(site, layer) for site in SITES}
        names = {site: name for site, name in names.items() if name in points}
        start = resid[hook_name("resid_pre", layer)]
        n = len(start)
        rows = {site: slice((i + 1) * n, (i + 2) * n) for i, site in enumerate(names)}
        store: dict[str, Tensor] = {}
        n_rows = (len(rows) + 1) * n
        hooks = [(points[name], _zeroed(rows[site], n_rows, name, store)) for site, name in names.items()]
        with attached(trunk.model, hooks):
            out = trunk.run(start.repeat(len(rows) + 1, 1, 1), layer, layer + 1)
        found.append(_LayerRun(layer, out[:n], names, rows, store))
    return found


def _trunk(
    trunk: Trunk, tokens: Tensor, resid: dict[str, Tensor], logits: Tensor, runs: Sequence[_LayerRun]
) -> tuple[Check, Tensor]:
    """Compare embedding, layers and unembedding with the model's own pass; also return the last residual."""
    note = "embed, layers and unembed together are not the model's own forward pass"
    worst = _compared("trunk", trunk.embed(tokens), resid[hook_name("resid_pre", 0)], _SAME)
    if worst.status != "ok":
        return replace(worst, layer=0, note=f"{note}: the embedding differs"), logits
    last, final = trunk.n_layers - 1, None
    for run in runs:
        after = hook_name("resid_post", last) if run.layer == last else hook_name("resid_pre", run.layer + 1)
        final = run.out if run.layer == last else final
        if after not in resid:
            continue
        found = _compared("trunk", run.out, resid[after], _SAME)
        if found.status != "ok":
            return replace(found, layer=run.layer, note=note), logits
        worst = max(worst, found, key=lambda check: check.difference)
    if final is None:
        final = trunk.run(resid[hook_name("resid_pre", last)], last)
    few = slice(-_UNEMBEDDED, None)  # each position is unembedded alone, and the vocabulary is large
    found = _compared("trunk", trunk.unembed(final[:, few]), logits[:, few], _SAME)
    if found.status != "ok":
        note += ": what follows the last layer (norm, unembedding, scaling of the logits) differs"
        return replace(found, note=note), final
    return max(worst, found, key=lambda check: check.difference), final


def _fast_path(trunk: Trunk, resid: dict[str, Tensor], final: Tensor) -> Check:
    inputs = {n: resid[hook_name("resid_pre", n)] for n in range(trunk.n_layers)}
    blocks = FunctionalBlocks.of(trunk, {n: r[:1] for n, r in inputs.items()} | {trunk.n_layers: final[:1]})
    if blocks is None:
        note = "a layer has an unknown form: sweeps run the model's own modules, which is slower"
        return Check("fast path", "slow", note=note)
    return Check("fast path", "ok", note="layers run as plain functions")


_AT_LOAD: WeakKeyDictionary[Any, tuple[Check, tuple[Any, ...]]] = WeakKeyDictionary()
"""The comparison with Hugging Face's model, which is gone later, and the content when it was loaded."""

Claim = Callable[[dict[str, Tensor]], "tuple[Tensor, Tensor]"]
"""From the activations of a run with a zeroed site to two tensors that must be equal."""


def _claims(trunk: Trunk, layer: int, plain: dict[str, Tensor]) -> Iterator[tuple[str, Claim]]:
    """Yield what a zero at each site of a layer must do."""

    def at(site: str) -> str:
        return hook_name(site, layer)

    def constant(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x[:1, :1].expand_as(x)

    def without_attention(run: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if trunk.parallel:
            return run[at("resid_post")] - plain[at("mlp_out")], plain[at("resid_pre")]
        return run[at("resid_mid")], plain[at("resid_pre")]

    def without_mlp(run: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        before = plain[at("resid_pre")] + plain[at("attn_out")] if trunk.parallel else plain[at("resid_mid")]
        return run[at("resid_post")], before

    def by_place(run: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Attention no longer depends on the tokens: it is uniform apart from a bias by distance."""
        pattern = run[at("pattern")]
        return pattern, pattern[:1].expand_as(pattern)

    yield "resid_pre", lambda run: constant(run[at("attn_out")] + run[at("mlp_out")])
    yield "resid_mid", lambda run: constant(run[at("mlp_out")])
    yield "attn_out", without_attention
    yield "mlp_out", without_mlp
    yield "q", by_place
    yield "k", by_place
    yield "v", lambda run: (run[at("z")], torch.zeros_like(run[at("z")]))
    yield "pattern", lambda run: (run[at("z")], torch.zeros_like(run[at("z")]))
    yield "z", lambda run: constant(run[at("attn_out")])
    yield "mlp_post", lambda run: constant(run[at("mlp_out")])


def _sites(trunk: Trunk, runs: Sequence[_LayerRun]) -> list[Check]:
    """Check every site in every layer that was run; one entry per site, with the first layer that fails."""
    worst: dict[str, Check] = {}
    for one in runs:
        n, n_rows = len(one.out), (len(one.rows) + 1) * len(one.out)
        plain = {name: value[:n] for name, value in one.store.items()}
        for site, claim in _claims(trunk, one.layer, plain):
            if site in one.names and len(one.store[one.names[site]]) != n_rows:
                found = Check(f"site {site}", "absent", note="does not have one row per sequence")
            elif site in one.names:
                run = {name: value[one.rows[site]] for name, value in one.store.items()}
                found = _site(site, one.layer, plain, run, claim)
            else:
                found = Check(f"site {site}", "absent", note="the model does not have this hook")
            if site not in worst or _BADNESS[found.status] > _BADNESS[worst[site].status]:
                worst[site] = found
    return list(worst.values())


_BADNESS = {"absent": 0, "ok": 1, "ignored": 2, "refused": 3, "failed": 4}


def _zeroed(rows: slice, n_rows: int, name: str, store: dict[str, Tensor]) -> HookFn:
    """Return a hook that writes zeros into some rows and keeps the activation."""

    def fn(activation: Tensor, hook: Any) -> Tensor:
        new = activation.clone()
        if len(new) == n_rows:  # in a mixture of experts the first axis is not the batch
            new[rows] = 0
        store[name] = new
        return new

    return fn


def _site(site: str, layer: int, plain: dict[str, Tensor], run: dict[str, Tensor], claim: Claim) -> Check:
    out = hook_name("resid_post", layer)
    if torch.equal(run[out], plain[out]) and bool(plain[hook_name(site, layer)].any()):
        return Check(f"site {site}", "ignored", layer=layer, note="what is written here has no effect")
    try:
        got, wanted = claim(run)
    except KeyError as error:
        return Check(f"site {site}", "absent", note=f"cannot be checked without {error}")
    allowed = _SAME.get(got.dtype, _SAME[torch.float32])
    size = _size(wanted)
    if site not in ("q", "k"):  # attention weights have a scale of their own
        size = max(size, 0.1 * _size(plain[out]))
    difference = _size(_wide(got) - _wide(wanted)) / max(size, 1e-6)
    if difference <= allowed:
        return Check(f"site {site}", "ok", difference, allowed)
    note = "a zero written here does not do what the name claims"
    if site in _DISPENSABLE:
        return Check(f"site {site}", "refused", difference, allowed, layer, f"{note}: hooks here are errors")
    return Check(f"site {site}", "failed", difference, allowed, layer, note)
