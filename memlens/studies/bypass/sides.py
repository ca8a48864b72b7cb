"""Sets of layers, other interventions, single heads and bounds (E6 to E8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
import xarray as xr

from memlens.choices import AblationMode, BypassMode
from memlens.figures.labels import choice_words
from memlens.instruments.ablate.branches import attention_ablations, mlp_ablations
from memlens.instruments.bypass.bounds import bypass_bounds
from memlens.instruments.bypass.bypass import (
    BYPASS_MODES,
    CONTROL_MODES,
    attention_bypasses,
    bypass_attention,
)
from memlens.instruments.bypass.layer_sets import LayerSetSearch, search_layer_sets
from memlens.instruments.bypass.predictor import bypass_predictor, predictor_agreement
from memlens.results.groups import by_part, join_groups, layers_label, quartiles
from memlens.results.kinds import register_kind
from memlens.results.plots.tasks import plot_edits
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.results.statistics.agreement import rank_correlation, standard_interval
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.intervals import mean_interval
from memlens.results.statistics.resampling import bootstrap_means
from memlens.results.statistics.tradeoff import join_frontier
from memlens.sequences.set import SequenceSet
from memlens.studies.bypass import findings as find
from memlens.studies.bypass.findings import MEMORIZED, TEXTS, UNTRAINED
from memlens.studies.bypass.layers import BypassContext, Kept
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.run import sweep

SINGLE_HEAD = "single head"
_CONTROL_METRICS = ("target_logprob", "completion_entropy", "exact_match")


def joint(study: BypassContext) -> None:
    """E6: sets of layers bypassed together."""
    work = joint_search(study)
    if work is None:
        return
    search = study.folder.kept("sets", work)
    both = {study.inputs.name: (search.recall, search.accuracy)}
    study.show("sets", join_frontier(both, **study.resampling))
    for name, result in (("recall", search.recall), ("tasks", search.accuracy)):
        result.save(study.folder.place("sets") / f"{name}.nc")
    best, areas = search.best_table(), search.areas()
    for name, frame in (
        ("best_sets", best),
        ("areas", areas),
        ("every_set", search.table.sort_values("selectivity", ascending=False)),
    ):
        study.table(name, frame)
    study.folder.find(find.best_set(best, areas, search, _elsewhere(study, search)))


def joint_search(study: BypassContext) -> Callable[..., LayerSetSearch] | None:
    """Return the search over sets of layers; None where it is not wanted or there are no tasks."""
    options, tasks = study.options, study.inputs.tasks
    if not options.joint_sequences or not tasks:
        return None
    if options.joint_questions is not None:
        tasks = [task.take(slice(0, options.joint_questions)) for task in tasks]
    named = ("mode", "over", "greedy_size", "exact_layers", "exact_pool", "n_random", "n_resamples", "seed")
    wanted = {name: getattr(options, name) for name in named}
    seqs = study.chosen(options.joint_sequences)[MEMORIZED]
    return partial(search_layer_sets, study.model, seqs, tasks, progress=study.progress, **wanted)


def edits(study: BypassContext) -> None:
    """E8: other interventions on each layer, on every group and on untrained weights."""
    if not study.options.edits:
        return
    results = {
        name: study.folder.kept(*edit_sweep(study, model, seqs, name))
        for name, model, seqs in study.measured(study.options.control_sequences)
    }
    for name, headed in study.headed.items():
        results[name] = with_heads(results[name], headed)
    study.show("edits", results[MEMORIZED])
    (figure,) = TEXTS["results"]["edits_by_group"]["figures"]
    each = [
        {**figure, "edit": edit, "title": f"Intervention: {choice_words(edit)}"}
        for edit in results[MEMORIZED]["edit"].values.tolist()
    ]
    study.show("edits_by_group", join_groups(results), figures=each)
    table = control_table(results, parts=study.options.quartiles, **study.resampling)
    depth = depth_table(results, **study.resampling)
    study.table("controls", table)
    study.table("depth", depth)
    study.folder.find(find.special(table))
    removal = find.beside_removal(results, study.options.quartiles, study.options.seed)
    if removal is not None:
        study.folder.find(removal)
    study.folder.find(find.any_stack(depth))


def heads(study: BypassContext) -> None:
    """E8: the bypass of single heads."""
    if not study.options.heads:
        return
    for name, model, seqs in study.measured(study.options.control_sequences):
        study.headed[name] = study.folder.kept(*head_sweep(study, model, seqs, name))
    result = study.headed[MEMORIZED]
    study.show("heads", result)
    study.folder.find(find.heads_against_layers(study.headed, study.swept.get(MEMORIZED), study.options.seed))


def head_sweep(study: BypassContext, model: Any, seqs: SequenceSet, name: str) -> Kept:
    """Return the sweep that bypasses each head of a group alone."""
    single = partial(bypass_attention, model, seqs, mode="identity", over="head")
    return f"heads_{name}", partial(single, metrics=_CONTROL_METRICS, progress=study.progress)


def bounds(study: BypassContext) -> None:
    """E7: what a bypass can change, and what it does change."""
    if not study.options.bounds_sequences:
        return
    seqs = study.chosen(study.options.bounds_sequences)[MEMORIZED]
    result = bypass_bounds(study.model, seqs, progress=study.progress)
    study.show("bounds", result)
    measured = {"this model": (study.model, result)}
    if study.options.untrained_control:
        measured[UNTRAINED] = (study.twin, bypass_bounds(study.twin, seqs, progress=False))
    agreements = []
    for name, (model, changed) in measured.items():
        if study.n_layers < 3:
            break  # two layers have only two orders
        guessed = bypass_predictor(model, seqs, progress=False)
        for predictor in ("predictor", "relative_predictor"):
            found = predictor_agreement(guessed, changed, "kl", predictor=predictor, seed=study.options.seed)
            agreements.append({"weights": name, **asdict(found)})
    if agreements:
        study.table("predictor", pd.DataFrame(agreements))
    study.folder.find(find.bounded(result, agreements))


def edit_sweep(study: BypassContext, model: Any, seqs: SequenceSet, name: str) -> Kept:
    """Return the sweep of the other interventions on a group."""
    edits = control_edits(model, seqs, study.options.edits)
    settings = {"edits": list(study.options.edits)}
    work = partial(sweep, model, seqs, edits, _CONTROL_METRICS, kind="bypass_controls", settings=settings)
    return f"edits_{name}", partial(work, progress=study.progress)


def _elsewhere(study: BypassContext, search: LayerSetSearch) -> dict[str, Result]:
    """Return the effect of the best set on each group."""
    layers = search.sets[search.best["any"]]
    edits = attention_bypasses(study.model, layers=[layers], mode=study.options.mode)
    return {
        name: study.folder.kept(
            f"best_set_{name}", partial(sweep, study.model, group, edits, ("target_logprob",), progress=False)
        )
        for name, group in study.chosen(study.options.control_sequences).items()
    }


# ---- the controls ----------------------------------------------------------------------------------------


def control_edits(model: Any, sequences: SequenceSet, names: Sequence[str]) -> list[Intervention]:
    """Return one intervention per name and layer, with the coordinates `edit` and `layer`.

    Args:
        model: A TransformerLens model.
        sequences: What they will run on; the means of "mean" and "mlp_mean" are taken over it.
        names: From `EDITS`.
    """
    found = []
    for name in names:
        if name in (*BYPASS_MODES, *CONTROL_MODES):
            edits = attention_bypasses(model, mode=cast(BypassMode, name))
        elif name.startswith("mlp_"):
            edits = mlp_ablations(model, sequences, mode=cast(AblationMode, name.removeprefix("mlp_")))
        else:
            edits = attention_ablations(model, sequences, mode=cast(AblationMode, name))
        found += [
            replace(edit, name=f"{name}: {edit.name}", coords={"edit": name, **edit.coords}) for edit in edits
        ]
    return found


def with_heads(edits: Result, heads: Result) -> Result:
    """Add the bypass of single heads, the mean over the heads of each layer, as one more edit."""
    names = [str(name) for name in edits.data.data_vars if "edit" in edits[str(name)].dims]
    mean = heads.data[names].mean("head", keep_attrs=True).expand_dims(edit=[SINGLE_HEAD])
    joined = xr.concat(
        [edits.data[names], mean], "edit", combine_attrs="override", coords="minimal", compat="override",
        join="exact",
    )  # fmt: skip
    return Result(joined.assign({name: v for name, v in edits.data.data_vars.items() if name not in names}))


def control_table(results: Mapping[str, Result], *, parts: int, n_resamples: int, seed: int) -> pd.DataFrame:
    """Return what each intervention does to the target log-probability of each group, by part of depth.

    Args:
        results: By group, kind "bypass_controls"; with "memorized" among them.
        parts: Number of parts into which depth is cut.
        n_resamples: Of the bootstraps.
        seed: Of the bootstraps and permutations.

    Returns:
        One row per intervention and part of depth: `edit`, `part` (1 is the first), `layers`; for each group
        its mean effect (nats per token, negative is harm) with interval; and for each control group on the
        same weights `minus …`: memorized minus control, with interval and a permutation p-value that is
        corrected for all rows (Benjamini and Hochberg).
    """
    reduced = {name: by_part(result, parts) for name, result in results.items()}
    columns: dict[str, xr.DataArray] = {}
    for name, result in reduced.items():
        ci = mean_interval(result.effect("target_logprob"), n_resamples=n_resamples, seed=seed)
        for tail, statistic in (("", "mean"), (" low", "low"), (" high", "high")):
            columns[f"{name}{tail}"] = ci.sel(statistic=statistic).reset_coords(drop=True)
    for name, result in reduced.items():
        if name not in (MEMORIZED, UNTRAINED):
            compared = compare_groups(
                reduced[MEMORIZED], result, "target_logprob", of="effect", n_resamples=n_resamples, seed=seed
            )
            columns[f"minus {name}"] = compared["difference"]
            columns |= {f"minus {name} {tail}": compared[tail] for tail in ("low", "high", "p_corrected")}
    frame = xr.Dataset(columns).to_dataframe(dim_order=["edit", "layer"]).reset_index(names=["edit", "part"])
    labels = [layers_label(layers) for layers in quartiles(results[MEMORIZED].data.sizes["layer"], parts)]
    frame.insert(2, "layers", [labels[part - 1] for part in frame["part"]])
    return frame


def depth_table(results: Mapping[str, Result], *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Return how the size of each intervention's effect depends on depth, for every group.

    The size is the mean over sequences of the absolute change of the target log-probability: that of
    untrained weights has no direction. A correlation near -1 on untrained weights says that early
    interventions matter more in any residual stack, memorized or not.

    Returns:
        One row per intervention and group: `edit`, `group`, `correlation` (Spearman's, over layers, of the
        size and the layer's number) with its interval over sequences, `first` and `last` (nats per token, at
        the first and last layer), `n`.
    """
    rows = []
    for name, result in results.items():
        size = abs(result.effect("target_logprob")).transpose("edit", "sequence", "layer")
        layers = np.arange(size.sizes["layer"], dtype=float)
        for edit in size["edit"].values.tolist():
            table = size.sel(edit=edit).values
            mean = np.nanmean(table, 0)
            drawn = bootstrap_means(table, n_resamples, seed)
            spread = rank_correlation(drawn, np.broadcast_to(layers, drawn.shape))
            value = float(rank_correlation(mean, layers))
            low, high = standard_interval(value, spread, 0.95, -1.0, len(table))
            row = {"edit": edit, "group": name, "correlation": value, "low": low, "high": high}
            rows.append({**row, "first": float(mean[0]), "last": float(mean[-1]), "n": len(table)})
    return pd.DataFrame(rows)


register_kind("bypass_controls", plot=plot_edits, reading=read_effects)
