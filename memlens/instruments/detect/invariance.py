"""Prediction invariance: whether a model's answer is the same over repetitions, temperatures and prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from memlens import figures
from memlens.errors import OptionError, SequenceError
from memlens.forward.exclusive import computes
from memlens.forward.generate import greedy_continuations, sampled_continuations
from memlens.options import options_class
from memlens.recall.sampling import Sampling
from memlens.results.kinds import register_kind
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result
from memlens.results.statistics.estimates import mean_estimate
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import decode
from memlens.sweeps.labels import make_result

Over = Literal["repeats", "temperatures", "prompts"]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@options_class
class InvarianceOptions:
    """Options of `prediction_invariance`; the result records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.detect.InvarianceOptions(n_repeats=5).n_repeats
        5
    """

    over: Over = "temperatures"
    """What varies: nothing (PI-1), the temperature (PI-2) or the prompt (PI-3)."""
    n_repeats: Annotated[int, Field(ge=2)] = 10
    """Greedy answers to the same prompt, for "repeats"; each in batches of another random order."""
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=2)] = tuple(i / 10 for i in range(11))
    """Sampling temperatures, for "temperatures"; 0 is greedy decoding."""
    seed: int = 0
    """Seed of the samples and of the orders."""


def invariance(answers: Sequence[Sequence[Hashable]]) -> Float[np.ndarray, "item"]:
    r"""Return the prediction invariance of each item.

    .. math:: 1 - \frac{\text{distinct answers} - 1}{n - 1}

    for n answers: 1 if all are the same, 0 if no two are.

    Args:
        answers: For each item, its n answers.

    Raises:
        OptionError: An item has fewer than two answers.

    Source: arXiv 2401.14931 (released code).

    >>> invariance([["7", "7", "7"], ["7", "7", "8"], ["1", "2", "3"]]).tolist()
    [1.0, 0.5, 0.0]
    """
    if any(len(each) < 2 for each in answers):
        raise OptionError("prediction invariance takes at least two answers to each item.")
    return np.array([1 - (len(set(each)) - 1) / (len(each) - 1) for each in answers])


@computes
@torch.no_grad()
def prediction_invariance(
    model: Any,
    sequences: SequenceSet,
    *,
    prompts: Sequence[SequenceSet] = (),
    options: InvarianceOptions | None = None,
) -> Result:
    """Measure how invariant the model's continuation of each prefix is; see `invariance`.

    Every answer has as many tokens as the true continuation. In the paper PI-1 is over ten repetitions at
    temperature 0, PI-2 over the temperatures 0, 0.1, … 1.0, and PI-3 over five languages. A local model that
    decodes greedily is deterministic up to rounding, so PI-1 below 1 means near ties.

    Args:
        model: A TransformerLens model; its hooks act.
        sequences: The items.
        prompts: For "prompts": further sets with the same items in the same order, asked otherwise.
        options: See `InvarianceOptions`.

    Returns:
        Kind "prediction_invariance": `invariance` and `n_distinct` `(sequence)`; `correct` (0 or 1, the whole
        continuation) `(sequence, run)`; `answer` `(sequence, run)`, the text, or without a tokenizer the ids.
        The coordinate `run` is the repetition, the temperature or the number of the prompt.

    Raises:
        EmptySetError: No sequences.
        OptionError: Prompts are given for another variant, or missing for this one.
        SequenceError: A set of prompts has other items or continuations.

    Source: arXiv 2401.14931 (released code).

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> items = ml.load_sequences("zoo:identifiers", model)[-3:]
        >>> found = ml.detect.prediction_invariance(model, items)
        >>> found["answer"].sizes["run"], bool(found["invariance"].max() <= 1)
        (11, True)
    """
    options = options or InvarianceOptions()
    if (options.over == "prompts") != bool(prompts):
        raise OptionError("prompts= and over='prompts' go together: give both, or neither.")
    for seqs in (sequences, *prompts):
        check_sequences(seqs, model, on_eos="keep")
        if seqs.halves()[1] != sequences.halves()[1]:
            raise SequenceError(
                "a set of prompts has other continuations: give the same items in the same order."
            )
    runs: list[Any]
    if options.over == "repeats":
        runs = list(range(options.n_repeats))
        given = [_in_order_of(model, sequences, [options.seed, run]) for run in runs]
    elif options.over == "temperatures":
        runs = list(options.temperatures)
        given = [_at_temperature(model, sequences, t, options.seed, i) for i, t in enumerate(runs)]
    else:
        runs = list(range(1 + len(prompts)))
        given = [greedy_continuations(model, seqs) for seqs in (sequences, *prompts)]
    truth = torch.where(sequences.target_mask, sequences.target_ids, -1)
    correct = np.stack([(found == truth).all(1).numpy() for found in given], 1)
    answers = list(zip(*(_said(model, found, sequences) for found in given), strict=True))
    variables = {
        "invariance": ("sequence", invariance(answers), {"long_name": "prediction invariance", "units": ""}),
        "n_distinct": ("sequence", np.array([len(set(each)) for each in answers])),
        "correct": (("sequence", "run"), correct.astype(np.int8)),
        "answer": (("sequence", "run"), np.array(answers, dtype=str)),
    }
    settings = {**asdict(options), "n_prompts": 1 + len(prompts)}
    return make_result("prediction_invariance", model, sequences, variables, {"run": runs}, settings)


def _in_order_of(model: Any, seqs: SequenceSet, seed: Sequence[int]) -> Int[Tensor, "seq target"]:
    rows = torch.from_numpy(np.random.default_rng([part % 2**64 for part in seed]).permutation(len(seqs)))
    found = greedy_continuations(model, seqs, rows)
    return found[rows.argsort()]


def _at_temperature(
    model: Any, seqs: SequenceSet, temperature: float, seed: int, run: int
) -> Int[Tensor, "seq target"]:
    if temperature == 0:
        return greedy_continuations(model, seqs)
    generator = torch.Generator().manual_seed(int(np.random.default_rng([seed % 2**64, run]).integers(2**62)))
    return sampled_continuations(model, seqs, _drawing(Sampling(temperature), generator))


def _drawing(sampling: Sampling, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    def choose(logits: Tensor) -> Tensor:
        odds = sampling.warp(logits).softmax(-1).cpu()
        return torch.multinomial(odds, 1, generator=generator)[:, 0]

    return choose


def _said(model: Any, found: Int[Tensor, "seq target"], seqs: SequenceSet) -> list[str]:
    """Return each answer as text, or without a tokenizer its token ids."""
    rows = [row[:n] for row, n in zip(found.tolist(), seqs.n_targets.tolist(), strict=True)]
    tokenizer = getattr(model, "tokenizer", None)
    return [" ".join(map(str, row)) for row in rows] if tokenizer is None else decode(tokenizer, rows)


@takes(group="copies")
def plot_invariance(result: Result, s: Selection) -> go.Figure:
    """Draw the mean invariance against a group, such as copies; without one, its histogram."""
    title = s.title or f"Prediction invariance over {result.settings['over']}"
    if s.group is None or s.group not in result.data.coords:
        return figures.recall_panels(result["invariance"], None, title=title, subtitle=s.subtitle(result))
    ci = result.mean_ci(metric="invariance", group=s.group, **s.intervals)
    return figures.line_over_layers(ci, x=s.group, title=title, subtitle=s.subtitle(result))


def read_invariance(result: Result, metric: str | None) -> str:
    """Say how invariant answers are, and how that goes with their being correct."""
    values = result["invariance"]
    first = result["correct"].isel(run=0).values == 1
    said = (
        f"The mean prediction invariance over {result.data.sizes['run']} {result.settings['over']} is "
        f"{mean_estimate(values).text()}, {len(values)} sequences."
    )
    if first.any() and not first.all():
        right, wrong = (mean_estimate(values[rows]).text() for rows in (first, ~first))
        said += f" Where the first answer is correct it is {right}, elsewhere {wrong}."
    return said


register_kind(
    "prediction_invariance",
    plot=plot_invariance,
    reading=read_invariance,
    cites=(("bombieri2024", "prediction invariance"),),
)
