"""Findings of the study of detectors, with numbers, intervals and controls; the words are in `texts.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from memlens import figures
from memlens.instruments.detect.beyond import gain_of
from memlens.instruments.detect.buckets import BucketStatistics
from memlens.instruments.detect.context.comparing import largest
from memlens.instruments.detect.exposure import BY_CHANCE
from memlens.instruments.detect.generalizing import OF_RECALL, OF_TEXT, RecallOrGeneralize
from memlens.instruments.detect.separation import ACTIVATIONS, SHUFFLED, estimate_at
from memlens.recall.taxonomy import CLASSES
from memlens.report.model import Finding
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, mean_estimate, share_estimate
from memlens.studies.running import Texts

TEXTS = Texts(__file__)
"""What the report says."""


def recalled(classes: pd.Series) -> Finding:
    """What share of sequences is recalled, and what share of these no rule explains."""
    hit = (classes != CLASSES[0]).to_numpy()
    own = (classes[hit] == CLASSES[2]).to_numpy()
    return TEXTS.finding("recalled", share_estimate(hit), recalled=int(hit.sum()), own=share_estimate(own))


def separated(name: str, found: Result, copies: Sequence[int] = ()) -> Finding:
    """What the last layer's activations add to the strictest baseline.

    Args:
        name: The finding.
        found: Of `separation`.
        copies: The numbers of copies that were compared.
    """
    n = found.data.sizes["sequence"]
    baseline = str(found["baseline"].values[-1])
    last = {"layer": int(found["layer"].values[-1])}
    area = found["area"].sel(last)
    gain = estimate_at(found["gain"].sel(last).sel(baseline=baseline), n)
    at = {key: estimate_at(area.sel(features=key), n) for key in (ACTIVATIONS, SHUFFLED, baseline)}
    return TEXTS.finding(
        name, gain, baseline=baseline, own=at[ACTIVATIONS], alone=at[baseline], shuffled=at[SHUFFLED],
        copies=", ".join(map(str, copies)), verdict=verdict(gain), layer=last["layer"],
    )  # fmt: skip


def no_mixed_copies(fewest: int, wanted: int) -> Finding:
    """That there are too few sequences of equal copies to compare."""
    return TEXTS.finding("no_mixed_copies", fewest=fewest, wanted=wanted)


def verdict(gain: Estimate) -> str:
    """Say whether a gain is above 0."""
    if not gain.known:
        return "With so few sequences this cannot be decided."
    if gain.low > 0:
        return "That is more than nothing."
    return "Nothing is shown beyond them."


def behaving(found: Result) -> Finding:
    """How stable the choice of behaviour neurons is."""
    same, control = (mean_estimate(found[name]) for name in ("overlap", "overlap_shuffled"))
    # The halvings are not independent: their mean is given without an interval.
    return TEXTS.finding(
        "behaving", Estimate(same.value), control=f"{control.value:.3g}", n=int(found["chosen"].sum())
    )


def steering(curve: Result, cost: Result | None, name: str = "steering") -> Finding:
    """What the largest dose away from recalling does to recall, beyond random shifts, and to tasks."""
    alphas = curve["alpha"].values
    alpha = float(alphas.min())
    random = [d for d in curve["direction"].values if d != "behaviour"]

    def gap(dose: float) -> Estimate:
        at = curve["exact_match"].sel(alpha=dose)
        control = at.sel(direction=random).mean("direction") if random else curve["exact_match_baseline"]
        return mean_estimate(at.sel(direction="behaviour") - control)

    tasks = "not measured"
    if cost is not None:
        lost = cost.effect("accuracy").sel(alpha=alpha)
        tasks = f"{mean_estimate(lost.sel(direction='behaviour'))}"
        if random:
            tasks += f", with random shifts {mean_estimate(lost.sel(direction=random).mean('direction'))}"
    left = share_estimate(curve["exact_match"].sel(alpha=alpha, direction="behaviour"))
    reverse = str(gap(-alpha)) if -alpha in alphas else "not measured"
    return TEXTS.finding(name, gap(alpha), alpha=alpha, left=left, tasks=tasks, reverse=reverse)


def dimension(found: Result) -> Finding:
    """How well a low local dimension marks recalled sequences, in the last layer."""
    area = estimate_at(found["area"].isel(layer=-1), found.data.sizes["sequence"])
    group, lid = found["group"].values, found["lid"].isel(layer=-1)
    ours, theirs = (mean_estimate(lid[group == name]) for name in ("recalled", "matched"))
    return TEXTS.finding(
        "dimension", area, ours=ours, theirs=theirs, layer=int(found["layer"].values[-1]),
        references=found.settings["n_references"],
    )  # fmt: skip


def attention(compared: Mapping[str, xr.Dataset]) -> Finding:
    """How many heads attend differently, by statistic, and by how much the clearest one."""
    counts = {name: int((part["p_corrected"] < 0.05).sum()) for name, part in compared.items()}
    name = max(counts, key=lambda key: counts[key])
    part = compared[name].stack(site=("layer", "head"))
    best = part.isel(site=int(np.nanargmax(np.abs(part["difference"].values))))
    found = Estimate(*(float(best[key]) for key in ("difference", "low", "high")), n=int(part.attrs["n_a"]))
    layer, head = best["site"].item()
    return TEXTS.finding(
        "attention", found, counts="; ".join(f"{key.replace('_', ' ')}: {n}" for key, n in counts.items()),
        total=part.sizes["site"], statistic=name.replace("_", " "), layer=int(layer), head=int(head),
    )  # fmt: skip


def attention_classes(table: pd.DataFrame) -> Finding:
    """Which statistic differs in most heads between recall and guesses, also among equal copies and domains.

    Where there are no guesses, or no recall, what is recalled is compared with what is not memorized.

    Args:
        table: Of `class_differences`.
    """
    every = table.to_dict("records")
    compared = [(row["a"], row["b"]) for row in every]
    pairs = [(CLASSES[1], CLASSES[2]), (CLASSES[0], CLASSES[2]), (CLASSES[0], CLASSES[1])]
    a, b = next(pair for pair in pairs if pair in compared)
    rows = [row for row, pair in zip(every, compared, strict=True) if pair == (a, b)]
    best = max(rows, key=lambda row: row["heads"])
    n = int(best["n_a"] + best["n_b"])
    inside = Estimate(
        *(float(best[f"within_{key}"]) for key in ("difference", "low", "high")),
        n=int(best["within_n_a"] + best["within_n_b"]),
    )
    return TEXTS.finding(
        "attention_classes", Estimate(*(float(best[key]) for key in ("difference", "low", "high")), n=n),
        a=a, b=b, n_a=int(best["n_a"]), n_b=int(best["n_b"]), p=f"{best['p']:.2g}",
        counts="; ".join(f"{row['statistic'].replace('_', ' ')}: {row['heads']}" for row in rows),
        total=best["of"], statistic=best["statistic"].replace("_", " "),
        control=f"{inside}, {inside.n} sequences, p = {best['within_p']:.2g}" if inside.n else "none alike",
    )  # fmt: skip


def generalizing(found: RecallOrGeneralize, tasks: Sequence[str]) -> Finding:
    """Whether the neurons that tell recalled sequences from questions tell recalled from matched ones."""
    # Of the rows with several baselines the last stays: the one with copies, where they are known.
    rows = {(row["neurons"], row["compared"]): row for row in found.comparisons.to_dict("records")}
    areas = {
        key: Estimate(row["area"], row["low"], row["high"], int(row["recalled"] + row["matched"]))
        for key, row in rows.items()
    }
    test = rows[OF_RECALL, "recalled or matched"]
    return TEXTS.finding(
        "generalizing", areas[OF_RECALL, "recalled or matched"],
        control=str(areas[OF_TEXT, "recalled or matched"]), tasks=", ".join(tasks),
        n=int(found.neurons["chosen"].sum()), shared=f"{found.shared:.2g}",
        apart=areas[OF_RECALL, OF_RECALL], text=areas[OF_RECALL, OF_TEXT], gain=gain_of(test),
        verdict=verdict(gain_of(test)),
    )  # fmt: skip


def curvature(
    recalled: Result, text: Result, cost: Result | None, share_of_entries: float, matrices: Sequence[str]
) -> Finding:
    """What the mildest and the strongest edit leave of recall, of other text and of tasks.

    Args:
        recalled: The edits on recalled sequences.
        text: The edits on other text.
        cost: The edits on tasks.
        share_of_entries: How many directions the mildest edit keeps.
        matrices: Which were edited.
    """
    most, least = (float(end) for end in (recalled["kept"].max(), recalled["kept"].min()))
    own, random, strong = (
        {"kept": kept, "entries": name}
        for kept, name in ((most, "curvature"), (most, "random 0"), (least, "curvature"))
    )
    tasks = "not measured"
    if cost is not None:
        lost = cost.effect("accuracy")
        tasks = f"{mean_estimate(lost.sel(own))}, with as many random ones {mean_estimate(lost.sel(random))}"
    lost, left = text.effect("target_logprob"), recalled["exact_match"]
    return TEXTS.finding(
        "curvature", share_estimate(left.sel(own)), kept=f"{most:g}", share=f"{share_of_entries:.2g}",
        matrices=", ".join(matrices), text=mean_estimate(lost.sel(own)),
        random_text=mean_estimate(lost.sel(random)), tasks=tasks, least=f"{least:g}",
        left=share_estimate(left.sel(strong)), strong_text=mean_estimate(lost.sel(strong)),
        control=str(share_estimate(left.sel(random))),
    )  # fmt: skip


def module_figure(counts: pd.DataFrame, by: str, effects: Result) -> go.Figure:
    """Draw how many neurons carry half of the effect in each group."""
    values = counts[["neurons", "low", "high"]].to_numpy(float).T
    words = {"label": "neurons that carry half of the harm", "units": f"of {counts['of'].iloc[0]}"}
    coords = {"statistic": ["mean", "low", "high"], by: counts["group"].astype(str).to_numpy()}
    drawn = xr.Dataset({"neurons": (("statistic", by), values, words)}, coords)
    n, model = effects.data.sizes["sequence"], effects.data.attrs["model"]
    return figures.dots_with_intervals(
        drawn, dim=by, title=TEXTS["modules"]["figure"], subtitle=f"{n} sequences · {model}"
    )


def modules(counts: pd.DataFrame, shared: pd.DataFrame, by: str) -> Finding:
    """How few neurons carry half of the effect, and whether groups share fewer than random divisions."""
    rows, pairs = counts.to_dict("records"), shared.to_dict("records")
    carriers = [Estimate(row["neurons"], row["low"], row["high"], row["n"]) for row in rows]
    said = "; ".join(f"{row['group']} {found}" for row, found in zip(rows, carriers, strict=True))
    total = rows[0]["of"]
    if not pairs:
        few = np.mean([row["share_of_neurons"] for row in rows])
        return TEXTS.finding("one_module", Estimate(float(few)), counts=said, total=total)
    overlap, null = (float(np.mean([row[key] for row in pairs])) for key in ("overlap", "null_mean"))
    return TEXTS.finding(
        "modules", Estimate(overlap), counts=said, total=total, by=by, pairs=len(pairs),
        fewer=sum(row["p"] < 0.05 for row in pairs), control=f"{null:.2g}",
    )  # fmt: skip


def context(found: Result, control: Result) -> Finding:
    """How often the context wins against the weights, and how likely the continuation is in each prompt."""
    wins = [
        share_estimate((r["wrong_logprob"] > r["target_logprob_baseline"]).sel(condition=condition))
        for r, condition in ((found, "conflict"), (found, "alone"), (control, "conflict"))
    ]
    at = {
        str(c): mean_estimate(found["target_logprob_baseline"].sel(condition=c))
        for c in found["condition"].values
    }
    return TEXTS.finding(
        "context", wins[0], before=wins[1], n=found.data.sizes["sequence"], **at, control=str(wins[2])
    )


def patched(found: Result, control: Result) -> Finding:
    """What the corruption costs in each condition, and which head's patch costs most."""
    costs = [
        {
            str(c): mean_estimate((r["target_logprob_corrupt"] - r["target_logprob_clean"]).sel(condition=c))
            for c in r["condition"].values
        }
        for r in (found, control)
    ]
    heads = {
        str(c): largest(Result(found.data.sel(condition=c, drop=True)), "target_logprob")
        for c in found["condition"].values
    }
    return TEXTS.finding(
        "patched", costs[0]["copied"], alone=costs[0]["alone"], repeated=costs[0]["repeated"],
        heads="; ".join(f"{c}: {place}, {most}" for c, (_, place, most) in heads.items()),
        direction=found.settings["direction"], control=str(costs[1]["copied"]),
    )  # fmt: skip


def context_sites(name: str, compared: Mapping[str, xr.Dataset]) -> Finding:
    """Which heads and layers differ between the conditions, beyond matched sequences.

    Args:
        name: The finding.
        compared: Of `context_heads` with a control, by what was patched or ablated.
    """
    counts = "; ".join(
        f"{int((part['p_corrected'] < 0.05).sum())} of {part['p'].size} {what}"
        for what, part in compared.items()
    )
    part = next(iter(compared.values())).stack(site=("layer", "head"))
    best = part.isel(site=int(np.nanargmax(np.abs(part["difference"].values))))
    most = Estimate(*(float(best[key]) for key in ("difference", "low", "high")), n=int(part.attrs["n_a"]))
    layer, head = best["site"].item()
    return TEXTS.finding(name, most, counts=counts, layer=int(layer), head=int(head))


def beyond(table: pd.DataFrame, *, told: bool = True) -> Finding:
    """Which detector adds most to a baseline, and which add anything.

    Args:
        table: Of one baseline.
        told: Whether the report's first sentences tell it; of several baselines, the strictest is enough.
    """
    rows = table.to_dict("records")
    best = max(rows, key=lambda row: row["gain"])
    gain = gain_of(best)
    adding = [str(row["detector"]) for row in rows if gain_of(row).known and row["gain_low"] > 0]
    copies = "; ".join(f"{row['detector']} {row['copies_correlation']:.2f}" for row in rows)
    clearly = (
        f"of {len(rows)} detectors these add" if adding else f"none of {len(rows)} detectors clearly adds"
    )
    found = TEXTS.finding(
        "beyond", gain, baseline=best["baseline"], alone=f"{best['baseline_area']:.3g}",
        detector=best["detector"], adding=", ".join(adding) or "none", copies=copies,
        clearly=f"{clearly}: {', '.join(adding)}," if adding else clearly,
    )  # fmt: skip
    return found if told else replace(found, plain="", beside="")


def exposed(found: Result) -> Finding:
    """How exposed canaries are, by copies where known."""
    return TEXTS.finding(
        "exposed", mean_estimate(found["exposure"]), control=_by_copies(found, "exposure"),
        chance=BY_CHANCE, bits=found.settings["bits"],
    )  # fmt: skip


def invariant(found: Result, buckets: BucketStatistics | None) -> Finding:
    """How invariant predictions are over temperatures, and how that goes with popularity."""
    said = "not known"
    if buckets is not None:
        said = (
            f"Pearson {buckets.pearson:.2f} (p = {buckets.pearson_p:.2g}), Spearman {buckets.spearman:.2f} "
            f"(p = {buckets.spearman_p:.2g}), over {len(buckets.table)} buckets"
        )
    return TEXTS.finding(
        "invariant", mean_estimate(found["invariance"]), control=_by_copies(found, "invariance"), buckets=said
    )


def _by_copies(found: Result, name: str) -> str | None:
    if "copies" not in found.data.coords:
        return None
    copies = found["copies"].values
    return ", ".join(f"{mean_estimate(found[name][copies == n]).value:.2f} at {n}" for n in np.unique(copies))
