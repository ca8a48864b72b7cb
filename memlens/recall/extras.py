"""The groups of further columns of `score_recall`: what each needs of the pass, and what it gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from memlens.errors import OptionError, check_option
from memlens.recall.columns import METRIC_GROUPS
from memlens.recall.forward import Reducer
from memlens.recall.likelihood import check_share, min_k, min_k_plus_plus, nll, perplexity, zlib_ratio
from memlens.recall.near_verbatim import near_verbatim_columns
from memlens.recall.sampling import Sampling, check_chance, samples_needed
from memlens.recall.targets import TargetStats
from memlens.recall.trivial import TrivialRules, trivial_columns
from memlens.sequences import SequenceSet

__all__ = ["Extras"]


@dataclass(frozen=True)
class Extras:
    """Which further columns are wanted, with their parameters (see `score_recall`).

    Raises:
        OptionError: An unknown group, or a number out of range.
    """

    groups: Collection[str]
    share: float
    sampling: Sampling
    n_samples: int
    probability: float
    rules: TrivialRules

    def __post_init__(self) -> None:
        if isinstance(self.groups, str):
            raise OptionError(f"metrics={self.groups!r}: give a list of groups, such as [{self.groups!r}]")
        for group in self.groups:
            check_option("metrics", group, METRIC_GROUPS)
        check_share(self.share)
        check_chance(self.probability)
        if self.n_samples < 1:
            raise OptionError(f"n_samples={self.n_samples}: ask for at least one sample")

    def settings(self) -> dict[str, str | float | int]:
        """Return the parameters of the groups that are wanted."""
        found: dict[str, str | float | int] = {
            "metrics": ",".join(g for g in METRIC_GROUPS if g in self.groups)
        }
        if "likelihood" in self.groups:
            found["min_k_share"] = self.share
        if "sampling" in self.groups:
            found |= {
                "n_samples": self.n_samples,
                "probability": self.probability,
                **self.sampling.settings(),
            }
        return found | (self.rules.settings() if "trivial" in self.groups else {})

    def reducers(self) -> Mapping[str, Reducer]:
        """Return what the pass has to compute beside `TargetStats`."""
        wanted = "sampling" in self.groups and not self.sampling.plain
        return {"sample_logprob": self.sampling.logprob} if wanted else {}

    def columns(
        self, model: Any, seqs: SequenceSet, stats: TargetStats, sampled: Mapping[str, Tensor]
    ) -> dict[str, np.ndarray]:
        """Return the columns that need no generation."""
        tokenizer = getattr(model, "tokenizer", None)
        found: dict[str, np.ndarray] = {}
        if "likelihood" in self.groups:
            values = {
                "nll": nll(stats),
                "perplexity": perplexity(stats),
                "min_k": min_k(stats, self.share),
                "min_k_plus_plus": min_k_plus_plus(stats, self.share),
            }
            if tokenizer is not None:
                values["zlib_ratio"] = zlib_ratio(stats, tokenizer.batch_decode(_continuations(seqs)))
            found |= {name: value.numpy() for name, value in values.items()}
        if "sampling" in self.groups:
            # The plain scheme's is the model's own log-probability.
            logprob = sampled.get("sample_logprob", stats.logprob)
            found |= self._sampling(logprob.where(seqs.target_mask, 0).sum(-1).numpy())
        if "trivial" in self.groups:
            found |= trivial_columns(seqs, tokenizer, self.rules)
        return found

    def generated_columns(
        self, seqs: SequenceSet, generated: Sequence[Sequence[int]]
    ) -> dict[str, np.ndarray]:
        """Return the columns that compare what was generated with the truth."""
        if "near_verbatim" not in self.groups:
            return {}
        return near_verbatim_columns(list(generated), _continuations(seqs))

    def _sampling(self, logprob: np.ndarray) -> dict[str, np.ndarray]:
        needed = samples_needed(logprob, self.probability)
        return {
            "sample_logprob": logprob,
            "samples_needed": needed,
            "np_discoverable": (needed <= self.n_samples).astype(np.int64),
        }


def _continuations(seqs: SequenceSet) -> list[list[int]]:
    return [row[p:] for row, p in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)]
