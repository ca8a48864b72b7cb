"""Path patching: through which later head, or straight into the logits, a head's output acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from numbers import Integral
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.errors import OptionError, SiteError, check_option
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource
from memlens.forward.exclusive import computes
from memlens.forward.hooks import HookFn, at_place, attached, capturing, check_head, check_layer, hook_name
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.heads import Head, head_label
from memlens.instruments.donors import check_donor
from memlens.instruments.patch.pairs import Pairs
from memlens.instruments.patch.patching import write_cell
from memlens.instruments.screen.instruments import register_instrument
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_paths
from memlens.results.readings import read_restored
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import ByBatch, Intervention
from memlens.sweeps.run import SweepOptions

RECEIVER_INPUTS = ("logits", "q", "k", "v", "mlp")
MLPS = ("recomputed", "frozen")


class FrozenRuns:
    """Activations of frozen runs, computed when a batch needs them; only the last is kept."""

    trunk: Trunk
    mlps: str
    base: ActivationSource
    source: ActivationSource

    def __init__(
        self,
        model: Any,
        base: SequenceSet,
        source: SequenceSet,
        layers: Sequence[int],
        mlps: str,
        donor: Any = None,
    ) -> None:
        self.trunk, self.mlps = Trunk(model), mlps
        every = range(min(layers), self.trunk.n_layers)
        kept = [hook_name(site, layer) for site in ("resid_pre", "attn_out") for layer in every]
        self.base = ActivationSource(model, base, [*kept, hook_name("resid_post", every[-1])])
        of_source = model if donor is None else donor
        self.source = ActivationSource(of_source, source, [hook_name("z", layer) for layer in layers])
        self._key: tuple[Any, ...] | None = None
        self._kept: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What identifies it, without the activation it currently holds."""
        return {**self.__dict__, "_key": None, "_kept": None}

    def at(self, batch: Batch, sender: Head, site: str, layer: int) -> Float[Tensor, "batch pos ..."]:
        """Return the activation at a site in the frozen run."""
        key = (self.trunk.dtype, tuple(batch.rows.tolist()), sender, site, layer)
        if key != self._key or self._kept is None:
            self._key, self._kept = key, self._run(batch, sender, site, layer)
        return self._kept

    @torch.no_grad()
    def _run(self, batch: Batch, sender: Head, site: str, layer: int) -> Tensor:
        base, frozen = self.base.of(batch), self.mlps == "frozen"
        if frozen and site == "resid_post":
            return base[hook_name(site, layer)] + self._change(batch, sender)
        if frozen and layer > sender[0]:
            start, resid = layer, base[hook_name("resid_pre", layer)] + self._change(batch, sender)
            hooks: list[tuple[str, HookFn]] = []
        else:
            start, resid = sender[0], base[hook_name("resid_pre", sender[0])].clone()
            hooks = [self._sending(batch, sender)]
        for name in (hook_name("attn_out", n) for n in range(max(start, sender[0] + 1), layer + 1)):
            hooks.append((name, lambda x, hook, held=base[name]: held.to(x.device)))
        wanted = hook_name(site, layer)
        with attached(self.trunk.model, hooks), capturing(self.trunk.model, [wanted]) as store:
            self.trunk.run(resid, start, layer + 1)
        return store[wanted].to(resid.device)

    def _change(self, batch: Batch, sender: Head) -> Tensor:
        """How much the sender changes what its layer's attention adds to the residual."""
        layer, base = sender[0], self.base.of(batch)
        name = hook_name("attn_out", layer)
        with (
            attached(self.trunk.model, [self._sending(batch, sender)]),
            capturing(self.trunk.model, [name]) as store,
        ):
            self.trunk.run(base[hook_name("resid_pre", layer)].clone(), layer, layer + 1)
        return store[name].to(base[name].device) - base[name]

    def _sending(self, batch: Batch, sender: Head) -> tuple[str, HookFn]:
        layer, head = sender
        write = write_cell(self.source, "z", {"layer": layer, "head": head})
        return hook_name("z", layer), at_place(write.bind(batch), batch.tokens.device)


@computes
def patch_paths(
    model: Any,
    clean: SequenceSet,
    corrupt: SequenceSet | None = None,
    *,
    donor: Any = None,
    senders: Sequence[Head] | None = None,
    receivers: Sequence[Head] | Sequence[int] | None = None,
    receiver_input: str = "logits",
    mlps: str = "recomputed",
    direction: str | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Unpack[SweepOptions],
) -> Result:
    r"""Move one head's output between two runs, and let it act along one path only.

    For each sender :math:`s` (a head) and receiver :math:`r`, with *base* the run that is patched (`corrupt`
    when denoising) and *source* the other:

    1. the base run with :math:`z_s` taken from the source and every other attention head held at its base
       output; it gives the receiver's new input;
    2. the base run with that input to the receiver, and everything after the receiver recomputed; this
       run is measured.

    A receiver is a later head's queries, keys or values (`hook_q`, `hook_k`, `hook_v` of that head alone, at
    all positions), the output of a later MLP, or the logits: then run 1 itself is measured, and the effect is
    the head's direct effect on them. With ``mlps="recomputed"`` MLPs between sender and receiver respond to
    the change, as in Wang et al. (arXiv 2211.00593, section 3.1), whose algorithm this is; with "frozen" they
    are held as well, and only what the sender itself writes to the residual arrives. (Goldowsky-Dill et al.,
    arXiv 2304.05969, treat paths in general.)

    Where a layer normalizes its attention's output (OLMo 2 and 3), what the sender adds goes through that
    norm together with the other heads' held outputs. The normalized effect is that of `patch_activations`.

    Args:
        model: A TransformerLens model.
        clean: The sequences as recalled.
        corrupt: The same targets after another prefix, row by row; may be left out with a donor.
        donor: Another model of the same shape, whose run is the source, as for `patch_activations`.
        senders: Pairs (layer, head); by default all that reach a receiver.
        receivers: Pairs (layer, head) for "q", "k" and "v" (key-value heads for the last two), layers for
            "mlp", None for "logits"; by default all that a sender reaches.
        receiver_input: "logits", "q", "k", "v" or "mlp".
        mlps: "recomputed" or "frozen".
        direction: "denoising" takes the sender from the clean run, "noising" from the corrupt one; the
            defaults are those of `patch_activations`.
        metrics: As for `sweep`; measured on the clean targets.
        options: Further options of `sweep`.

    Returns:
        Kind "path_patching": each metric, its values in the two runs, and `normalized_effect`, with the
        dimensions `(sequence, sender_layer, sender_head, receiver_layer, receiver_head)`, without the last
        for "mlp", and `(sequence, layer, head)` for "logits". Pairs without a path are NaN.

    Raises:
        OptionError: An unknown option, or receivers given for "logits".
        SiteError: A layer or head that does not exist, or a sender or receiver that takes part in no path: a
            head reaches only later layers, and its own layer's MLP where blocks are sequential.
        SequenceError: The two sets do not fit, or there is neither a corrupt set nor a donor.
        DonorError: The donor does not fit the model.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> clean = ml.load_sequences("zoo", model)[:2]
        >>> result = ml.patch_paths(
        ...     model, clean, ml.corrupt(clean), senders=[(0, 1), (0, 4)], receivers=[(3, 2)],
        ...     receiver_input="k", progress=False,
        ... )
        >>> result["normalized_effect"].dims
        ('sequence', 'sender_layer', 'sender_head', 'receiver_layer', 'receiver_head')
    """  # fmt: skip
    pairs = Pairs.of(clean, corrupt, direction, donor)
    settings = {"receiver_input": receiver_input, "mlps": mlps}
    patches = path_patches(
        model, pairs.base, pairs.source, senders=senders, receivers=receivers, donor=donor,
        receiver_input=receiver_input, mlps=mlps,
    )  # fmt: skip
    return pairs.sweep(model, patches, metrics, options, kind="path_patching", settings=settings)


@computes
def path_patches(
    model: Any,
    base: SequenceSet,
    source: SequenceSet,
    *,
    senders: Sequence[Head] | None = None,
    receivers: Sequence[Head] | Sequence[int] | None = None,
    receiver_input: str = "logits",
    mlps: str = "recomputed",
    donor: Any = None,
) -> list[Intervention]:
    """Return the interventions that `patch_paths` runs on `base`, one per path; see there.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> edits = ml.edits.path_patches(model, seqs, ml.corrupt(seqs), senders=[(0, 1), (1, 2)])
        >>> len(edits)
        2
    """
    check_option("receiver_input", receiver_input, RECEIVER_INPUTS)
    check_option("mlps", mlps, MLPS)
    check_sequences(base, model, on_eos="keep")
    check_sequences(source, model, on_eos="keep")
    if donor is not None:
        check_donor(model, donor, source, sites=["z"])
    trunk = Trunk(model)
    paths = _paths(trunk, senders, receivers, receiver_input)
    runs = FrozenRuns(model, base, source, sorted({layer for (layer, _), _ in paths}), mlps, donor)
    return [_intervention(runs, sender, receiver, receiver_input) for sender, receiver in paths]


def _intervention(runs: FrozenRuns, sender: Head, receiver: Head, receiver_input: str) -> Intervention:
    layer, head = receiver
    part: int | slice = head if receiver_input in ("q", "k", "v") else slice(None)
    site = {"logits": "resid_post", "mlp": "mlp_out"}.get(receiver_input, receiver_input)
    if receiver_input == "logits":
        end, coords = "logits", {"layer": sender[0], "head": sender[1]}
    else:
        end = f"L{layer} mlp" if receiver_input == "mlp" else f"{head_label(receiver)} {receiver_input}"
        coords = {"sender_layer": sender[0], "sender_head": sender[1], "receiver_layer": layer}
        coords |= {} if receiver_input == "mlp" else {"receiver_head": head}

    def make(batch: Batch) -> Callable[..., Tensor]:
        new = runs.at(batch, sender, site, layer)[:, :, part].clone()

        def fn(x: Tensor, hook: Any) -> Tensor:
            out = x.clone()
            out[:, :, part] = new.to(x.dtype)
            return out

        return fn

    return Intervention(f"{head_label(sender)} to {end}", [(hook_name(site, layer), ByBatch(make))], coords)


def _paths(
    trunk: Trunk,
    senders: Sequence[Head] | None,
    receivers: Sequence[Any] | None,
    receiver_input: str,
) -> list[tuple[Head, Head]]:
    """All pairs of a sender and a receiver that it reaches, checked; sender by sender."""
    starts = _heads(senders, "senders", trunk.n_layers, trunk.n_heads)
    if receiver_input == "logits":
        if receivers is not None:
            raise OptionError(f"receivers={receivers!r}: the logits are the only receiver, leave it out.")
        ends, gap = [(trunk.n_layers - 1, 0)], 0
    else:
        if receiver_input == "mlp" and receivers is not None:
            receivers = [(layer, 0) for layer in receivers]
        n_heads = {"mlp": 1, "q": trunk.n_heads}.get(receiver_input, trunk.n_kv_heads)
        ends = _heads(receivers, "receivers", trunk.n_layers, n_heads)
        gap = 0 if receiver_input == "mlp" and not trunk.parallel else 1
    pairs = [(s, r) for s in starts for r in ends if r[0] >= s[0] + gap]
    given = [("receiver", r, 1) for r in ends if receivers is not None]
    given += [("sender", s, 0) for s in starts if senders is not None or not pairs]
    for name, head, part in given:
        if all(pair[part] != head for pair in pairs):
            label = head[0] if part and receiver_input == "mlp" else head
            raise SiteError(
                f"{name} {label} takes part in no path: a head reaches only the layers after its own "
                "(and its own layer's MLP where blocks are sequential)."
            )
    return pairs


def _heads(given: Sequence[Any] | None, name: str, n_layers: int, n_heads: int) -> list[Head]:
    """Check pairs of a layer and a head; all by default."""
    for item in given or ():
        if not (
            isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(x, Integral) for x in item)
        ):
            raise SiteError(f"{name} holds {item!r}: give pairs (layer, head), or layers for 'mlp'.")
        check_layer(item[0], n_layers)
        check_head(item[1], n_heads)
    every = product(range(n_layers), range(n_heads)) if given is None else given
    return list(dict.fromkeys((int(layer), int(head)) for layer, head in every))


register_kind(
    "path_patching",
    plot=plot_paths,
    reading=read_restored,
    cites=(("wang2023", "path patching"), ("goldowskydill2023", "general path patching")),
)
register_instrument("path_patching", ranks="head", kind="path_patching", run=patch_paths, pairs=True)
