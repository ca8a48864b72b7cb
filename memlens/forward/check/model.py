"""`check_model`: does the loaded model compute what it should, and do its hooks do what their names say?

Four things are compared on a few tokens, in the model's own precision:

- *Hugging Face*: the logits, and the residual at the input of every layer, against those of the Hugging Face
  model that the weights came from. They are recorded before TransformerLens touches that model
  (`record_reference`), because a bridge changes it in place. Of a large model this takes few tokens, and more
  in the first layers (`memlens.forward.check.reference`).
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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memlens.errors import UnsupportedModelError
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.check.comparison import (
    AT_LOAD,
    SAME,
    TOLERANCE,
    against_huggingface,
    by_first_layers,
    by_layer,
    compared,
    is_narrow,
    is_processed,
    own_pass,
)
from memlens.forward.check.reference import FirstLayers, Reference, probe_tokens
from memlens.forward.check.sites import LayerRun, check_sites, layer_runs
from memlens.forward.check.table import Check, ModelCheck
from memlens.forward.exclusive import computes, known_of
from memlens.forward.hooks import chosen_layers, hook_name, refuse_sites
from memlens.forward.trunk import Trunk, noting_block_outputs, require_model
from memlens.models.bos import expects_bos
from memlens.models.state import content_key
from memlens.sequences.tokenizing import encode

_UNEMBEDDED = 3
_SENTENCE = "The quick brown fox jumps over the lazy dog."


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
    shown = None if reference is None or is_processed(model) else reference  # whose residual is comparable
    given = shown.resid if shown is not None and is_narrow(shown.logits) else []
    first = None if shown is None else shown.first
    with noting_block_outputs(model, known_of(model)):
        resid, logits, made = own_pass(model, tokens, given)
    checks = [against_huggingface(model, reference, resid, logits)]
    trunk = None
    try:
        trunk = Trunk(model)
        runs = layer_runs(trunk, resid, chosen_layers(layers, len(model.blocks)))
        own, final = _trunk(trunk, tokens, resid, logits, runs)
        if own.status == "ok" and first is not None:
            own = _first_layers(trunk, first, own)
        checks.append(own)
    except UnsupportedModelError as error:
        checks.append(Check("trunk", "slow", note=f"{error} Full forward passes are used."))
        trunk = None
    else:
        if own.status == "ok":
            found = check_sites(trunk, runs)
            refuse_sites(model, [c.name.removeprefix("site ") for c in found if c.status == "refused"])
            checks += found
            checks += [_fast_path(trunk, resid, final)] if layers is None else []
    if checks[0].status == "ok":
        checks[0] = by_layer(trunk, given, made, checks[0])
    if checks[0].status == "ok" and first is not None:
        checks[0] = by_first_layers(model, trunk, first, checks[0])
    if reference is None:
        checks += _beginning(model, device)
    else:
        loaded = replace(checks[0], note=f"{checks[0].note}, when it was loaded")
        AT_LOAD[model] = loaded, content_key(model)
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


def _first_layers(trunk: Trunk, first: FirstLayers, found: Check) -> Check:
    """Compare the embedding and the first layers together on more tokens; `found` if they are the same."""
    n = len(first.resid) - 1
    out = trunk.run(trunk.embed(first.tokens), 0, n)
    together = compared("trunk", out, first.resid[-1], TOLERANCE, depth=n)
    note = "embed and the first layers together are not Hugging Face's model"
    return found if together.status == "ok" else replace(together, layer=n - 1, note=note)


def _trunk(
    trunk: Trunk, tokens: Tensor, resid: dict[str, Tensor], logits: Tensor, runs: Sequence[LayerRun]
) -> tuple[Check, Tensor]:
    """Compare embedding, layers and unembedding with the model's own pass; also return the last residual."""
    note = "embed, layers and unembed together are not the model's own forward pass"
    worst = compared("trunk", trunk.embed(tokens), resid[hook_name("resid_pre", 0)], SAME)
    if worst.status != "ok":
        return replace(worst, layer=0, note=f"{note}: the embedding differs"), logits
    last, final = trunk.n_layers - 1, None
    for run in runs:
        after = hook_name("resid_post", last) if run.layer == last else hook_name("resid_pre", run.layer + 1)
        out = run.out[: len(tokens)]
        final = out if run.layer == last else final
        if after not in resid:
            continue
        found = compared("trunk", out, resid[after], SAME)
        if found.status != "ok":
            return replace(found, layer=run.layer, note=note), logits
        worst = max(worst, found, key=lambda check: check.difference)
    if final is None:
        final = trunk.run(resid[hook_name("resid_pre", last)], last)
    few = slice(-_UNEMBEDDED, None)  # each position is unembedded alone, and the vocabulary is large
    found = compared("trunk", trunk.unembed(final[:, few]), logits[:, few], SAME)
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
