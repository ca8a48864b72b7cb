"""Exposure of canaries: how early a secret stands among all that its format allows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from memlens import figures
from memlens.errors import OptionError, SequenceError
from memlens.forward.baseline import teacher_forced_stats
from memlens.forward.exclusive import computes
from memlens.forward.trunk import Trunk
from memlens.options import options_class
from memlens.recall.columns import nll
from memlens.results.kinds import register_kind
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result
from memlens.results.statistics.estimates import mean_estimate
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import encode
from memlens.sweeps.labels import make_result

Method = Literal["auto", "exact", "sampled", "fitted"]
BY_CHANCE = 1 / math.log(2)
"""The mean exposure, in bits, of a canary whose rank is uniform among many candidates."""
_ROWS = 512


@options_class
class ExposureOptions:
    """Options of `exposure`; the result records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.detect.ExposureOptions(most_nodes=100).most_nodes
        100
    """

    method: Method = "auto"
    """Exact by enumeration, by sampled candidates, or by a distribution fitted to them; auto is exact where
    that takes at most `most_nodes`, and fitted elsewhere."""
    most_nodes: PositiveInt = 2000
    """Most beginnings of candidates that enumeration may run for one canary with auto."""
    n_samples: Annotated[int, Field(ge=8)] = 1000
    """Random candidates of each canary for "sampled" and "fitted"."""
    seed: int = 0
    """Seed of the random candidates."""


def digit_slots(model: Any, n_digits: int) -> list[list[int]]:
    """Return the format "`n_digits` digits" for a tokenizer with one token for each digit.

    Raises:
        SequenceError: A digit is not one token.

    >>> import memlens as ml
    >>> slots = digit_slots(ml.load_model("zoo/pythia-xs"), 6)
    >>> len(slots), len(slots[0])
    (6, 10)
    """
    ids = encode(model.tokenizer, list("0123456789"))
    if any(len(each) != 1 for each in ids):
        raise SequenceError("a digit is not one token of this tokenizer: give the slots yourself.")
    return [[each[0] for each in ids]] * n_digits


def other_digits(model: Any, continuations: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Return the format of each continuation if its digits were others: the slots for `exposure`.

    A token without a digit has one candidate, itself. A token with digits has those tokens of the vocabulary
    that differ from it in digits only, and in none of their other signs.

    Args:
        model: A TransformerLens model with a tokenizer.
        continuations: Token ids.

    >>> import memlens as ml
    >>> model = ml.load_model("zoo/pythia-xs")
    >>> ids = model.tokenizer("a-12", add_special_tokens=False)["input_ids"]
    >>> [len(slot) for slot in other_digits(model, [ids])[0]]
    [1, 1, 10, 10]
    """
    return _same_form(model, continuations, _DIGITS)


def other_characters(model: Any, continuations: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Return the format of each continuation if its letters and digits were others: the slots for `exposure`.

    A token has those tokens of the vocabulary that are as long and have a small letter where it has one, a
    capital where it has one, a digit where it has one, and elsewhere the same sign (punctuation, spaces,
    letters outside ASCII). So the space is all texts of the same form that are cut into tokens at the same
    places, not all texts of the form: pieces of words are compared with pieces of words. The choice is ours.

    Args:
        model: A TransformerLens model with a tokenizer.
        continuations: Token ids.

    >>> import memlens as ml
    >>> model = ml.load_model("zoo/pythia-xs")
    >>> ids = model.tokenizer(" the-12", add_special_tokens=False)["input_ids"]
    >>> slots = other_characters(model, [ids])[0]
    >>> [len(slot) for slot in slots[1:]], all(len(model.tokenizer.decode([t])) == 4 for t in slots[0])
    ([1, 10, 10], True)
    """
    return _same_form(model, continuations, _CLASSES)


_DIGITS = {"0": "[0-9]"}
_CLASSES = {**_DIGITS, "A": "[A-Z]", "a": "[a-z]"}


def _same_form(
    model: Any, continuations: Sequence[Sequence[int]], classes: Mapping[str, str]
) -> list[list[list[int]]]:
    """Return for each token those that become the same if a sign of each class is replaced by its name.

    A token without such a sign has itself only.
    """
    size = min(int(model.cfg.d_vocab), len(model.tokenizer))
    forms: dict[str, list[int]] = {}
    form_of: dict[int, tuple[str, int]] = {}
    for token, written in enumerate(model.tokenizer.convert_ids_to_tokens(list(range(size)))):
        form, replaced = str(written), 0
        for name, members in classes.items():
            form, n = re.subn(members, name, form)
            replaced += n
        form_of[token] = form, replaced
        forms.setdefault(form, []).append(token)
    return [
        [forms[form] if replaced else [token] for token in row for form, replaced in [form_of[token]]]
        for row in continuations
    ]


@computes
@torch.no_grad()
def exposure(
    model: Any,
    sequences: SequenceSet,
    slots: Sequence[Sequence[int]],
    *,
    options: ExposureOptions | None = None,
    progress: bool = True,
) -> Result:
    r"""Return the exposure of each canary: the bits by which guessing in the model's order beats chance.

    .. math:: \text{exposure} = \log_2 |R| - \log_2 \text{rank}

    where :math:`R` are all continuations that the format allows, one token of each slot, and the rank is that
    of the true continuation among them by log-probability after the canary's prefix, 1 for the likeliest. It
    is 0 for the least likely candidate, :math:`\log_2 |R|` for the likeliest, and 1.44 bits on average for
    one that was never seen.

    - "exact" counts the likelier candidates. A beginning that is less likely than the whole canary is not
      continued, so a memorized canary takes few forward passes.
    - "sampled": :math:`-\log_2 \frac{1 + m}{1 + n}` with :math:`m` of :math:`n` random candidates likelier:
      at most :math:`\log_2 (n + 1)`.
    - "fitted": :math:`-\log_2 P(X \ge x)` with a skew-normal distribution fitted to the log-probabilities of
      the random candidates (maximum likelihood), and at most :math:`\log_2 |R|`.

    Args:
        model: A TransformerLens model; its hooks act.
        sequences: The canaries; their continuations are candidates of the format.
        slots: The token ids that each place of the continuation may take; see `digit_slots`.
        options: See `ExposureOptions`.
        progress: Show a progress bar.

    Returns:
        Kind "exposure", one value per sequence: `exposure` (bits), `rank` (NaN unless exact), `total_logprob`
        (nats, of the canary); the coordinate `method` says how each was measured.

    Raises:
        EmptySetError: No sequences.
        OptionError: There are no slots, or one is empty.
        SequenceError: A continuation is not a candidate of the format.

    Source: the measure is described in the survey arXiv 2410.02650; pruned enumeration and the choice of the
    fitted distribution are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> canaries = ml.load_sequences("zoo:identifiers", model)
        >>> options = ml.detect.ExposureOptions(n_samples=50, method="sampled")
        >>> slots = ml.detect.digit_slots(model, 6)
        >>> found = ml.detect.exposure(model, canaries[-2:], slots, options=options, progress=False)
        >>> bool((found["exposure"] <= 6).all())
        True
    """
    options = options or ExposureOptions()
    check_sequences(sequences, model, on_eos="keep")
    _check_format(sequences, slots)
    bits = math.log2(math.prod(len(set(slot)) for slot in slots))
    total = -nll(teacher_forced_stats(model, sequences, progress=False)).numpy()
    prefixes, truth = sequences.halves()
    rows: list[tuple[float, float, str]] = []
    each = zip(prefixes, truth, total, strict=True)
    for i, (prefix, target, own) in enumerate(
        tqdm(each, total=len(total), disable=not progress, desc="exposure")
    ):
        rank = None
        if options.method in ("auto", "exact"):
            most = options.most_nodes if options.method == "auto" else None
            rank = exact_rank(model, prefix, target, slots, float(own), most)
        if rank is not None:
            rows.append((bits - math.log2(rank), float(rank), "exact"))
            continue
        others = _sampled(model, prefix, slots, options.n_samples, (options.seed, i))
        method = "sampled" if options.method == "sampled" else "fitted"
        value = _by_share(others, own) if method == "sampled" else _by_fit(others, own, bits)
        rows.append((value, math.nan, method))
    values, ranks, methods = zip(*rows, strict=True)
    variables = {
        "exposure": ("sequence", np.array(values), {"units": "bits", "long_name": "exposure"}),
        "rank": (
            "sequence",
            np.array(ranks),
            {"units": "1 = likeliest", "long_name": "rank among candidates"},
        ),
        "total_logprob": ("sequence", total, {"units": "nats", "long_name": "log-probability of the canary"}),
    }
    coords = {"method": ("sequence", np.array(methods))}
    settings = {**asdict(options), "bits": bits}
    return make_result("exposure", model, sequences, variables, coords, settings)


def _check_format(sequences: SequenceSet, slots: Sequence[Sequence[int]]) -> None:
    if not len(slots) or not all(len(slot) for slot in slots):
        raise OptionError(
            "slots: give one list of token ids, which is not empty, for each place of the format."
        )
    for name, target in zip(sequences.ids, sequences.halves()[1], strict=True):
        fits = len(target) == len(slots) and all(t in slot for t, slot in zip(target, slots, strict=True))
        if not fits:
            raise SequenceError(
                f"the continuation of {name!r} ({len(target)} tokens) is not one of the format's candidates "
                f"({len(slots)} slots): give the slots that its tokens come from."
            )


def exact_rank(
    model: Any,
    prefix: Sequence[int],
    target: Sequence[int],
    slots: Sequence[Sequence[int]],
    total: float,
    most_nodes: int | None = None,
) -> int | None:
    """Return the rank of a continuation among all of its format: 1 + the number of likelier ones.

    Args:
        model: A TransformerLens model.
        prefix: What comes before.
        target: The continuation.
        slots: The format.
        total: Its log-probability, in nats.
        most_nodes: Most beginnings to run; None returned if more are needed.
    """
    trunk = Trunk(model)
    begun, logprob = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    n_nodes = 0
    for slot in slots:
        if not len(begun):
            return 1
        n_nodes += len(begun)
        if most_nodes is not None and n_nodes > most_nodes:
            return None
        ids = torch.tensor(sorted(set(slot)))
        longer = logprob[:, None] + _next_logprobs(trunk, prefix, begun, ids)
        row, column = (longer > total).nonzero(as_tuple=True)
        begun = torch.cat([begun[row], ids[column][:, None]], 1)
        logprob = longer[row, column]
    own = (begun == torch.tensor(target)).all(1)  # by rounding it may be likelier than itself
    return 1 + int((~own).sum())


def _next_logprobs(
    trunk: Trunk, prefix: Sequence[int], begun: Int[Tensor, "node place"], ids: Int[Tensor, "choice"]
) -> Float[Tensor, "node choice"]:
    """Return the log-probability of each choice after the prefix and each beginning."""
    parts = []
    for some in begun.split(_ROWS):
        tokens = torch.cat([torch.tensor(prefix).expand(len(some), -1), some], 1).to(trunk.device)
        logits = trunk.unembed(trunk.run(trunk.embed(tokens))[:, -1]).double()
        parts.append(logits.log_softmax(-1)[:, ids.to(trunk.device)].cpu())
    return torch.cat(parts)


def _sampled(
    model: Any, prefix: Sequence[int], slots: Sequence[Sequence[int]], n: int, seed: tuple[int, int]
) -> Float[np.ndarray, "sample"]:
    """Return the log-probabilities of random candidates after a prefix."""
    rng = np.random.default_rng([part % 2**64 for part in seed])
    drawn = np.stack([rng.choice(sorted(set(slot)), n) for slot in slots], 1)
    seqs = SequenceSet.from_tokens([[*prefix, *row] for row in drawn.tolist()], len(prefix))
    return -nll(teacher_forced_stats(model, seqs, progress=False)).numpy()


def _by_share(others: Float[np.ndarray, "sample"], own: float) -> float:
    return -math.log2((1 + int((others > own).sum())) / (1 + len(others)))


def _by_fit(others: Float[np.ndarray, "sample"], own: float, bits: float) -> float:
    if np.ptp(others) == 0:
        return 0.0 if own <= others[0] else bits
    tail = float(stats.skewnorm.sf(own, *stats.skewnorm.fit(others)))
    return min(bits, -math.log2(tail)) if tail > 0 else bits


@takes(group="copies")
def plot_exposure(result: Result, s: Selection) -> go.Figure:
    """Draw the mean exposure against a group, such as copies; without one, its histogram."""
    title, array = s.title or "Exposure of canaries", result["exposure"]
    if s.group is None or s.group not in result.data.coords:
        return figures.recall_panels(array, None, title=title, subtitle=s.subtitle(result))
    ci = result.mean_ci(metric="exposure", group=s.group, **s.intervals)
    return figures.line_over_layers(ci, x=s.group, title=title, subtitle=s.subtitle(result))


def read_exposure(result: Result, metric: str | None) -> str:
    """Say how exposed the canaries are on average, by copies where known, and what chance gives."""
    values, methods = result["exposure"], result["method"].values.tolist()
    said = (
        f"The mean exposure of {len(values)} canaries is {mean_estimate(values).text('bits')}, of at most "
        f"{result.settings['bits']:.3g}; one that was never seen has {BY_CHANCE:.3g} on average."
    )
    counts = {method: methods.count(method) for method in dict.fromkeys(methods)}
    said += " Measured: " + ", ".join(f"{n} {method}" for method, n in counts.items()) + "."
    if "copies" in result.data.coords:
        copies = result["copies"].values
        parts = [
            f"{mean_estimate(values[copies == c]).text('bits')} with {c}" for c in np.unique(copies)[[0, -1]]
        ]
        said += f" By copies: {'; '.join(parts)}."
    return said


register_kind(
    "exposure",
    plot=plot_exposure,
    reading=read_exposure,
    cites=(("satvaty2024", "exposure of canaries"),),
)
