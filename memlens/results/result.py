"""`Result`: the labeled array that every analysis returns."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from memlens.errors import OptionError, ResultError, check_option, near_matches
from memlens.files import exact_json, parsed_exact
from memlens.results.statistics.intervals import by_group, interval_method, mean_intervals

if TYPE_CHECKING:
    import plotly.graph_objects as go


_REFERENCES = ("_baseline", "_corrupt")
COMPANIONS = (*_REFERENCES, "_clean")
"""Ends of the names of what a result holds beside a metric: its values in other runs."""


_MOST_LABELS = 12


def _listed(labels: list[Any]) -> str:
    """Return labels for an error: a range of numbers, or the first few.

    >>> _listed([0, 1, 2, 3]), _listed(["mean", "low"])
    ('0 to 3', "'mean' or 'low'")
    """
    if len(labels) > 2 and labels == list(range(len(labels))):
        return f"0 to {labels[-1]}"
    shown = list(map(repr, labels[:_MOST_LABELS]))
    if len(labels) > _MOST_LABELS:
        return f"{', '.join(shown)} or one of {len(labels) - _MOST_LABELS} more"
    return " or ".join(part for part in (", ".join(shown[:-1]), *shown[-1:]) if part)


@dataclass(frozen=True, eq=False)
class Result:
    """A labeled array: one value per sequence and site, with a record of how it was made.

    Attributes:
        data: Variables named by metric, with dimensions among `sequence, layer, head, neuron, position,
            target, stream, intervention`. The coordinate `sequence` holds the ids; other coordinates along
            `sequence` (`domain`, `copies`, …) can be used as groups. `data.attrs` holds `kind`, the facts of
            the model, `seed`, `created`, and `settings` (a JSON string of every parameter). Where the model
            was changed, `<metric>_baseline` accompanies `<metric>`.

    Raises:
        ResultError: When `data` has no `sequence` dimension, no variable, or no `kind`.

    Example:
        >>> data = xr.Dataset({"exact_match": ("sequence", [1.0, 0.0, 1.0])}, {"sequence": ["a", "b", "c"]})
        >>> result = Result.create(data, kind="recall", settings={"threshold": 1.0}, seed=0)
        >>> result.metrics, result.settings
        (['exact_match'], {'threshold': 1.0})
        >>> float(result["exact_match"].mean().round(2))
        0.67
    """

    data: xr.Dataset

    def __post_init__(self) -> None:
        kind = self.data.attrs.get("kind")
        if not isinstance(kind, str) or not kind:
            raise ResultError(f"data.attrs['kind'] is {kind!r}: name the analysis, such as 'head_ablation'.")
        if not self.data.data_vars:
            raise ResultError(f"a {kind} result needs at least one variable: the dataset has none.")
        if "sequence" not in self.data.dims:
            raise ResultError(f"a {kind} result needs the dimension 'sequence', not {tuple(self.data.dims)}.")

    @classmethod
    def create(
        cls,
        data: xr.Dataset,
        *,
        kind: str,
        settings: Mapping[str, Any] | None = None,
        **facts: str | int | float | bool | None,
    ) -> Result:
        """Return a result from arrays, with its attributes in the standard form.

        Args:
            data: The arrays; not modified.
            kind: Name of the kind, such as "head_ablation".
            settings: Every parameter, as JSON types; stored as the attribute `settings`.
            facts: Facts of the model (`memlens.models.provenance.describe`), `seed` and the like.
        """
        fixed = {
            "kind": kind,
            "memlens": metadata.version("memlens"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": exact_json(dict(settings or {})),
        }
        return cls(data.assign_attrs({**fixed, **facts}))

    @property
    def kind(self) -> str:
        """The name of the analysis, such as `head_ablation`."""
        return self.data.attrs["kind"]

    @property
    def settings(self) -> dict[str, Any]:
        """Every parameter of the analysis."""
        return parsed_exact(self.data.attrs.get("settings", "{}"))

    @property
    def metrics(self) -> list[str]:
        """Names of the numeric variables, without their baselines."""
        names = [str(name) for name, array in self.data.data_vars.items() if array.dtype.kind in "biuf"]
        return [name for name in names if not self._is_companion(name)]

    def _is_companion(self, name: str) -> bool:
        return any(name.endswith(tail) and name.removesuffix(tail) in self.data for tail in COMPANIONS)

    def __getitem__(self, name: str) -> xr.DataArray:
        """Return one variable or coordinate by name."""
        if name not in self.data.variables:
            known = [str(key) for key in self.data.variables]
            rest = [key for key in known if key not in self.metrics]
            raise ResultError(
                f"this {self.kind} result has no {name!r}: its metrics are {', '.join(self.metrics)}, and it "
                f"has {', '.join(rest[:8])}{', …' if len(rest) > 8 else ''}.{near_matches(name, known)}"
            )
        return self.data[name]

    if not TYPE_CHECKING:  # a type checker should still find misspelled names

        def __getattr__(self, name: str) -> xr.DataArray:
            """Return a variable or coordinate, as xarray does: `result.exact_match`, `result.layer`."""
            # Before `data` is there (as in copying) nothing else may be asked for.
            if not name.startswith("__") and name != "data" and name in self.data.variables:
                return self.data[name]
            raise AttributeError(f"a Result has no {name!r}; its arrays are in `data`, an xarray.Dataset")

    def __dir__(self) -> list[str]:
        names = (str(name) for name in self.data.variables)
        return [*super().__dir__(), *(name for name in names if name.isidentifier())]

    def sel(self, **labels: Any) -> Result:
        """Return the part at some labels, as `xarray.Dataset.sel` does: `result.sel(layer=[0, 1])`.

        One label removes its dimension, except for `sequence`, of which one is kept as a list of one.

        Raises:
            ResultError: There is no such dimension or label.

        Example:
            >>> data = xr.Dataset({"m": (("sequence", "layer"), [[1, 2], [3, 4]])}, {"sequence": ["a", "b"]})
            >>> result = Result.create(data, kind="sweep")
            >>> result.sel(sequence="b").isel(layer=0).m.values.tolist()
            [3]
        """
        return self._part("sel", labels)

    def isel(self, **numbers: Any) -> Result:
        """Return the part at some places, as `xarray.Dataset.isel` does: `result.isel(sequence=slice(10))`.

        Raises:
            ResultError: There is no such dimension or place.
        """
        return self._part("isel", numbers)

    def _part(self, how: str, at: Mapping[str, Any]) -> Result:
        if "sequence" in at and np.ndim(at["sequence"]) == 0 and not isinstance(at["sequence"], slice):
            at = {**at, "sequence": [at["sequence"]]}
        try:
            return Result(getattr(self.data, how)(**at))
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ResultError(f"this {self.kind} result has no {self._missing(how, at)}") from error

    def _missing(self, how: str, at: Mapping[str, Any]) -> str:
        """What a selection asks for and the result has not, and what there is instead."""
        dims = [str(dim) for dim in self.data.dims]
        for name, wanted in at.items():
            if name not in dims and (how == "isel" or name not in self.data.coords):
                return f"dimension {name!r}: it has {', '.join(dims)}.{near_matches(name, dims)}"
            try:
                getattr(self.data, how)({name: wanted})
            except (KeyError, IndexError, ValueError, TypeError):
                labels = list(dict.fromkeys(self.data[name].values.tolist()))
                if how == "isel":
                    return f"{name} at place {wanted!r}: its places are 0 to {len(labels) - 1}."
                asked = wanted if isinstance(wanted, list | tuple | np.ndarray) else [wanted]
                missing = next((label for label in asked if label not in labels), wanted)
                hint = near_matches(missing, map(str, labels)) if isinstance(missing, str) else ""
                return f"{name} {missing!r}: {name} is {_listed(labels)}.{hint}"
        return f"{dict(at)}: its dimensions are {', '.join(dims)}."

    def baseline(self, metric: str) -> xr.DataArray:
        """Return the values without the intervention (for patching: those of the corrupt run)."""
        for tail in _REFERENCES:
            if metric + tail in self.data:
                return self.data[metric + tail]
        raise ResultError(f"{metric!r} of this {self.kind} result has no baseline: an effect needs one.")

    def effect(self, metric: str) -> xr.DataArray:
        """Return intervened minus baseline, each sequence against itself, in the metric's unit.

        For `target_logprob` and `exact_match` a negative effect means that recall was harmed; for
        `target_rank` and `completion_entropy` a positive one does. For activation patching the baseline is
        the corrupt run, so that a positive effect means that recall was restored.

        Raises:
            ResultError: When the result has no such metric, or no baseline of it.
        """
        difference = self[metric].astype(float) - self.baseline(metric).astype(float)
        attrs = {**self[metric].attrs, "of": "effect"}
        return difference.transpose(*self[metric].dims, ...).rename(metric).assign_attrs(attrs)

    def to_frame(self, columns: Iterable[str] | Literal["all"] | None = None) -> pd.DataFrame:
        """Return a tidy table: one row per combination of the dimensions' labels.

        Args:
            columns: Which variables and coordinates follow the dimensions; by default what is known of sites
                (such as a neuron's number), the metrics and their baselines; "all" for what is known of
                sequences too.

        Raises:
            ResultError: There is no such variable or coordinate.

        Example:
            >>> import memlens as ml
            >>> model = ml.load_model("zoo/pythia-s")
            >>> result = ml.ablate_heads(model, ml.load_sequences("zoo", model)[:2], progress=False)
            >>> result.to_frame(["target_logprob", "copies"]).columns.tolist()
            ['sequence', 'layer', 'head', 'target_logprob', 'copies']
        """
        if columns == "all":
            return self.data.to_dataframe().reset_index()
        if columns is None:
            of_sites = (n for n, c in self.data.coords.items() if c.dims not in ((), ("sequence",)))
            chosen = [str(name) for name in (*of_sites, *self.data.data_vars)]
        else:
            chosen = list(dict.fromkeys([columns] if isinstance(columns, str) else columns))
        used = {dim for name in chosen for dim in self[name].dims}
        dims = [str(dim) for dim in self.data.sizes if dim in used]
        kept = self.data.drop_vars(set(self.data.variables) - {*chosen, *dims})
        frame = kept.reset_coords([n for n in chosen if n in kept.coords and n not in dims]).to_dataframe()
        return frame.reset_index().filter(list(dict.fromkeys([*dims, *chosen])))

    def to_pandas(self, metric: str | None = None) -> pd.Series | pd.DataFrame:
        """Return one metric as a table with the dimensions as its axes, as `xarray.DataArray.to_pandas` does.

        Args:
            metric: By default the first.

        Returns:
            A series for one dimension, a table of sequences by sites for two.

        Raises:
            ResultError: There is no such metric, or it has more than two dimensions: select with `sel`,
                average, or take `to_frame`.

        Example:
            >>> data = xr.Dataset({"m": (("sequence", "layer"), [[1, 2], [3, 4]])}, {"sequence": ["a", "b"]})
            >>> Result.create(data, kind="sweep").to_pandas().loc["b"].tolist()
            [3, 4]
        """
        array = self[metric or self.metrics[0]]
        if array.ndim > 2:
            raise ResultError(
                f"{array.name!r} has the dimensions {', '.join(map(str, array.dims))}: select with sel, "
                "average over one (result[metric].mean(dim)), or take to_frame()."
            )
        return array.to_pandas()  # pyright: ignore[reportReturnType]  # of 0 dimensions only

    def compare_groups(
        self, metric: str, group: str, values: tuple[Any, Any] | None = None, **options: Any
    ) -> xr.Dataset:
        """Compare two groups of this result's sequences: `memlens.compare_groups` of the two parts.

        Args:
            metric: A variable.
            group: A coordinate along `sequence`, such as `domain`.
            values: The two values to compare, the first less the second; needed if there are more than two.
                By default the two that there are, the larger first (True less False).
            options: See `memlens.compare_groups`.

        Raises:
            ResultError: No such coordinate or value, not two values, or a group of fewer than two sequences.

        Example:
            >>> data = xr.Dataset(
            ...     {"m": ("sequence", [5.0, 6.0, 1.0, 2.0])},
            ...     {"recalled": ("sequence", [True, True, False, False])},
            ... )
            >>> float(Result.create(data, kind="recall").compare_groups("m", "recalled")["difference"])
            4.0
        """
        from memlens.results.statistics.comparison import compare_groups

        labels = self[group]
        if labels.dims != ("sequence",):
            raise ResultError(f"{group!r} is no coordinate along 'sequence': groups are of sequences.")
        known = sorted(pd.unique(labels.to_series().dropna()), reverse=True)
        if values is None and len(known) != 2:
            raise ResultError(f"{group!r} has {len(known)} values ({known}): name two of them in values.")
        first, second = (self.isel(sequence=labels.values == value) for value in values or known)
        return compare_groups(first, second, metric, **options)

    def mean_ci(
        self,
        dim: str | Iterable[str] = "sequence",
        *,
        metric: str | Iterable[str] | None = None,
        of: str = "value",
        group: str | None = None,
        level: float = 0.95,
        method: str = "auto",
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> xr.Dataset:
        """Return means with confidence intervals over sequences.

        Args:
            dim: `"sequence"`, or several dimensions with it: the others (say `target`) are averaged inside
                each sequence first, because only sequences are independent.
            metric: One name or several; all metrics by default.
            of: `"value"`, or `"effect"` for the paired difference to the baseline.
            group: A coordinate along `sequence`; means are then taken within each group, along a
                dimension of that name.
            level: Coverage of the interval.
            method: See `memlens.results.mean_interval`.
            n_resamples: Resamples of the bootstrap.
            seed: Seed of the bootstrap.

        Returns:
            A dataset with a dimension `statistic` (`mean`, `low`, `high`) and, for each metric, a coordinate
            `n_<metric>` that counts the sequences behind each mean.

        Raises:
            OptionError: For an unknown option, or when `dim` lacks `sequence`.
            ResultError: For an unknown metric, or effects without a baseline.

        Example:
            >>> data = xr.Dataset(
            ...     {"m": (("sequence", "layer"), [[0, -1], [0, -3]]), "m_baseline": ("sequence", [0, -1])}
            ... )
            >>> found = Result.create(data, kind="sweep").mean_ci(of="effect")
            >>> found["m"].sel(statistic="mean").values.tolist()
            [0.5, -1.5]
        """
        check_option("of", of, ("value", "effect"))
        dims = [dim] if isinstance(dim, str) else list(dim)
        if "sequence" not in dims:
            raise OptionError(f"dim={dim!r} lacks 'sequence': intervals are over sequences, not over sites.")
        options = {"level": level, "n_resamples": n_resamples, "seed": seed}
        arrays: dict[str, xr.DataArray] = {}
        for name in self._chosen(metric, of):
            array = self.effect(name) if of == "effect" else self[name]
            inner = [extra for extra in dims if extra != "sequence" and extra in array.dims]
            arrays[name] = array.mean(inner, keep_attrs=True) if inner else array

        def intervals(rows: Any = slice(None)) -> list[xr.DataArray]:
            chosen = [array.isel(sequence=rows, missing_dims="ignore") for array in arrays.values()]
            return mean_intervals(chosen, methods=methods, **options)

        # One method for all groups, or their bands could not be compared.
        methods = [interval_method(array.data, method) for array in arrays.values()]
        found = intervals() if group is None else by_group(self[group], intervals)
        means = {name: own.rename(n=f"n_{name}") for name, own in zip(arrays, found, strict=True)}
        attrs = {**self.data.attrs, "of": of, "level": level, "n_sequences": self.data.sizes["sequence"]}
        return xr.Dataset(means, attrs=attrs)

    def _chosen(self, metric: str | Iterable[str] | None, of: str) -> list[str]:
        if metric is not None:
            return [metric] if isinstance(metric, str) else list(metric)
        if of == "value":
            return [name for name in self.metrics if "sequence" in self.data[name].dims]
        names = [name for name in self.metrics if any(name + tail in self.data for tail in _REFERENCES)]
        if not names:
            raise ResultError(f"no metric of this {self.kind} result has a baseline: an effect needs one.")
        return names

    def plot(self, metric: str | None = None, **options: Any) -> go.Figure:
        """Return the figure of this kind of result; it is not shown.

        Options are the fields of `memlens.results.plots.selection.Selection`.
        """
        from memlens.results.kinds import plot_result

        return plot_result(self, metric, **options)

    def save(self, path: str | Path) -> Path:
        """Write a netCDF file atomically; `memlens.load_result` reads it back exactly.

        Args:
            path: The file, `.nc`.

        Raises:
            OptionError: The suffix is that of a table: `to_frame` and `to_parquet` make one.
            WriteError: The file cannot be written, such as on a full disk; the result stays usable.
        """
        from memlens.results.storage import save_dataset

        if (suffix := Path(path).suffix.lower()) in (".csv", ".jsonl", ".json", ".parquet", ".xlsx"):
            table = "to_parquet(path)" if suffix == ".parquet" else "to_frame() or to_frame('all')"
            raise OptionError(
                f"{path} ends in {suffix!r}, and save writes netCDF: give a name in .nc, or make a table "
                f"with {table}."
            )
        return save_dataset(self.data, path)

    def to_parquet(self, path: str | Path) -> Path:
        """Write `to_frame("all")` to a parquet file atomically, with the settings in the frame's `attrs`.

        It is written in row groups of some sequences each, so that a result may be larger than memory.

        This is for other programs: `memlens.load_result` reads only what `save` wrote.

        Example:
            >>> import memlens as ml, pandas as pd, tempfile
            >>> model = ml.load_model("zoo/pythia-s")
            >>> result = ml.decode_residual(model, ml.load_sequences("zoo", model)[:2], progress=False)
            >>> table = pd.read_parquet(result.to_parquet(f"{tempfile.mkdtemp()}/decoding.parquet"))
            >>> table.attrs["kind"], len(table)
            ('residual_decoding', 384)
        """
        from memlens.results.storage import save_table

        return save_table(self, path)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.data.sizes.items())
        model = self.data.attrs.get("model", "unknown model")
        return f"<Result {self.kind} of {model}: {', '.join(self.metrics)} ({sizes})>"

    def _repr_html_(self) -> str:
        rows = {
            "kind": self.kind,
            "model": self.data.attrs.get("model", "unknown"),
            "metrics": ", ".join(self.metrics),
            "dimensions": " × ".join(f"{name} {size}" for name, size in self.data.sizes.items()),
            **{f"setting: {key}": value for key, value in self.settings.items()},
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(str(key))}</th>"
            f"<td style='text-align:left'>{html.escape(str(value))}</td></tr>"
            for key, value in rows.items()
        )
        return f"<h4>memlens result</h4><table>{cells}</table>{self.data._repr_html_()}"
