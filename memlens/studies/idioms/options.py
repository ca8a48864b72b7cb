"""What the idiom study is free to choose."""

from __future__ import annotations

from dataclasses import dataclass, field

from memlens.errors import OptionError, check_option
from memlens.instruments.ablate.neuron_choice import SELECTIONS
from memlens.instruments.ablate.replacing import POSITIONS
from memlens.instruments.decode.decoding import STREAMS
from memlens.instruments.decode.promotion import NEAR_RANK
from memlens.recall.criteria.options import CriteriaOptions


@dataclass(frozen=True)
class IdiomOptions:
    """What `study_idioms` is free to choose; all of it is recorded.

    Attributes:
        leave_out: Columns of the items' table; items for which one of them is true are left out, such as
            "definition" and "shared_prompt" of the idiom file.
        streams: What is decoded; a stream that the model's blocks do not have is left out.
        near_rank: Largest zero-based rank that counts as near the top.
        length_caliper: Largest difference in prompt length (tokens) of a matched pair.
        probability_caliper: Largest difference in the final probability of the predicted token.
        max_items: Recalled items that are knocked out: a random choice where there are more; None takes all.
            (The released code of arXiv 2210.03588 takes 30.)
        max_controls: Of these, the items whose random and norm-matched neurons are knocked out beside; a
            random choice where there are more; None takes all. With all of them the controls cost twice
            what they are set beside.
        max_others: Items of each control group that are knocked out.
        knock_out: Run the knock-out grid at all (it is the longest part by far).
        top_k: Neurons of a layer that are knocked out; None: 1, 10, 100, 1000 as far as a layer has them.
        windows: Consecutive layers; None: 1 to 5.
        non_top: Also knock out all but the top k (k of 10, 100, 1000, windows of 1 to 3).
        selections: Which neurons: "dominant", and the controls "random" and "norm_matched".
        positions: Where they are knocked out: "all", "prompt", "targets" or "last_prompt".
        replace: By what: "zero", or "mean" over all positions of the knocked-out set.
        n_draws: Draws of the controls.
        lens_steps: Updates of the tuned lens, where one is trained.
        lens_batch_size: Rows of an update.
        lens_window: Tokens of its training rows, at most.
        criteria: How the recall criteria are tested, where there are references; None leaves them out.
        control_n: Natural-text prompts; None takes as many as there are items.
        n_resamples: Of every bootstrap.
        seed: Of every random choice.
    """

    leave_out: tuple[str, ...] = ()
    streams: tuple[str, ...] = STREAMS
    near_rank: int = NEAR_RANK
    length_caliper: float = 1.0
    probability_caliper: float = 0.1
    max_items: int | None = None
    max_controls: int | None = 30
    max_others: int = 30
    knock_out: bool = True
    top_k: tuple[int, ...] | None = None
    windows: tuple[int, ...] | None = None
    non_top: bool = True
    selections: tuple[str, ...] = SELECTIONS
    positions: str = "all"
    replace: str = "zero"
    n_draws: int = 1
    lens_steps: int = 250
    lens_batch_size: int = 16
    lens_window: int = 64
    criteria: CriteriaOptions | None = field(default_factory=CriteriaOptions)
    control_n: int | None = None
    n_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for stream in self.streams:
            check_option("stream", stream, STREAMS)
        if "resid_post" not in self.streams:
            raise OptionError(f"streams={self.streams} lacks 'resid_post', which the phases are read from.")
        for selection in self.selections:
            check_option("selection", selection, SELECTIONS)
        if "dominant" not in self.selections:
            raise OptionError(f"selections={self.selections} lacks 'dominant': controls alone say nothing.")
        check_option("positions", self.positions, POSITIONS)
        check_option("replace", self.replace, ("zero", "mean"))
        for name in (
            "max_items",
            "max_controls",
            "max_others",
            "n_draws",
            "lens_steps",
            "lens_batch_size",
            "n_resamples",
            "control_n",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value} leaves nothing to do: give 1 or more.")
        for name in ("length_caliper", "probability_caliper"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name}={getattr(self, name)} matches nothing: give a number above 0.")
