"""Readings: a summary in words and numbers of a result of each kind.

Each function takes a result and a metric (None for the first) and returns a few sentences. They describe
numbers and are not tests: an interval is given if there are three or more sequences, the most extreme of many
sites is named as such, and controls follow the value that they control for. A metric's direction decides
between "harms" and "changes".
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from memlens.figures.labels import MetricText, choice_words, metric_text
from memlens.results.groups import named_layers
from memlens.results.plots.layers import FLIPS, STRENGTHS
from memlens.results.plots.selection import with_dims
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, median_estimate
from memlens.results.statistics.intervals import (
    FEWEST,
    changed_too_little,
    mean_interval,
    restorable_metric,
    restored_share,
)
from memlens.results.statistics.racing import RANK_BY
from memlens.results.statistics.tasks import task_summary, task_tables

_INNER = ("target", "draw")
_CONTROLS = ("selection", "edit")
"""Dimensions whose first entry is described, and compared with the other entries."""


def read_effects(result: Result, metric: str | None) -> str:
    """Say which site changes a metric most, whether its interval includes 0, and how the controls compare."""
    name = metric or next(n for n in result.metrics if f"{n}_baseline" in result.data)
    text, effect = metric_text(name, result[name]), _inner_mean(result.effect(name))
    control = next((dim for dim in _CONTROLS if dim in effect.dims), None)
    first = effect if control is None else effect.isel({control: 0}, drop=True)
    groups = _groups(result)
    rows = next(iter(groups.values()), slice(None))
    ci = mean_interval(first.isel(sequence=rows))
    site = _extreme(ci, -text.better)
    found = Estimate.of(ci.sel(site))
    what = f"the share of sequences with the {text.label}" if name in FLIPS else f"the {text.label}"
    lead = "" if control is None else f"With {choice_words(effect[control].values[0])}: "
    lead += "" if not groups else f"In {next(iter(groups))}: "
    where = _where(site)
    if not text.better:
        said = f"The change is largest{where}: {what} there changes by {_spoken(found, text)}"
    elif found.value * text.better < 0:
        said = f"Recall is harmed most{where}: {what} there changes by {_spoken(found, text)}"
    else:
        said = (
            f"No site harms recall on average: even{where or ' there'} {what} changes by "
            f"{_spoken(found, text)}"
        )
    said = lead + said[0].lower() + said[1:] if lead else said
    said += f", {_over(found.n)}, against the unchanged model."
    if found.known and not found.excludes(0):
        said += " That interval includes 0: this may be no effect at all."
    said += _chance(ci, can_fall=name not in FLIPS)
    if control is not None:
        here = effect.sel(site)
        for other in effect[control].values[1:]:
            theirs = here.sel({control: other}, drop=True)
            change, gap = _mean(theirs), _mean(first.sel(site) - theirs)
            said += f" There {choice_words(other)} changes it by {_spoken(change, text)}; "
            said += f"the difference is {_spoken(gap, text)}."
    for group, own in list(groups.items())[1:]:
        theirs = _mean(first.sel(site).isel(sequence=own))
        said += f" In {group} it changes by {_spoken(theirs, text)} there, {_over(theirs.n)}."
    return said


def read_knock_outs(result: Result, metric: str | None) -> str:
    """Say which window of layers' knock-out changes most of the metric that its figure shows first."""
    return read_effects(result, metric or next((name for name in result.metrics if name in FLIPS), None))


def read_sets(result: Result, metric: str | None) -> str:
    """Say which set of layers changes a metric most."""
    return read_effects(result, metric) + " Larger sets tend to change more: compare sets of one size."


def read_estimated(result: Result, metric: str | None) -> str:
    """Say what gradients estimate of a patch or an ablation."""
    read = read_restored if restorable_metric(result) else read_effects
    note = " These effects are estimated from gradients, not measured: verify the largest by running them."
    return read(result, metric) + note


def read_top(result: Result, metric: str | None) -> str:
    """Say which components are in the top k, which are undecided, and what the answer cost."""
    about, data = result.settings, result.data
    name = str(about["metric"])
    text = metric_text(name, result[name])
    dims = [str(d) for d in result["status"].dims]
    flat = result.to_frame(["status", "decided_by", "estimate", "low", "high"]).to_dict("records")
    score = RANK_BY[about["rank_by"]]
    chosen = sorted((row for row in flat if row["status"] == "in"), key=lambda row: -score(row["estimate"]))
    named = [_where({d: row[d] for d in dims}).removeprefix(" at ") for row in chosen]
    verb = {"magnitude": "change", "decrease": "lower", "increase": "raise"}[about["rank_by"]]
    said = ""
    if chosen:
        first = Estimate(*(chosen[0][part] for part in ("estimate", "low", "high")), n=FEWEST)
        said += f"The {len(named)} components that {verb} the {text.label} most over the given sequences: "
        said += "; ".join(named[:_MOST_NAMED]) + (" and others. " if len(named) > _MOST_NAMED else ". ")
        said += f"The first changes it by {_spoken(first, text)}. "
    undecided = sum(row["status"] == "undecided" for row in flat)
    said += f"{undecided} are undecided. " if undecided else ""
    if any(row["decided_by"] == "tie" for row in flat):
        said += "Some means at the boundary are equal; the first in order were taken. "
    said += f"This took {100 * about['share']:.3g} % of the cost of all cells of {data.sizes['sequence']} "
    if all(row["decided_by"] in ("all sequences", "tie", "") for row in flat):
        return said + "sequences."
    sure = f"at least {100 * about['level']:g} %"
    sure += "" if about["interval"] == "betting" else ", approximately"
    return said + f"sequences; the answer is that of all of them with a probability of {sure}."


_MOST_NAMED = 10


def read_restored(result: Result, metric: str | None) -> str:
    """Say where patching restores (or leaves) most, as a share of what the corruption took."""
    noising, lead = result.settings.get("direction") == "noising", ""
    scale, high, low = "0 is the corrupt run, 1 the clean one", "the clean run's", "the corrupt one's"
    change = "The corruption"
    if "donor" in result.settings:  # one of the two runs is another model's
        high, low = ("the model's", "the donor's")[:: 1 if noising else -1]
        scale, change = f"0 is {low} run, 1 {high}", "The donor"
    restorable = restorable_metric(result)
    name = metric or ("restored_share" if restorable else result.metrics[0])
    if name == "restored_share" and restorable and changed_too_little(result):
        text = metric_text(restorable, result[restorable])
        found = _mean(result[f"{restorable}_clean"] - result[f"{restorable}_corrupt"])
        lead = (
            f"{change} changed too little to say what share of it is restored: {high} "
            f"{text.label} exceeds {low} by {_spoken(found, text)}. "
        )
        name = restorable
    if name == "restored_share":
        ci = restored_share(result)[name]
    else:
        effect = f"{name}_corrupt" in result.data
        ci = mean_interval(_inner_mean(result.effect(name) if effect else result[name].astype(float)))
    text = metric_text(name, result.data.get(name))
    site = _extreme(ci, -(text.better or 1) if noising else text.better)
    found = Estimate.of(ci.sel(site))
    scale = f" ({scale})" if text.whole else ""
    what = "The patch leaves the least recall" if noising else "Most is restored"
    if not text.better:
        what = "The patch changes most"
    together = name == "restored_share" and found.n > 1
    over = f"{found.n} sequences together" if together else _over(found.n)
    said = f"{lead}{what}{_where(site)}: {text.label} {_spoken(found, text)}{scale}, {over}."
    return said if noising else said + _chance(ci)


def read_decoding(result: Result, metric: str | None) -> str:
    """Say how probable the targets are after the last layer, and at which layer they become so."""
    data = result.data
    log_rank = mean_interval(_inner_mean(xr.apply_ufunc(np.log1p, data["rank"])), method="bootstrap")
    odds = mean_interval(_inner_mean(data["probability"]), method="bootstrap")
    last = Estimate.of(odds.isel(layer=-1))
    what = "the target tokens have a mean probability"
    said = f"After the last layer {what} of {last.text()}, {_over(last.n)}."
    means = odds.sel(statistic="mean").values
    half = odds["layer"].values[means >= 0.5 * means[-1]]
    below = np.exp(log_rank.sel(statistic="mean").values) < 2
    top = data["layer"].values[np.logical_and.accumulate(below[::-1])[::-1]]
    said += f" Half of that is first reached after layer {half[0]}." if len(half) else ""
    return said + (f" Their geometric mean rank is below 2 from layer {top[0]} on." if len(top) else "")


def read_attribution(result: Result, metric: str | None) -> str:
    """Say which head, attention and MLP add most to the target's logit."""
    said = []
    for name, array in result.data.data_vars.items():
        if "head" not in array.dims and name not in ("attn", "mlp"):
            continue
        ci = mean_interval(array.mean([dim for dim in ("target", "position") if dim in array.dims]))
        site = _extreme(ci, 1)
        part = "head" if "head" in array.dims else metric_text(str(name)).label
        where = _where(site).removeprefix(" at ")
        said.append(f"the {part} that adds most is {where}, {Estimate.of(ci.sel(site)).text('logits')}")
    if not said:
        return ""
    note = " These are direct contributions: what a component does through later ones is not counted."
    return "Of what is written into the target's logit, " + "; ".join(said) + "." + note


def read_recall(result: Result, metric: str | None) -> str:
    """Say how much is recalled, and how that depends on the number of copies."""
    name = _chosen(result.metrics, metric)
    text, array = metric_text(name, result[name]), _inner_mean(result[name])
    found = _mean(array)
    said = f"The {text.label}, {_over(found.n)}, is {_spoken(found, text)}."
    if "copies" not in result.data.coords:
        return said
    copies = np.unique(result["copies"].values)
    if len(copies) < 2:
        return said
    method = mean_interval(array).attrs["interval_method"]
    few, most = (
        _spoken(_mean(array.isel(sequence=result["copies"].values == c), method), text)
        for c in (copies[0], copies[-1])
    )
    return f"{said} With {copies[0]} copies it is {few}, with {copies[-1]} copies {most}."


def read_pairs(result: Result, metric: str | None) -> str:
    """Say which two heads do most together beyond the sum of what each does alone."""
    base = next(n for n in result.metrics if f"{n}_baseline" in result.data)
    text = metric_text(base, result[base])
    array = _inner_mean(result["interaction"])
    once = np.triu(np.ones((array.sizes["head_a"],) * 2, bool), 1)  # the table is symmetric
    ci = mean_interval(array).where(xr.DataArray(once, dims=("head_a", "head_b")))
    site = _extreme(ci, 0)
    found = Estimate.of(ci.sel(site))
    pair = " and ".join(str(head) for head in site.values())
    n = int(once.sum())
    lead = f"{pair} interact" if n == 1 else f"Of {n} pairs, {pair} interact most"
    sense = ""
    if text.better and found.excludes(0):
        more = found.value * text.better < 0
        sense = ": together they harm " + ("more than" if more else "less than") + " the sum of both"
    return (
        f"{lead}: ablating both changes the {text.label} by "
        f"{_spoken(found, text)} beyond the sum of each alone{sense} ({_over(found.n)}).{_chance(ci)}"
    )


def read_cumulative(result: Result, metric: str | None) -> str:
    """Say how ablating more and more heads changes a metric, in the ranked order and in random orders."""
    name = _chosen(result.metrics, metric)
    text, array = metric_text(name, result[name]), _inner_mean(result[name])
    most = result["n_ablated"].values.max()
    ranked = array.sel(order="ranked", drop=True)
    others = array.sel(order=[order for order in array["order"].values if order != "ranked"])
    found = _mean(ranked.sel(n_ablated=most))
    said = f"With the {most} highest ranked heads ablated the {text.label} is {_spoken(found, text)}, "
    said += _over(found.n)
    if f"{name}_baseline" in result.data:
        base = _mean(result.baseline(name))
        said += f"; the unchanged model's is {_spoken(base, text)}"
    if others.sizes["order"]:
        control = others.mean("order").sel(n_ablated=most)
        theirs, gap = _mean(control), _mean(ranked.sel(n_ablated=most) - control)
        said += (
            f". With as many random heads (the mean of {others.sizes['order']} orders) it is "
            f"{_spoken(theirs, text)}; ranked minus random is {_spoken(gap, text)}"
        )
    said += "."
    if "heads_until_lost" in result.data:
        counts = result["heads_until_lost"].sel(order="ranked").values
        lost = counts[np.isfinite(counts)]
        recalled = int((result.baseline("exact_match") == 1).sum())
        said += f" In the ranked order {len(lost)} of {recalled} recalled sequences are lost"
        said += f", at a median of {median_estimate(lost).text('heads')}." if len(lost) else "."
    return said


def read_strengths(result: Result, metric: str | None) -> str:
    """Say what a metric is at the smallest and the largest strength, on the sequences that have both."""
    x = next(name for name in STRENGTHS if name in result.data.dims)
    choices = [name for name in with_dims(result, x) if "layer" not in result[name].dims]
    name = _chosen(choices, metric)
    text, array = metric_text(name, result[name]), _inner_mean(result[name])
    array = array.mean([dim for dim in array.dims if dim not in ("sequence", x)]).sortby(x)
    ends = array[x].values[[0, -1]].tolist()
    words = re.sub(r"(token|step)s\b", r"\1", STRENGTHS[x]) if ends[0] == 1 else STRENGTHS[x]
    start = f"{words} = {ends[0]:g}" if x == "alpha" else f"{ends[0]:g} {words}"
    low, high = (array.sel({x: end}, drop=True) for end in ends)
    both = low.notnull() & high.notnull()
    a, b, change = (_mean(part.where(both)) for part in (low, high, high - low))
    said = (
        f"With {start} the {text.label} is {_spoken(a, text)}, with {ends[1]:g} it is "
        f"{_spoken(b, text)}; each sequence changes by {_spoken(change, text)}, {_over(change.n)}."
    )
    missing = array.sizes["sequence"] - change.n
    if missing:
        have, are = ("sequence has", "is") if missing == 1 else ("sequences have", "are")
        said += f" {missing} further {have} no value at one of these ends and {are} left out."
    if f"{name}_baseline" in result.data:
        base = _mean(result.baseline(name))
        said += f" The unchanged model's is {_spoken(base, text)}."
    if change.known and not change.excludes(0):
        said += " The interval of the change includes 0: this may be no change at all."
    return said


def read_compression(result: Result, metric: str | None) -> str:
    """Say how few prompt tokens suffice, for the sequences that are recalled from the whole prefix."""
    data, method = result.data, str(result.settings.get("method", ""))
    recalled = data["recalled"].values == 1
    ratio = data["compression_ratio"].isel(sequence=recalled)
    if not ratio.notnull().any():
        return ""
    tokens = _mean(data["fewest_tokens"].isel(sequence=recalled), "bootstrap")
    share = _mean(ratio, "bootstrap")
    said = (
        f"{int(recalled.sum())} of {len(recalled)} sequences are recalled from their whole prefix. For these "
        f"the fewest tokens that are enough ({method.replace('_', ' ')}) are {tokens.text('tokens')}, a "
        f"share of {share.text()} of the prefix, {_over(share.n)}."
    )
    if "stable_compression_ratio" in data:
        mean = _mean(data["stable_compression_ratio"].isel(sequence=recalled), "bootstrap")
        said += f" From a share of {mean.text()} on, every longer prompt that was tried is enough, too."
    if "complete" in data and (open_ends := int((data["complete"] == 0).sum())):
        said += f" {open_ends} deletions stopped at their budget: their numbers are upper limits."
    elif result.settings.get("budget") is not None:
        said += " With a budget not every length was tried: shorter prompts may be enough."
    return said


def read_bounds(result: Result, metric: str | None) -> str:
    """Say whether measured changes lie within their bounds, and how loose; or where a metric is largest."""
    if metric is not None and metric not in ("slack", "measured", "limit"):
        return _largest(result, metric)
    slack = result["slack"]
    known, broken = int(slack.notnull().sum()), int((slack < 1 - 1e-4).sum())
    said = (
        f"All {known} measured changes lie within their bounds."
        if not broken
        else f"{broken} of {known} measured changes exceed their bounds: a bound does not hold there."
    )
    factor = xr.apply_ufunc(np.log, slack.where(slack > 0))
    inner = [dim for dim in factor.dims if dim not in ("sequence", "bound")]
    ci = xr.apply_ufunc(np.exp, mean_interval(factor.mean(inner)), keep_attrs=True)
    parts = [
        f"{bound} by a factor of {Estimate.of(ci.sel(bound=bound)).text()}" for bound in ci["bound"].values
    ]
    over = _over(slack.sizes["sequence"])
    return f"{said} On geometric average the bounds exceed the changes: {'; '.join(parts)}, {over}."


def read_training(result: Result, metric: str | None) -> str:
    """Say when sequences are first recalled, and which component of the first checkpoint lacks them most."""
    n, first = result.data.sizes["sequence"], result["first"].values
    ever, last = np.isfinite(first), int(result["last"].sum())
    steps = result["step"].values
    said = f"{int(ever.sum())} of {n} sequences are recalled at some step"
    if ever.any():
        when = median_estimate(first[ever])
        said += f", half of them by step {when.value:g}"
    said += f"; {last} are at the last one, step {steps[-1]}."
    for name, words in (("into_model", "lowers"), ("into_checkpoint", "raises")):
        effect = _inner_mean(result.effect(name)).isel(step=0, drop=True)
        ci = mean_interval(effect)
        site = _extreme(ci, -1 if name == "into_model" else 1)
        text = metric_text("target_logprob", result["target_logprob"])
        target = "the model" if name == "into_model" else "that checkpoint"
        source = f"step {steps[0]}" if name == "into_model" else "the model"
        said += (
            f" Taken from {source}, the component that {words} the {text.label} of {target} most is"
            f"{_where(site).replace(' at ', ' ')}: it changes by {_spoken(Estimate.of(ci.sel(site)), text)}."
        )
    return said


def read_depth(result: Result, metric: str | None) -> str:
    """Say how deep an edit goes, on how many sequences that is known, and which layers it leaves intact."""
    depth, n = _mean(result["depth"], "bootstrap"), result.data.sizes["sequence"]
    counted = result["erased"].notnull().any("layer")
    if not bool(counted.any()):
        return (
            f"In none of {n} sequences does a state of the retain model lack what the full model needs: the "
            "depth is not known."
        )
    said = (
        f"The edit's depth is {depth.text()}, {_over(depth.n)}: 0 is an edit that leaves every layer's state "
        "as good as before, 1 one whose states lack as much as the retain model's."
    )
    if int(counted.sum()) < n:
        left = n - int(counted.sum())
        said += f" {left} further sequence{' has' if left == 1 else 's have'} no layer that counts."
    means = result["erased"].mean("sequence")
    intact = [str(layer) for layer in means["layer"].values[means.values < 0.5]]
    most = named_layers(", ".join(intact))
    return said + (f" More than half is still there after {most}." if intact else "")


def read_predictor(result: Result, metric: str | None) -> str:
    """Say which layer the predictor, a guess from one pass without interventions, ranks first."""
    return _largest(result, metric or "predictor") + (
        " It is a guess from one run of the unchanged model, not a measured effect: compare it with a bypass."
    )


def _largest(result: Result, name: str) -> str:
    ci = mean_interval(_inner_mean(result[name]))
    site = _extreme(ci, 1)
    text, found = metric_text(name, result[name]), Estimate.of(ci.sel(site))
    return f"The {text.label} is largest{_where(site)}: {_spoken(found, text)}, {_over(found.n)}."


def read_frontier(result: Result, metric: str | None) -> str:
    """Say for each model which bypass removes recitation at the least cost in accuracy."""
    data, said = result.data, []
    scope = data["scope"].values[0]
    for model in dict.fromkeys(data["model"].values.tolist()):
        rows = [str(i).startswith(f"{model}/") for i in data["sequence"].values]
        part = data.isel(sequence=rows, site=data["model"].values == model).sel(scope=scope)
        base, able = (float(part[n].mean()) for n in ("exact_match_baseline", "accuracy_base"))
        if not (base > 0 and able > 0):
            said.append(f"{model}: nothing is recited or answered by the unchanged model.")
            continue
        exact = mean_interval(part["exact_match"])
        mean = exact.sel(statistic="mean").values
        best = int(np.nanargmax((base - mean) / base - (able - part["accuracy"].values) / able))
        n = Estimate.of(exact.isel(site=best))
        ends = (float(part[f"accuracy{end}"].values[best]) for end in ("", "_low", "_high"))
        cost = Estimate(*ends, n=FEWEST)
        bypassed = named_layers(str(part["label"].values[best]))
        said.append(
            f"{model}: with {bypassed} bypassed exact match goes from {base:.3g} to {n.text()} "
            f"({_over(n.n)}) and the accuracy on {scope} from {able:.3g} to {cost.text()}."
        )
    return " ".join(said) + (
        " Each bypass named removes the largest share of recitation beyond the share of accuracy that it "
        "costs; it was chosen on the same data, which overstates it."
    )


def read_tasks(result: Result, metric: str | None) -> str:
    """Say what each group of tasks scores without an intervention, and where it scores least."""
    tables = task_tables(result)
    rows = task_summary(result)
    rows = rows.loc[(rows["scope"] == "group") & (rows["measure"] == "accuracy")]
    sites, said = [str(dim) for dim in result["accuracy"].dims if dim != "sequence"], []
    for group, own in rows.groupby("name", sort=False):
        members = [table for table in tables.values() if table.group == group]
        chance = np.mean([table.chance for table in members])
        least = own.loc[own["mean"].idxmin()]
        found = Estimate.from_row(least, "mean", n="questions")
        text = found.text(units="questions")
        if sites:
            base = np.mean([table.tables["base"][:, 0].mean() for table in members])
            where = _where({dim: least[dim] for dim in sites})
            text = f"{base:.3g} without an intervention, and least{where}: {text}"
        count = f"{len(members)} task" + ("s" if len(members) > 1 else "")
        said.append(f"{group} ({count}, {found.n} questions, chance {chance:.3g}): {text}")
    note = (
        " The least of several sites is understated." if sites and len(rows) > rows["name"].nunique() else ""
    )
    return "Accuracy, mean over tasks. " + ". ".join(said) + "." + note


def read_frequency(result: Result, metric: str | None) -> str:
    """Say how frequent the tokens of prefix and continuation are in the corpus."""
    array = result["per_million"]
    parts = array.where(array["offset"] < 0), array.where(array["offset"] >= 0)
    before, after = (part.median("offset") for part in parts)
    numbers = [_mean(part, "bootstrap") for part in (before, after, after - before)]
    return (
        f"The median token of a prefix occurs {numbers[0].text()} times per million, that of a continuation "
        f"{numbers[1].text()} times; the difference is {numbers[2].text()}, {_over(numbers[2].n)}."
    )


def _inner_mean(array: xr.DataArray) -> xr.DataArray:
    return array.astype(float).mean([dim for dim in _INNER if dim in array.dims], keep_attrs=True)


def _mean(array: xr.DataArray, method: str = "auto") -> Estimate:
    return Estimate.of(mean_interval(_inner_mean(array), method=method))


def _chosen(metrics: Sequence[str], asked: str | None) -> str:
    return asked or ("exact_match" if "exact_match" in metrics else metrics[0])


def _groups(result: Result) -> Mapping[str, np.ndarray]:
    """Return the rows of each group that `join_groups` joined."""
    if "group" not in result.data.coords:
        return {}
    labels = result["group"].values.astype(str)
    return {str(name): np.flatnonzero(labels == name) for name in dict.fromkeys(labels.tolist())}


def _spoken(found: Estimate, text: MetricText) -> str:
    return found.text(text.unit if "=" not in text.unit and "share" not in text.unit else "")


def _over(n: int) -> str:
    return "in one sequence" if n == 1 else f"mean over {n} sequences"


def _extreme(ci: xr.DataArray, sign: int) -> dict[Hashable, Any]:
    """Return the site of the largest mean (of the smallest with sign -1, of the largest size with 0)."""
    means = ci.sel(statistic="mean")
    ordered = abs(means) if sign == 0 else means * sign
    if not bool(ordered.notnull().any()):
        raise ValueError("no site has a value")
    place = np.unravel_index(int(np.nanargmax(ordered.values)), ordered.shape)
    return {dim: means[dim].values[i] for dim, i in zip(means.dims, place, strict=True)}


def _where(site: Mapping[Any, Any]) -> str:
    places = [f"{str(dim).replace('_', ' ')} {value}" for dim, value in site.items()]
    return f" at {', '.join(places)}" if places else ""


def _chance(ci: xr.DataArray, *, can_fall: bool = True) -> str:
    """Count the intervals that exclude 0; where no value can be below 0, the first above it does that."""
    low, high = ci.sel(statistic="low"), ci.sel(statistic="high")
    sites = int((low.notnull() & high.notnull()).sum())
    if sites < 2:
        return ""
    if not can_fall:
        return f" The site named is the most extreme of {sites}, which overstates it."
    away, expected = int(((low > 0) | (high < 0)).sum()), round(0.05 * sites)
    by_chance = f"about {expected}" if expected else "hardly any"
    return (
        f" The interval excludes 0 at {away} of {sites} sites; {by_chance} would by chance if nothing "
        "mattered. The site named is the most extreme of them, which overstates it."
    )
