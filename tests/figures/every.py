"""A figure of every kind, each with what makes it crowded: long names, many places, several decades."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from memlens import figures
from memlens.results.result import Result
from memlens.studies.comparative.analyze.profiles import cluster
from tests.report import synthetic

_MODELS = [f"EleutherAI/pythia-{size}-deduped" for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b")]
_FAMILIES = ["pythia", "olmo2", "starcoder2", "openllama", "gptneo"]
_STATISTICS = ["mean", "low", "high"]


def _ci(rng: np.random.Generator, dims: dict[str, np.ndarray], scale: float = 1.0) -> xr.DataArray:
    shape = [len(places) for places in dims.values()]
    mean = scale * rng.normal(0, 1, shape)
    values = np.stack([mean, mean - 0.2 * scale, mean + 0.2 * scale])
    return xr.DataArray(values, {"statistic": _STATISTICS, **dims}, ("statistic", *dims))


def _models(rng: np.random.Generator) -> pd.DataFrame:
    rows = [
        {"model": f"{name} ({family})", "family": family, "n_params": 7e7 * 3.0**place, "part": part}
        for family in _FAMILIES
        for place, name in enumerate(_MODELS[:3])
        for part in ("memorized", "matched control")
    ]
    frame = pd.DataFrame(rows)
    frame["rate"] = frame["mean"] = rng.random(len(frame))
    frame["share"] = 0.5
    return frame.assign(
        low=frame["mean"] - 0.1,
        high=frame["mean"] + 0.1,
        chance=0.3,
        copies=4.0 ** (np.arange(len(frame)) % 6),
    )


def _ragged() -> Result:
    result = synthetic.residual_decoding()
    for name in ("probability", "rank", "entropy", "kl_to_final", "token"):
        array = result.data[name].astype(object if name == "token" else float)
        array[3, ..., 9:] = np.nan
        result.data[name] = array
    return result


def _patched() -> Result:
    result = synthetic.activation_patching()
    after = result.data.assign_coords(position=result.data["position"] + 20)
    data = xr.concat([result.data, after], "position", data_vars="minimal")
    data = data.assign({name: result.data[name] for name in data if "position" not in result.data[name].dims})
    token = data["token"].astype(object)
    token[3, 33:] = np.nan
    for name in ("target_logprob", "normalized_effect"):
        data[name][3, :, 33:] = np.nan
    return Result(
        data.assign(token=token, prefix_len=("sequence", [24] * synthetic.N)).assign_attrs(result.data.attrs)
    )


def every() -> dict[str, list[go.Figure]]:
    """Return figures by the name of the function of `memlens.figures` that draws them."""
    rng = np.random.default_rng(0)
    layers, heads = np.arange(32), np.arange(16)
    long = {"title": "Everything that a long title says about a figure and about the model behind it",
            "subtitle": "mean change (with − without the intervention) over 48 sequences, 95 % interval · "
                        "red = recall harmed · EleutherAI/pythia-1.4b-deduped"}  # fmt: skip
    models = _models(rng)
    groups = ["memorized", "matched control", "untrained twin", "all that is not recalled"]
    rank = np.exp(np.abs(_ci(rng, {"group": np.array(groups), "layer": layers}, 3.0)))
    decades = {name: np.exp(scale * np.abs(_ci(rng, {"layer": layers}))) for name, scale in
               (("one", 1.0), ("two", 2.0), ("three", 3.0), ("many", 6.0))}  # fmt: skip
    decoded = [xr.Dataset({"probability": 1 / values, "rank": values}) for values in decades.values()]
    ablation = synthetic.head_ablation(32, 16)
    few = synthetic.logit_attribution().data.isel(layer=slice(4), head=slice(5))
    few["heads"] = few["heads"] * (1.07 / abs(few["heads"].mean("sequence")).max())
    places = {
        "group": np.array(groups[:2]),
        "layer": layers[:4],
        "position": np.linspace(30, 62, 8).astype(int),
    }
    sparse = xr.Dataset({"target_logprob": _ci(rng, places)})
    sides = ablation.mean_ci(of="effect", n_resamples=20)
    three = sides.expand_dims(group=groups[:3]).transpose("statistic", "group", ...)
    many = sides.expand_dims(copies=[0, 1, 4, 16, 64]).transpose("statistic", "copies", ...)
    lines = synthetic.attention_bypass()
    names = [f"L{layer}H{head}" for layer in range(4) for head in range(8)]
    paths = xr.Dataset(
        {"restored_share": _ci(rng, {"sender": np.array(names), "receiver": np.array(names[:9])})}
    )
    tokens = figures.unique_tokens([f" token{place}" for place in range(48)])
    lens = xr.Dataset(
        {name: (("layer", "target"), rng.random((32, 48))) for name in ("probability", "rank")},
        {"layer": layers},
    )
    branches = xr.Dataset(
        {name: ("layer", rng.normal(0, 1, 32)) for name in ("mlp", "bypass")}, {"layer": layers}
    )
    effects = xr.DataArray(rng.normal(0, 1, (32, 16)), {"layer": layers, "head": heads}, ("layer", "head"))
    attention = xr.DataArray(rng.random((48, 48)), dims=("query", "key"))
    sites = xr.Dataset(
        {name: _ci(rng, {"site": np.arange(12)}) for name in ("estimate", "exact")},
        {"label": ("site", names[:12]), "chosen": ("site", ["largest estimates", "random others"] * 6)},
    )
    frontier = xr.Dataset(
        {name: (("scope", "site"), rng.random((2, 12))) for name in
         ("accuracy", "accuracy_low", "accuracy_high", "accuracy_base")},
        {"scope": ["all tasks", "knowledge"], "model": ("site", [_MODELS[0], _MODELS[1]] * 6),
         "label": ("site", [str(i) for i in range(12)]), "depth": ("site", np.linspace(0, 1, 12)),
         "size": ("site", np.ones(12))},
    )  # fmt: skip
    exact = xr.DataArray(rng.random((3, 12)), {"statistic": _STATISTICS}, ("statistic", "site"))
    similarity = np.corrcoef(rng.normal(0, 1, (6, 20)))
    merges, order = cluster(similarity)
    return {
        "heatmap_layer_head": [
            ablation.plot(),
            figures.heatmap_layer_head(three, **long),
            figures.heatmap_layer_head(many, **long),
        ],
        "heatmap_layer_position": [
            _patched().plot(),
            _patched().plot(sequence="seq-003"),
            _ragged().plot(sequence="seq-003"),
            figures.heatmap_layer_position(sparse),
        ],
        "heatmap_paths": [figures.heatmap_paths(paths, **long)],
        "heatmap_lens": [figures.heatmap_lens(lens, tokens)],
        "heatmap_effects": [
            figures.heatmap_effects(effects, branches, metric="target_logprob", chosen=(3, 2))
        ],
        "heatmap_attention": [figures.heatmap_attention(attention, tokens, boundary=24)],
        "line_over_layers": [
            lines.plot(),
            lines.plot("target_logprob", group="domain"),
            lines.plot(group="copies"),
            figures.line_over_layers(xr.Dataset({"relative_drop_chance_corrected": rank}), **long),
        ],
        "decoding_panels": [
            figures.decoding_panels(xr.Dataset({"probability": 1 / rank, "rank": rank}), **long),
            *map(figures.decoding_panels, decoded),
        ],
        "dots_with_intervals": [
            synthetic.sweep().plot(),
            synthetic.sweep().plot("exact_match", group="domain"),
        ],
        "attribution_panels": [synthetic.logit_attribution().plot(), Result(few).plot()],
        "recall_panels": [synthetic.recall().plot(), synthetic.recall().plot(group="domain")],
        "scatter_agreement": [figures.scatter_agreement(sites, metric="target_logprob", **long)],
        "frontier_panels": [
            figures.frontier_panels(frontier, exact, dict.fromkeys(_MODELS[:2], 0.9), **long)
        ],
        "sizes": [figures.sizes(models[models["part"] == "memorized"], **long)],
        "curves_by_family": [
            figures.curves_by_family(
                models,
                "copies",
                dash="part",
                log_x=True,
                x_title="copies in the training corpus",
                y_title="share of the sequences recalled exactly",
                **long,
            ),
            figures.curves_by_family(models[models["family"] == "pythia"], "copies", log_x=True, **long),
        ],
        "shares_by_model": [
            figures.shares_by_model(models, "part", **long),
            figures.shares_by_model(models[:2], "part", **long),
        ],
        "model_dots": [
            figures.model_dots(
                models.assign(kind=models["part"]), reference="chance", x_title="share", **long
            ),
            figures.model_dots(models[:1], x_title="memorization score M (share of tokens)"),
        ],
        "similarity_map": [figures.similarity_map(similarity, _MODELS, merges, order, **long)],
    }
