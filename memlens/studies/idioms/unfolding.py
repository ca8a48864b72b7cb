"""How one prediction unfolds over layers: of recalled items, of others, and of natural text.

A set of items with one target each goes through split, decoding, phases, matched comparison and knock-outs;
idioms and facts are such sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from memlens.benchmark.recommend import DOMINANT, ranked_by
from memlens.files import exact_json
from memlens.forward.hooks import has_site
from memlens.instruments.ablate.neurons import knock_out_neurons
from memlens.instruments.decode.decoding import decode_residual
from memlens.instruments.decode.lens import TunedLens
from memlens.instruments.decode.promotion import promotion_summary
from memlens.models.provenance import describe
from memlens.recall.matching import Pairs, match_pairs
from memlens.recall.score import score_recall
from memlens.recall.scores import RecallScores
from memlens.report.model import FigureRequest
from memlens.results.groups import join_groups
from memlens.results.kinds import reading
from memlens.results.result import Result
from memlens.results.statistics.comparison import corrected
from memlens.sequences.natural import natural_controls
from memlens.sequences.set import SequenceSet
from memlens.studies.idioms import findings as find
from memlens.studies.idioms.options import IdiomOptions
from memlens.studies.running import StudyDirectory, at_most

RECALLED, MISSED, NATURAL = find.RECALLED, find.MISSED, "natural text"
_TOKENS: tuple[Literal["predicted", "target"], ...] = ("predicted", "target")


@dataclass(eq=False)
class IdiomContext:
    """What all parts of the study share.

    Attributes:
        model: A TransformerLens model.
        folder: Where results go.
        options: See `IdiomOptions`.
        text: Running natural text, or None.
        lens: A tuned lens, or None.
        references: What the recall criteria ask.
        progress: Show progress bars.
    """

    model: Any
    folder: StudyDirectory
    options: IdiomOptions
    text: SequenceSet | None
    lens: TunedLens | None
    references: Sequence[Any]
    progress: bool

    def table(self, name: str, key: str, frame: pd.DataFrame, *, words: str = "", **values: Any) -> None:
        """Save a table about the items called `name`, with its words from `texts.yaml`: those of `key`.

        `words` is another key for them, and `values` is what they name, such as the lens.
        """
        entry = find.TEXTS["tables"][words or key]
        text = {part: entry[part].format(Name=name.capitalize(), **values) for part in entry}
        text["section"] = f"{name}_{text['section']}"
        self.folder.add_table(f"{name}_{key}", frame, **text)


class Unfolding:
    """The parts of the study that idioms and facts share.

    Args:
        study: What all parts share; its `model`, `folder` and `options` are attributes here too.
        name: Of the items in file names, such as "idioms".
        items: One target token each.
    """

    study: IdiomContext
    model: Any
    folder: StudyDirectory
    options: IdiomOptions
    name: str
    items: SequenceSet
    natural: SequenceSet | None

    def __init__(self, study: IdiomContext, name: str, items: SequenceSet) -> None:
        self.study, self.model, self.folder, self.options = study, study.model, study.folder, study.options
        self.name, self.items = name, items.first_targets()
        self.natural = self._natural_text()
        self.recall: RecallScores | None = None
        self.groups: dict[str, SequenceSet] = {}
        self.decoded: dict[str, Result] = {}
        self.matched: dict[str, Pairs] = {}

    def run(self) -> None:
        """Run all parts; one that fails does not stop those that do not depend on it."""
        self.split()
        if RECALLED not in self.groups:
            return
        for part, work in (
            ("decoding", self.decode),
            ("tuned lens", self.decode_tuned),
            ("matched comparison", self.compare),
            ("knock-outs", self.knock_outs),
        ):
            self.folder.step(f"{self.name}: {part}", work)

    def split(self) -> None:
        """Part 1: score the items; recalled are those whose target the model predicts."""
        self.recall = score_recall(
            self.model, self.items, generate=False, metrics=("likelihood",), progress=self.study.progress
        )
        hits = self.recall.table["exact_match"].to_numpy(bool)
        scored = self.items.with_table(self.recall.table)
        for name, part in ((RECALLED, scored[hits]), (MISSED, scored[~hits]), (NATURAL, self.natural)):
            if part is not None and len(part):
                self.groups[name] = part
        self.recall.save(self.folder.path / f"{self.name}_recall.parquet")
        self._show("recall", self.recall.to_result(), "recalled")
        self._table("subsets", find.recall_by_subset(self.recall.table))
        self.folder.find(find.recalled(self.name, self.recall.table))

    def decode(self) -> None:
        """Part 2: decode every group after each layer, attention and MLP; part 3: the phases."""
        streams = [s for s in self.options.streams if has_site(self.model, s)]
        streams.sort(key=lambda stream: stream != "resid_post")  # the phases are read from the first
        self.decoded = self._decoded(streams)
        joined = join_groups(self.decoded)
        figures = [
            FigureRequest(
                {"group": "group", "token": "predicted", "stream": stream, "title": title},
                reading=find.decoded_in_words(self.decoded, stream),
            )
            for stream, title in find.TEXTS["streams"].items()
            if stream in streams
        ]
        for metric, words in find.TEXTS["decoded"].items():
            figures.append(
                FigureRequest(
                    {"group": "group", "metric": metric, "title": words["title"]},
                    reading=find.last_layers_in_words(self.decoded, metric, words["reading"]),
                )
            )
        self._show("decoding", joined, "decoded by the logit lens", figures)
        self._phases("logit", joined, "decoding")

    def decode_tuned(self) -> None:
        """Part 2 and 3 again through the tuned lens."""
        if self.study.lens is None:
            return
        decoded = self._decoded(["resid_post"], self.study.lens)
        joined = join_groups(decoded)
        figure = _predicted_token(find.TEXTS["streams"]["resid_post"], decoded)
        self._show("decoding_tuned", joined, "decoded by the tuned lens", [figure])
        self._phases("tuned", joined, "decoding_tuned")

    def compare(self) -> None:
        """Part 3: recalled against not recalled and natural text, alike in length and final probability."""
        tables, balances = [], []
        for other in (MISSED, NATURAL):
            if other not in self.groups:
                continue
            pairs = self._pairs(other)
            balances.append(pairs.balance.assign(control=other))
            self.matched[other] = pairs
            if len(pairs) < 2:
                continue
            mine, theirs = self._matched_results(other, pairs)
            groups = {RECALLED: mine, f"matched {other}": theirs}
            figure = _predicted_token("Matched pairs: the predicted token, decoded after each layer", groups)
            name, title = f"matched_{other.replace(' ', '_')}", f"beside {other}, matched"
            self._show(name, join_groups(groups), title, [figure])
            tables.append(find.matched_table(mine, theirs, other, self.options))
        if balances:
            self._table("balance", pd.concat(balances, ignore_index=True))
        if not tables:
            self.folder.find(find.unmatched(self.name, self.options))
            return
        table = pd.concat(tables, ignore_index=True)
        table = table.assign(p_corrected=corrected(table["p"].to_numpy(float)))
        self._table("matched", table)
        self.folder.find(find.matched_promotion(self.name, table))

    def knock_outs(self) -> None:
        """Part 4: zero the most dominant neurons, and controls, over the grid."""
        if not self.options.knock_out:
            return
        chosen = at_most(self.groups[RECALLED], self.options.max_items, self.options.seed)
        beside = at_most(chosen, self.options.max_controls, self.options.seed)
        controls = tuple(name for name in self.options.selections if name != "dominant")
        others = self._other_items()
        for keep in (False, True)[: 1 + self.options.non_top]:
            word = "non_top" if keep else "top"
            result = self._knocked_out(chosen, RECALLED, keep, ("dominant",))
            dominant = {RECALLED: result}
            if controls:
                result = _with_controls(result, self._knocked_out(beside, "controls", keep, controls))
            for name, seqs in others.items():
                dominant[name] = self._knocked_out(seqs, name, keep, ("dominant",))
            self._keep_knock_outs(word, result, dominant)

    def _keep_knock_outs(self, word: str, result: Result, dominant: Mapping[str, Result]) -> None:
        of_all = find.largest_shared_k(result)
        what = "the top k" if word == "top" else "all but the top k"
        name, title = f"knock_out_{word}", f"with {what} neurons knocked out"
        controls = len(self.options.selections) > 1
        alone = {"selection": "dominant"} if controls else {}
        figures = [FigureRequest(alone, reading=reading(dominant[RECALLED]))]
        if controls:
            figures.append(FigureRequest({"k": of_all}, reading=find.controls_in_words(result, of_all)))
        self._show(name, result, title, figures)
        if len(dominant) > 1:
            words = find.groups_in_words(dominant, of_all)
            figure = FigureRequest({"group": "group", "k": of_all}, reading=words)
            title += ", beside other predictions"
            self._show(f"{name}_groups", join_groups(dominant), title, [figure])
        table = find.knock_out_table(result, dominant, self.options)
        ranked = ranked_by(DOMINANT, "neuron", str(describe(self.model)["family"]))
        self._table(name, table, words="knock_out", what=what, section=name, ranked=ranked)
        if word == "top":
            for finding in find.knocked_out(self.name, result, dominant, self.options.seed):
                self.folder.find(finding)

    def _knocked_out(self, seqs: SequenceSet, group: str, keep: bool, selections: tuple[str, ...]) -> Result:
        options = self.options
        place = f"{self.name}_{group.replace(' ', '_')}_{'non_top' if keep else 'top'}"
        named = ("top_k", "windows", "positions", "n_draws", "seed")
        wanted: dict[str, Any] = {name: getattr(options, name) for name in named}
        wanted |= {"mode": options.replace, "metrics": ("target_logprob",), "progress": self.study.progress}
        knock_out = partial(knock_out_neurons, self.model, seqs, keep=keep, selection=selections, **wanted)
        return self.folder.kept(place, knock_out)

    def _other_items(self) -> dict[str, SequenceSet]:
        """Return the items of each control group that are matched with recalled ones; all if none are."""
        found = {}
        for other in (MISSED, NATURAL):
            if other not in self.groups:
                continue
            pairs = self.matched.get(other)
            group = self.groups[other]
            some = group if pairs is None or len(pairs) < 2 else group[np.sort(pairs.theirs)]
            found[other] = at_most(some, self.options.max_others, self.options.seed)
        return found

    def _natural_text(self) -> SequenceSet | None:
        if self.study.text is None:
            return None
        return natural_controls(
            self.study.text,
            self.items,
            tokenizer=getattr(self.model, "tokenizer", None),
            n=self.options.control_n,
            seed=self.options.seed,
        )

    def _decoded(self, streams: list[str], lens: TunedLens | Literal["logit"] = "logit") -> dict[str, Result]:
        decode = partial(decode_residual, self.model, lens=lens, streams=streams)
        return {name: decode(seqs, progress=self.study.progress) for name, seqs in self.groups.items()}

    def _phases(self, lens: str, joined: Result, section: str) -> None:
        options = {"n_resamples": self.options.n_resamples, "seed": self.options.seed}
        summary = partial(promotion_summary, joined, group="group", near=self.options.near_rank, **options)
        words = {"lens": f"{lens} lens", "section": section}
        found = [summary(token=token).assign(token=token, lens=words["lens"]) for token in _TOKENS]
        table = pd.concat(found, ignore_index=True)
        by_layer = table["layer"].notna().to_numpy()
        phases = table.loc[~by_layer].drop(columns="layer").reset_index(drop=True)
        self._table(f"phases_{lens}", phases, words="phases", **words)
        ranks = table.loc[by_layer].reset_index(drop=True)
        self._table(f"ranks_{lens}", ranks, words="ranks", **words)
        self.folder.find(find.boundary(self.name, words["lens"], phases, joined.data.sizes["layer"]))
        if lens == "logit":
            self.folder.find(find.boosting(self.name, phases))

    def _pairs(self, other: str) -> Pairs:
        calipers = {
            "prompt tokens": self.options.length_caliper,
            "final probability": self.options.probability_caliper,
        }
        return match_pairs(self._covariates(RECALLED), self._covariates(other), calipers)

    def _covariates(self, group: str) -> pd.DataFrame:
        final = find.resid_post(self.decoded[group])["predicted_probability"].isel(layer=-1, target=0)
        lengths = self.groups[group].prefix_len.numpy()
        return pd.DataFrame({"prompt tokens": lengths, "final probability": final.values})

    def _matched_results(self, other: str, pairs: Pairs) -> tuple[Result, Result]:
        mine = Result(find.resid_post(self.decoded[RECALLED]).data.isel(sequence=pairs.ours))
        theirs = find.resid_post(self.decoded[other]).data.isel(sequence=pairs.theirs)
        links = mine["sequence"].values
        return mine, Result(theirs.assign_coords(matched_to=("sequence", links)))

    def _show(self, key: str, result: Result, title: str, figures: Iterable[FigureRequest] = ()) -> None:
        title = f"{self.name.capitalize()} {title}"
        self.folder.add_result(f"{self.name}_{key}", result, title=title, figures=figures)

    def _table(self, key: str, frame: pd.DataFrame, **words: Any) -> None:
        self.study.table(self.name, key, frame, **words)


def _predicted_token(title: str, decoded: Mapping[str, Result]) -> FigureRequest:
    options = {"group": "group", "token": "predicted", "title": title}
    return FigureRequest(options, reading=find.decoded_in_words(decoded))


def _with_controls(dominant: Result, controls: Result) -> Result:
    """Join the knock-outs of dominant neurons with those of others, which fewer items may have (NaN)."""
    data = controls.data
    if "selection" not in data.dims:
        data = data.expand_dims(selection=controls.settings["selection"])
    keep = [name for name in dominant.data.data_vars if "layer" in dominant[str(name)].dims]
    first = dominant.data.expand_dims(selection=["dominant"])
    parts = [part[keep].drop_vars([c for c in part.coords if c not in part.dims]) for part in (first, data)]
    if "draw" in parts[1].dims:
        parts[0] = parts[0].expand_dims(draw=[0])
    joined = xr.concat(parts, "selection", join="outer", combine_attrs="override")
    joined = joined.sel(sequence=dominant["sequence"].values)
    joined = joined.merge(dominant.data.drop_vars(keep), combine_attrs="override", compat="override")
    settings = {**dominant.settings, "selection": joined["selection"].values.tolist()}
    return Result(joined.assign_attrs(dominant.data.attrs | {"settings": exact_json(settings)}))
