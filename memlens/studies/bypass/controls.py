"""What else can be done to a layer's attention, and what that tells of memorization: the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pandas as pd
import xarray as xr

from memlens.instruments.ablate.branches import attention_ablations, mlp_ablations
from memlens.instruments.ablate.replacing import Mode
from memlens.instruments.bypass.bypass import BYPASS_MODES, CONTROL_MODES, attention_bypasses
from memlens.instruments.screen.agreement import rank_correlation, standard_interval
from memlens.results.groups import by_part, layers_label, quartiles
from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.intervals import bootstrap_means, mean_interval
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention

MEMORIZED, UNTRAINED = "memorized", "untrained weights"
SINGLE_HEAD = "single head"


def control_edits(model: Any, sequences: SequenceSet, names: Sequence[str]) -> list[Intervention]:
    """Return one intervention for each edit and layer, with the coordinates `edit` and `layer`.

    Args:
        model: A TransformerLens model.
        sequences: What they will run on; the means of "mean" and "mlp_mean" are taken over it.
        names: Out of `EDITS`.
    """
    found = []
    for name in names:
        if name in (*BYPASS_MODES, *CONTROL_MODES):
            edits = attention_bypasses(model, mode=name)
        elif name.startswith("mlp_"):
            edits = mlp_ablations(model, sequences, mode=cast(Mode, name.removeprefix("mlp_")))
        else:
            edits = attention_ablations(model, sequences, mode=cast(Mode, name))
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
    """Return what each edit does to the target log-probability, by depth, memorized text beside the controls.

    Args:
        results: By group, kind "bypass_controls"; with "memorized" among them.
        parts: In how many parts depth is cut.
        n_resamples: Of the bootstraps.
        seed: Of the bootstraps and permutations.

    Returns:
        One row for each edit and part of depth: `edit`, `part` (1 is the first), `layers`; for each group its
        mean effect (nats a token, negative is harm) with interval; and for each control group on the same
        weights `minus …`: memorized less control, with interval and a permutation p-value that is corrected
        for all rows (Benjamini and Hochberg).
    """
    main = results[MEMORIZED]
    cut = quartiles(main.data.sizes["layer"], parts)
    rows: dict[tuple[str, int], dict[str, Any]] = {
        (edit, number): {"edit": edit, "part": number, "layers": layers_label(layers)}
        for edit in main["edit"].values.tolist()
        for number, layers in enumerate(cut, 1)
    }
    reduced = {name: by_part(result, parts) for name, result in results.items()}
    for name, result in reduced.items():
        ci = mean_interval(result.effect("target_logprob"), n_resamples=n_resamples, seed=seed)
        for (edit, number), row in rows.items():
            here = ci.sel(edit=edit, layer=number)
            row |= {
                f"{name}{tail}": float(here.sel(statistic=s))
                for tail, s in (("", "mean"), (" low", "low"), (" high", "high"))
            }
    for name, result in reduced.items():
        if name in (MEMORIZED, UNTRAINED):
            continue
        compared = compare_groups(
            reduced[MEMORIZED], result, "target_logprob", of="effect", n_resamples=n_resamples, seed=seed
        )
        for (edit, number), row in rows.items():
            here = compared.sel(edit=edit, layer=number)
            tails = {"": "difference", " low": "low", " high": "high", " p_corrected": "p_corrected"}
            row |= {f"minus {name}{tail}": float(here[variable]) for tail, variable in tails.items()}
    return pd.DataFrame(list(rows.values()))


def depth_table(results: Mapping[str, Result], *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Return how the size of each edit's effect goes with depth, for memorized text and for the controls.

    The size is the mean over sequences of the absolute change of the target log-probability: that of
    untrained weights has no direction. A correlation near -1 on untrained weights says that early edits
    matter more in any residual stack, memorized or not.

    Returns:
        One row for each edit and group: `edit`, `group`, `correlation` (Spearman's, over layers, of the size
        and the layer's number) with its interval over sequences, `first` and `last` (nats a token, at the
        first and last layer), `n`.
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
            low, high = standard_interval(value, spread, 0.95, -1.0)
            rows.append(
                {
                    "edit": edit,
                    "group": name,
                    "correlation": value,
                    "low": low,
                    "high": high,
                    "first": float(mean[0]),
                    "last": float(mean[-1]),
                    "n": len(table),
                }
            )
    return pd.DataFrame(rows)
