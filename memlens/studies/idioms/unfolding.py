"""How one prediction unfolds over layers: recalled items, those that are not, and natural text.

One set of items with one target each goes through split, decoding, phases, matched comparison and knock-outs;
idioms and facts are such sets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.forward.hooks import has_site
from memlens.instruments.ablate.neurons import knock_out_neurons
from memlens.instruments.decode.decoding import decode_residual
from memlens.instruments.decode.lens import TunedLens
from memlens.instruments.decode.promotion import promotion_summary
from memlens.recall.matching import Pairs, match_pairs
from memlens.recall.score import score_recall
from memlens.recall.scores import RecallScores
from memlens.report.model import FigureRequest
from memlens.results.groups import join_groups
from memlens.results.kinds import reading
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.studies.idioms import findings as find
from memlens.studies.idioms.findings import controls_in_words, knock_out_table, knocked_out, largest_shared_k
from memlens.studies.idioms.options import IdiomOptions
from memlens.studies.running import StudyDirectory, at_most

RECALLED, MISSED, NATURAL = find.RECALLED, find.MISSED, "natural text"


class Unfolding:
    """The parts of the study that idioms and facts share.

    Args:
        model: A TransformerLens model.
        name: Of the items in file names, such as "idioms".
        items: One target token each.
        natural: Prompts cut from natural text, or None.
        lens: A tuned lens, or None.
        folder: Where results go.
        options: See `IdiomOptions`.
        progress: Show progress bars.
    """

    model: Any
    name: str
    folder: StudyDirectory
    natural: SequenceSet | None
    lens: TunedLens | None
    options: IdiomOptions
    progress: bool
    items: SequenceSet

    def __init__(
        self,
        model: Any,
        name: str,
        items: SequenceSet,
        natural: SequenceSet | None,
        lens: TunedLens | None,
        folder: StudyDirectory,
        options: IdiomOptions,
        *,
        progress: bool,
    ) -> None:
        self.model, self.name, self.folder = model, name, folder
        self.natural, self.lens, self.options, self.progress = natural, lens, options, progress
        self.items = items.first_targets()
        self.recall: RecallScores | None = None
        self.groups: dict[str, SequenceSet] = {}
        self.decoded: dict[str, Result] = {}
        self.matched: dict[str, Pairs] = {}

    def run(self) -> None:
        """Run all parts; one that fails does not stop those that do not need it."""
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
            self.model, self.items, generate=False, metrics=("likelihood",), progress=self.progress
        )
        hits = self.recall.table["exact_match"].to_numpy(bool)
        scored = self.items.with_table(self.recall.table)
        for name, part in ((RECALLED, scored[hits]), (MISSED, scored[~hits]), (NATURAL, self.natural)):
            if part is not None and len(part):
                self.groups[name] = part
        self.recall.save(self.folder.path / f"{self.name}_recall.parquet")
        self.folder.add_result(f"{self.name}_recall", self.recall.to_result(), title=self._title("recalled"))
        table = find.recall_by_subset(self.recall.table)
        self._table("subsets", table, "Recall by subset", "recall")
        self.folder.find(find.recalled(self.name, self.recall.table))

    def decode(self) -> None:
        """Part 2: decode every group after each block, attention and MLP; part 3: the phases."""
        streams = [s for s in self.options.streams if has_site(self.model, s)]
        streams.sort(key=lambda stream: stream != "resid_post")  # the phases are read from the first
        self.decoded = self._decoded(self.groups, streams)
        joined = join_groups(self.decoded)
        figures = [
            FigureRequest(
                {"group": "group", "token": "predicted", "stream": stream, "title": title},
                reading=find.decoded_in_words(self.decoded) if stream == "resid_post" else "",
            )
            for stream, title in _STREAM_TITLES.items()
            if stream in streams
        ]
        for metric in ("entropy", "kl_to_final"):
            figures.append(FigureRequest({"group": "group", "metric": metric}, reading=""))
        self.folder.add_result(
            f"{self.name}_decoding", joined, title=self._title("decoded by the logit lens"), figures=figures
        )
        self._phases("logit lens", joined, "decoding")

    def decode_tuned(self) -> None:
        """Part 2 and 3 again through the tuned lens."""
        if self.lens is None:
            return
        decoded = self._decoded(self.groups, ["resid_post"], self.lens)
        joined = join_groups(decoded)
        figure = FigureRequest(
            {"group": "group", "token": "predicted", "title": _STREAM_TITLES["resid_post"]},
            reading=find.decoded_in_words(decoded),
        )
        self.folder.add_result(
            f"{self.name}_decoding_tuned",
            joined,
            title=self._title("decoded by the tuned lens"),
            figures=[figure],
        )
        self._phases("tuned lens", joined, "decoding_tuned")

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
            matched = join_groups(groups)
            title = "Matched pairs: the predicted token, decoded after each block"
            figure = FigureRequest(
                {"group": "group", "token": "predicted", "title": title},
                reading=find.decoded_in_words(groups),
            )
            self.folder.add_result(
                f"{self.name}_matched_{other.replace(' ', '_')}",
                matched,
                title=self._title(f"beside {other}, matched"),
                figures=[figure],
            )
            tables.append(find.matched_table(mine, theirs, other, self.options))
        if balances:
            balance = pd.concat(balances, ignore_index=True)
            self._table("balance", balance, "How alike the matched pairs are", "decoding")
        if not tables:
            self.folder.find(find.unmatched(self.name, self.options))
            return
        table = find.with_corrected_p(pd.concat(tables, ignore_index=True))
        self._table("matched", table, "Recalled minus matched control", "decoding")
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
        of_all = largest_shared_k(result)
        what = "the top k" if word == "top" else "all but the top k"
        alone = {"selection": "dominant"} if len(self.options.selections) > 1 else {}
        figures = [FigureRequest(alone, reading=reading(dominant[RECALLED]))]
        if len(self.options.selections) > 1:
            figures.append(FigureRequest({"k": of_all}, reading=controls_in_words(result, of_all)))
        self.folder.add_result(
            f"{self.name}_knock_out_{word}",
            result,
            title=self._title(f"with {what} neurons knocked out"),
            figures=figures,
        )
        if len(dominant) > 1:
            self.folder.add_result(
                f"{self.name}_knock_out_{word}_groups",
                join_groups(dominant),
                title=self._title(f"with {what} neurons knocked out, beside other predictions"),
                figures=[FigureRequest({"group": "group", "k": of_all}, reading="")],
            )
        table = knock_out_table(result, dominant, self.options)
        self._table(f"knock_out_{word}", table, f"Every knock-out of {what}", f"knock_out_{word}")
        if word == "top":
            for finding in knocked_out(self.name, result, dominant, self.options.seed):
                self.folder.find(finding)

    def _knocked_out(self, seqs: SequenceSet, group: str, keep: bool, selections: tuple[str, ...]) -> Result:
        options = self.options
        place = f"{self.name}_{group.replace(' ', '_')}_{'non_top' if keep else 'top'}"
        named = ("top_k", "windows", "positions", "n_draws", "seed")
        wanted: dict[str, Any] = {name: getattr(options, name) for name in named}
        wanted |= {"mode": options.replace, "metrics": ("target_logprob",), "progress": self.progress}
        knock_out = partial(knock_out_neurons, self.model, seqs, keep=keep, selection=selections, **wanted)
        return self.folder.kept(place, knock_out)

    def _other_items(self) -> dict[str, SequenceSet]:
        """Of each control group those matched with recalled items; all of it where none are."""
        found = {}
        for other in (MISSED, NATURAL):
            if other not in self.groups:
                continue
            pairs = self.matched.get(other)
            group = self.groups[other]
            some = group if pairs is None or len(pairs) < 2 else group[np.sort(pairs.theirs)]
            found[other] = at_most(some, self.options.max_others, self.options.seed)
        return found

    def _decoded(
        self, groups: Mapping[str, SequenceSet], streams: list[str], lens: TunedLens | None = None
    ) -> dict[str, Result]:
        return {
            name: decode_residual(
                self.model, seqs, lens="logit" if lens is None else lens, streams=streams,
                progress=self.progress,
            )
            for name, seqs in groups.items()
        }  # fmt: skip

    def _phases(self, lens: str, joined: Result, section: str) -> None:
        options = self.options
        found = [
            promotion_summary(
                joined, group="group", token=token, near=options.near_rank, seed=options.seed,
                n_resamples=options.n_resamples,
            ).assign(token=token, lens=lens)
            for token in ("predicted", "target")
        ]  # fmt: skip
        table = pd.concat(found, ignore_index=True)
        by_layer = table["layer"].notna().to_numpy()
        phases = table.loc[~by_layer].drop(columns="layer").reset_index(drop=True)
        self._table(f"phases_{lens.split()[0]}", phases, f"The two phases, {lens}", section)
        self._table(
            f"ranks_{lens.split()[0]}", table.loc[by_layer].reset_index(drop=True),
            f"Geometric mean rank (1 is the top) by layer, {lens}", section,
        )  # fmt: skip
        layers = joined.data.sizes["layer"]
        self.folder.find(find.boundary(self.name, lens, phases, layers))
        if lens == "logit lens":
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

    def _title(self, rest: str) -> str:
        return f"{self.name.capitalize()} {rest}"

    def _table(self, name: str, frame: pd.DataFrame, title: str, section: str) -> None:
        self.folder.add_table(
            f"{self.name}_{name}", frame, title=f"{self.name.capitalize()}: {title[:1].lower()}{title[1:]}",
            section=f"{self.name}_{section}",
        )  # fmt: skip


_STREAM_TITLES = {
    "resid_post": "The predicted token, decoded after each block",
    "resid_mid": "The predicted token, decoded after each attention",
    "attn_out": "The predicted token, decoded from each attention's output alone",
    "mlp_out": "The predicted token, decoded from each MLP's output alone",
}


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
    return Result(joined.assign_attrs(dominant.data.attrs | {"settings": json.dumps(settings)}))
