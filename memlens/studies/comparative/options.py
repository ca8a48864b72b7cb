"""The options of the comparative study."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt

from memlens.choices import Compression, NoiseScale, NoiseSite, OwnAblation, Positions
from memlens.errors import OptionError
from memlens.options import options_class

Measure = Literal[
    "recall", "groups", "frequency", "compression", "decoding", "noise", "recovery", "heads", "training"
]
"""What is measured on each model, in this order; each measure is one file that is computed once."""

Importance = Literal["target_logprob", "target_accuracy", "exact_match"]
IMPORTANCES = get_args(Importance)

ProfileKind = Literal["sum", "count", "mean"]
Similarity = Literal["cosine", "pearson"]

MEMORIZED, CONTROL, UNTRAINED = "memorized", "matched control", "untrained twin"
"""The groups of sequences that are decoded and followed under noise."""

STRUCTURAL = ("code", "math", "arithmetic", "table", "github", "stack", "starcoder")
"""Domains that count as structural text by default; all others are free text."""


@options_class
class ComparativeOptions:
    """Options of `study_comparative`; the run records all of them.

    The defaults suit small models on a CPU. The values of arXiv 2603.21658, as far as they are known: 300,000
    sequences per domain (`max_per_domain`), 10,000 for heads (`heads_per_domain`; 2,500 for large models),
    noise strengths from 0 to 0.5, the mean of the other heads, the top 20 % of heads.

    Example:
        >>> import memlens as ml
        >>> ml.studies.ComparativeOptions(prefix_len=16).prefix_len
        16
    """

    measures: tuple[Measure, ...] = get_args(Measure)
    """What is measured; "recall" always is."""
    prefix_len: PositiveInt | None = None
    """Prompt tokens; None takes the source's own number, else 32."""
    max_targets: PositiveInt | None = None
    """Continuation tokens that count; None takes all."""
    max_per_domain: PositiveInt | None = None
    """Most sequences per domain, chosen at random; None takes all."""
    structural: tuple[str, ...] = STRUCTURAL
    """Domains that count as structural text; all others are free text."""
    half_width: float = 0.1
    """Sequences with M within this distance of 1/2 form the half-memorized bucket."""
    unmemorized_below: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Sequences with M below this count as unmemorized (controls, frequency threshold)."""
    compression: Compression = "keep_last"
    """Which end of the prompt is kept, or greedy deletion of tokens."""
    compression_budget: PositiveInt | None = None
    """Most prompts tried per sequence; None tries all lengths."""
    max_compressed: PositiveInt = 48
    """Most memorized sequences whose prompts are compressed."""
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    """Strengths of the noise; must contain 0."""
    noise_layer: int = 0
    """The layer at which noise is added."""
    noise_site: NoiseSite = "resid_post"
    """The layer's output or its input."""
    noise_positions: Positions = "prompt"
    """Positions at which noise is added."""
    noise_scale: NoiseScale = "norm"
    """What the strength is relative to (see `perturb_residual`)."""
    noise_draws: PositiveInt = 3
    """Draws of the noise per sequence."""
    noise_per_domain: PositiveInt | None = 64
    """Most sequences per domain for the rate under noise; None takes all."""
    similarity_at: Literal["prompt", "last_prompt", "targets"] = "prompt"
    """Positions over which similarity is averaged."""
    max_examined: PositiveInt = 48
    """Most memorized sequences for decoding and recovery; as many matched controls are added."""
    head_mode: OwnAblation = "mean_of_other_heads"
    """How heads are ablated."""
    importance: Importance = "target_logprob"
    """The metric whose loss under ablation is a head's importance; all three are saved."""
    heads_per_domain: PositiveInt = 32
    """Most memorized sequences per domain for the ablation of heads."""
    top_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of all heads that counts as important, rounded up."""
    min_per_domain: Annotated[int, Field(ge=2)] = 4
    """Domains with fewer memorized sequences get no set of important heads."""
    n_splits: PositiveInt = 50
    """Random halves for the overlap within a domain."""
    profile: ProfileKind = "sum"
    """A layer's value in a depth profile: sum of its important heads' importance, their count, or the mean
    over all its heads."""
    similarity: Similarity = "cosine"
    """Similarity of two profiles."""
    profile_bins: PositiveInt = 100
    """Points of relative depth in a profile."""
    linkage: Literal["average", "complete", "single", "ward"] = "average"
    """Linkage of the hierarchical clustering of models."""
    untrained: bool = True
    """Also measure freshly initialized weights (decoding, recovery, heads)."""
    n_resamples: PositiveInt = 1000
    """Resamples of every bootstrap."""
    n_permutations: PositiveInt = 999
    """Permutations of every null."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        if 0.0 not in self.alphas:
            raise OptionError(f"alphas={self.alphas} lacks 0, which the others are compared with.")


DEFAULTS = ComparativeOptions()
"""What every function of `analyze` takes when it is called without options."""
