"""A model under interventions, as lm-evaluation-harness takes models. Needs lm-eval (the extra `eval`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from lm_eval.utils import get_rolling_token_windows

from memlens.attribution.task_encoding import PairEncoder, PairTokens
from memlens.errors import OptionError
from memlens.models.provenance import describe
from memlens.recall.forward import teacher_forced_stats
from memlens.recall.generation import greedy_continuations
from memlens.sequences import SequenceSet
from memlens.sweeps.contexts import applied
from memlens.sweeps.interventions import Intervention

if TYPE_CHECKING:

    class LM:
        """As lm-eval's own, which says nothing of its types."""

        cache_hook: Any

else:
    from lm_eval.api.model import LM

__all__ = ["LensLM"]

_MAX_TOKENS = 256
"""Of a generated answer where the task does not say; lm-eval's own default."""


class LensLM(LM):
    """What `memlens.as_lm_eval` gives; see there.

    Args:
        model: A TransformerLens model.
        interventions: Held on the model for every request, in this order.
        batch_size: Requests together; chosen to a memory budget by default.
        prepend_bos: See `PairEncoder.of`.
        progress: Show bars.
    """

    model: Any
    interventions: tuple[Intervention, ...]
    encoder: PairEncoder
    progress: bool

    def __init__(
        self,
        model: Any,
        interventions: Sequence[Intervention] = (),
        *,
        batch_size: int | None = None,
        prepend_bos: bool | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.interventions = model, tuple(interventions)
        self.encoder = PairEncoder.of(model, prepend_bos=prepend_bos)
        self._size, self.progress = batch_size, progress
        with applied(model, *self.interventions):
            pass  # wrong hook names and hooks that need a sweep are told now

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's cache of requests."""
        return str(getattr(self.encoder.tokenizer, "name_or_path", ""))

    @property
    def max_length(self) -> int:
        """Tokens that the model takes."""
        return int(self.model.cfg.n_ctx)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results: model, revision, interventions."""
        return {**describe(self.model), "interventions": [edit.name for edit in self.interventions]}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) its log-probability in nats, and whether it is greedy."""
        pairs = [self.encoder(*request.args[:2]) for request in requests]
        found = self._scored(pairs, progress=self.progress and not disable_tqdm)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, in windows as long as the model's context allows.

        The windows are `HFLM`'s of one token less, because the last token is fed here too.
        """
        (first,) = self.encoder.prompt("")
        windows: list[list[PairTokens]] = []
        for request in requests:
            ids = self.encoder.tokenizer.encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, first, self.max_length - 1, context_len=1)
            windows.append(
                [PairTokens([*given[: len(given) - len(asked) + 1]], asked) for given, asked in cut]
            )
        flat = self._scored([*chain(*windows)], progress=self.progress and not disable_tqdm)
        values = iter(logprob for logprob, _ in flat)
        found = [sum(next(values) for _ in parts) for parts in windows]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations, cut before the first of the strings that end an answer.

        Raises:
            OptionError: The task samples, or asks for more tokens than the model has room for.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_greedy_tokens(request.args[1])].append(i)
        found: dict[int, str] = {}
        for n, some in groups.items():
            rows = [self._given(requests[i].args[0], n) for i in some]
            seqs = SequenceSet.from_tokens([row + [0] * n for row in rows], [len(row) for row in rows])
            with applied(self.model, *self.interventions):
                decoded = greedy_continuations(
                    self.model, seqs, batch_size=self._size, progress=self.progress and not disable_tqdm
                )
            for i, ids in zip(some, decoded.tolist(), strict=True):
                found[i] = self._answer(ids, requests[i].args[1])
                self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
        return [found[i] for i in range(len(requests))]

    def _scored(self, pairs: Sequence[PairTokens], *, progress: bool) -> list[tuple[float, bool]]:
        if not pairs:
            return []
        rows = [[*pair.context, *pair.continuation] for pair in pairs]
        seqs = SequenceSet.from_tokens(rows, [len(pair.context) for pair in pairs])
        with applied(self.model, *self.interventions):
            stats = teacher_forced_stats(self.model, seqs, batch_size=self._size, progress=progress)
        total = stats.logprob.double().masked_fill(~stats.mask, 0).sum(1)
        greedy = (stats.correct | ~stats.mask).all(1)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _given(self, context: str, n: int) -> list[int]:
        """Tokens of a context, cut on the left so that `n` more fit."""
        room = self.max_length - n
        if room < 1:
            raise OptionError(
                f"max_gen_toks={n} leaves no room for the question in {self.max_length} tokens of context."
            )
        return self.encoder.prompt(context)[-room:]

    def _answer(self, ids: list[int], options: dict[str, Any]) -> str:
        end = self.encoder.tokenizer.eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        text = self.encoder.tokenizer.decode(ids)
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text


def _greedy_tokens(options: dict[str, Any]) -> int:
    """Return how many tokens a request asks for; an error where it asks for samples."""
    if options.get("do_sample") and options.get("temperature", 1.0) != 0:
        raise OptionError(
            f"a task asks for samples ({dict(options)}), and answers are greedy here: set do_sample to false."
        )
    return int(options.get("max_gen_toks", _MAX_TOKENS))
