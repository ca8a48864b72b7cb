"""What the comparative study is free to choose."""

from __future__ import annotations

from dataclasses import dataclass

from memlens.errors import OptionError, check_option
from memlens.instruments.ablate.replacing import MODES, POSITIONS
from memlens.instruments.noise.residual import NOISE_SITES, SCALES, SIMILARITY_AT
from memlens.recall.prompts.compression import COMPRESSIONS
from memlens.studies.comparative.analyze.domains import STRUCTURAL
from memlens.studies.comparative.analyze.heads import set_size
from memlens.studies.comparative.analyze.profiles import PROFILES, SIMILARITIES

MEASURES = (
    "recall", "groups", "frequency", "compression", "decoding", "noise", "recovery", "heads", "training"
)  # fmt: skip
"""What is measured of each model, in this order; each is a file that is computed once."""

IMPORTANCES = ("target_logprob", "target_accuracy", "exact_match")
LINKAGES = ("average", "complete", "single", "ward")


@dataclass(frozen=True)
class ComparativeOptions:
    """What `study_comparative` is free to choose; all of it is recorded.

    The defaults are for small models on a processor. What arXiv 2603.21658 takes, as far as it is known:
    300,000 sequences a domain (`max_per_domain`), 10,000 for heads (`heads_per_domain`; 2,500 for large
    models), strengths from 0 to 0.5, the mean of the other heads, the top 20 % of heads.

    Attributes:
        measures: What is measured, of `MEASURES`; "recall" always is.
        prefix_len: Tokens given; None: the source's own, else 32.
        max_targets: Tokens of the continuation that count; None: all.
        max_per_domain: Sequences of each domain: a random choice where there are more; None: all.
        structural: Domains that count as structural text; all others are free text.
        half_width: M within this of 1/2 is the half-memorized bucket.
        unmemorized_below: M below which a sequence counts as unmemorized (controls, frequency threshold).
        compression: Which end of the prompt is kept: "keep_last", "keep_first" or "greedy_deletion".
        compression_budget: Most prompts tried for a sequence; None: all lengths.
        max_compressed: Memorized sequences that are compressed.
        alphas: Strengths of the noise; 0 must be among them.
        noise_layer: The block whose site is disturbed.
        noise_site: "resid_post" (the block's output) or "resid_pre".
        noise_positions: "prompt", "all", "targets" or "last_prompt".
        noise_scale: "norm" or "std" (see `perturb_residual`).
        noise_draws: Draws of the noise for each sequence.
        noise_per_domain: Sequences of each domain for the rate under noise; None: all that are scored.
        similarity_at: Where similarity is averaged: "prompt", "last_prompt" or "targets".
        max_examined: Memorized sequences that are decoded and whose recovery is measured, and as many matched
            controls.
        head_mode: How heads are ablated.
        importance: Whose loss under ablation is a head's importance: "target_logprob", "target_accuracy" or
            "exact_match"; all three are saved.
        heads_per_domain: Memorized sequences of each domain that are ablated.
        top_fraction: Share of all heads that are the important ones, rounded up.
        min_per_domain: Domains with fewer memorized sequences have no set of heads.
        n_splits: Random halves for the stability inside a domain.
        profile: "sum" of the important heads' importance in a layer, their "count", or the "mean" over all
            heads.
        similarity: Of two profiles: "cosine" or "pearson".
        profile_bins: Places of relative depth of a profile.
        linkage: Of the clustering of models.
        untrained: Also measure freshly drawn weights: decoding, recovery and heads.
        n_resamples: Of every bootstrap.
        n_permutations: Of every permutation null.
        seed: Of every random choice.
    """

    measures: tuple[str, ...] = MEASURES
    prefix_len: int | None = None
    max_targets: int | None = None
    max_per_domain: int | None = None
    structural: tuple[str, ...] = STRUCTURAL
    half_width: float = 0.1
    unmemorized_below: float = 0.5
    compression: str = "keep_last"
    compression_budget: int | None = None
    max_compressed: int = 48
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    noise_layer: int = 0
    noise_site: str = "resid_post"
    noise_positions: str = "prompt"
    noise_scale: str = "norm"
    noise_draws: int = 3
    noise_per_domain: int | None = 64
    similarity_at: str = "prompt"
    max_examined: int = 48
    head_mode: str = "mean_of_other_heads"
    importance: str = "target_logprob"
    heads_per_domain: int = 32
    top_fraction: float = 0.2
    min_per_domain: int = 4
    n_splits: int = 50
    profile: str = "sum"
    similarity: str = "cosine"
    profile_bins: int = 100
    linkage: str = "average"
    untrained: bool = True
    n_resamples: int = 1000
    n_permutations: int = 999
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.measures:
            check_option("measures", name, MEASURES)
        known = {
            "compression": COMPRESSIONS, "noise_site": NOISE_SITES, "noise_positions": POSITIONS,
            "noise_scale": SCALES, "similarity_at": SIMILARITY_AT, "head_mode": MODES,
            "importance": IMPORTANCES, "profile": PROFILES, "similarity": SIMILARITIES, "linkage": LINKAGES,
        }  # fmt: skip
        for name, values in known.items():
            check_option(name, getattr(self, name), values)
        for name in (
            "prefix_len", "max_targets", "max_per_domain", "compression_budget", "max_compressed",
            "noise_draws", "noise_per_domain", "max_examined", "heads_per_domain", "n_splits", "profile_bins",
            "n_resamples", "n_permutations",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value} leaves nothing to do: give 1 or more.")
        if self.min_per_domain < 2:
            raise OptionError(f"min_per_domain={self.min_per_domain} cannot be halved: give 2 or more.")
        if 0.0 not in self.alphas:
            raise OptionError(f"alphas={self.alphas} lacks 0, which the others are compared with.")
        if not 0 < self.unmemorized_below <= 1:
            raise OptionError(f"unmemorized_below={self.unmemorized_below} is not in (0, 1].")
        set_size(1, self.top_fraction)
