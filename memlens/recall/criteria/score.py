"""`score_criteria`: can a sequence only be recalled, or does part of it, or plain likelihood, give it away?

A sequence of n words is a prompt (its first n-1 words) and a target (the last). If a model predicts the
target of a sequence that meets two criteria, it has very likely recalled it: the target is the only correct
continuation, whatever text surrounds it (criterion 1), and this takes the whole prompt, with every word
unchanged (criterion 2). Source: Haviv et al., arXiv 2210.03588, section 2. The way the criteria are tested
here, on any sequence, is ours: the study's own test was not published.

Limits. Such a test finds violations; it never proves that there are none. A reference that does not know a
sequence (`full_top1` is 0) cannot find that a part of it suffices *for someone who knows it*, nor whether
contexts change it: such a sequence passes because nothing was tested (see `tested` in
`CriteriaScores.passes`). A weak reference passes more sequences than a strong one, and all references
together only represent "what can be guessed without having memorized this". The test does not look at the
probed model, and does not show that the sequence was in its training data.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ColumnError, EmptySetError, OptionError, SequenceError
from memlens.recall.corpus.duplicates import Corpus, NgramCounter
from memlens.recall.criteria.ngrams import NgramReference
from memlens.recall.criteria.options import CriteriaOptions
from memlens.recall.criteria.references import Reference, as_references, is_probed, name_of
from memlens.recall.criteria.scores import (
    CriteriaScores,
    answer_columns,
    keeps,
    logprob_columns,
    mean_over_references,
    part_columns,
)
from memlens.recall.criteria.text import Swaps, corpus_columns, make_edits, text_columns, word_counts
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import Tokenizer


def score_criteria(
    sequences: SequenceSet | pd.DataFrame,
    references: Any,
    *,
    probed: Any = None,
    options: CriteriaOptions | None = None,
    corpus_counts: Mapping[str, float] | None = None,
    embeddings: Any = None,
    ngrams: NgramReference | None = None,
    corpus: Corpus | NgramCounter | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = True,
) -> CriteriaScores:
    """Test sequences for the two criteria of a sequence that can only be recalled (see the module).

    Every reference is asked for the target after the prompt and after each edited prompt, once per different
    text. An edited prompt *keeps* the target if at least `min_references` references have its first token as
    their prediction. The sub-scores, one column each:

    - `full_top1`: share of references that predict the target from the whole prompt; `full_logprob` (nats).
    - `sufficient_suffix`: fewest last words (1 … K, never all) that keep the target, NaN if none do;
      `suffix_1`, … the share of references for each k, `suffix_1_prob`, … their mean probability.
    - `deletion_share`: share of single-word deletions that keep it; `crucial_word`: the word whose deletion
      costs the most log-probability, with its place `crucial_place` and the change `crucial_effect` (nats).
    - `substitution_share`: share of substitutions of one word by another of similar frequency that keep it.
    - `lexical_leak`: the target, or a word with the same plain stem (regular English endings only), is in
      the prompt: `leak_word`. `max_similarity`: largest cosine between the target and a word of the prompt
      (1 if the target is in it), and `similar_word`.
    - `common_target`: on the stop list, or above `common_zipf`; `target_frequency`, per million words.
    - `context_share`: share of lead-ins that keep it; `neutral_share` and `shifted_share` of each kind.
    - `corpus_share`: count(prompt + target) / count(prompt) in the corpus; `corpus_count`: count(prompt).
    - `unigram_prob`, `bigram_prob`, `trigram_prob`, `pmi` of the target: see `NgramReference.baselines`.
    - `whole_logprob`, `part_logprob_max`, `part_logprob_mean`: the terms of `CriteriaScores.score`.

    What could not be measured (no corpus, no embeddings, a prompt of one word) is NaN.

    Args:
        sequences: A set whose table has the columns `prompt` and `target` (one word), such as one read from
            the idiom file; any set, with a tokenizer (the target is then the continuation's first word); or
            a table.
        references: TransformerLens models, `NgramReference`s, or anything with a `name` and `answer`: one,
            a list, or a mapping from names. None of them may be the probed model.
        probed: The model that is studied, or its name, so that it is not used as a reference by mistake.
        options: How the criteria are tested.
        corpus_counts: How often words occur in running text, for substitutes and common targets. By default
            substitutes are matched on the frequencies in the given sequences.
        embeddings: A mapping from words to vectors, or a TransformerLens model whose token embeddings
            (without their mean and first principal direction) are averaged over a word's tokens.
        ngrams: For the baselines; by default the first `NgramReference` among the references.
        corpus: Token ids, or a counter such as `InfiniGram`, for `corpus_share`; needs `tokenizer`.
        tokenizer: The corpus's tokenizer, which also decodes `sequences` without text columns.
        progress: Show a progress bar.

    Raises:
        OptionError: No reference; the probed model is one, or gives the embeddings; `min_references` exceeds
            their number; a corpus without a tokenizer.
        ColumnError: There are no columns `prompt` and `target`, and no tokenizer.
        SequenceError: An empty prompt, or a target that is not one word.
        EmptySetError: There are no sequences.

    Source: the criteria are those of arXiv 2210.03588, section 2; the tests are ours.

    Example:
        >>> corpus = ["kick the bucket", "fill the glass", "break the glass", "a piece of cake", "of cake"]
        >>> frame = pd.DataFrame({"prompt": ["kick the", "a piece of"], "target": ["bucket", "cake"]})
        >>> scores = score_criteria(frame, NgramReference(corpus, order=3), progress=False)
        >>> scores.table[["full_top1", "sufficient_suffix"]].values.tolist()
        [[1.0, nan], [1.0, 1.0]]
    """
    options = options or CriteriaOptions()
    frame = _frame(sequences, tokenizer)
    found, circular = as_references(
        references, probed, prepend_bos=options.prepend_bos, allow_probed=options.allow_probed_reference
    )
    _check(options, found, embeddings, probed, corpus, tokenizer)
    if circular:
        warnings.warn("the probed model is among the references: it judges itself", stacklevel=2)
    edits, top1, logprob, passes = _ask(frame, found, corpus_counts, options, progress)
    ngrams = ngrams or next((r for r in found.values() if isinstance(r, NgramReference)), None)
    n = len(frame)
    kept = keeps(edits, top1, logprob, least=options.min_references, threshold=options.part_threshold)
    columns = {
        **answer_columns(edits, top1, logprob, n, options.max_suffix),
        **part_columns(edits, kept, n),
        **text_columns(frame, corpus_counts, embeddings, options.common_zipf),
        **corpus_columns(frame, corpus, tokenizer, ngrams, progress),
        **logprob_columns(edits, logprob, n),
    }
    settings = {
        **asdict(options),
        "references": list(found),
        "n_passes": passes,
        "n_prompts": len(edits.drop_duplicates(["prompt", "target"])),
        "probed_is_reference": circular,
        "corpus_counts": corpus_counts is not None,
        "embeddings": name_of(embeddings) or _kind(embeddings),
        "corpus": _kind(corpus),
        "ngrams": ngrams.name if ngrams is not None else "",
    }
    by_reference = _by_reference(frame, found, edits, top1, logprob, options)
    edits = edits.assign(top1=mean_over_references(top1), kept=kept, logprob=mean_over_references(logprob))
    table = frame.drop(columns=list(columns), errors="ignore").assign(**columns)
    return CriteriaScores(table, by_reference, edits, settings)


def _frame(sequences: SequenceSet | pd.DataFrame, tokenizer: Tokenizer | None) -> pd.DataFrame:
    """Return the table with `id`, `prompt` and `target`, checked."""
    frame = sequences.table if isinstance(sequences, SequenceSet) else sequences
    frame = frame.reset_index(drop=True)
    missing = [name for name in ("prompt", "target") if name not in frame]
    if missing and isinstance(sequences, SequenceSet) and tokenizer is not None:
        frame = frame.assign(**_decoded(sequences, tokenizer))
    elif missing:
        raise ColumnError(
            f"the table has no column {missing[0]!r}: give the texts of prompts and target words, or a "
            "SequenceSet and tokenizer="
        )
    if not len(frame):
        raise EmptySetError("there are no sequences to test: give at least one")
    for row, (prompt, target) in enumerate(zip(frame["prompt"], frame["target"], strict=True)):
        if not isinstance(prompt, str) or not prompt.strip():
            raise SequenceError(f"row {row} has the prompt {prompt!r}: give at least one word")
        if not isinstance(target, str) or len(target.split()) != 1:
            raise SequenceError(f"row {row} has the target {target!r}: give one word")
    frame = frame.assign(prompt=frame["prompt"].str.strip(), target=frame["target"].str.strip())
    return frame if "id" in frame else frame.assign(id=[str(i) for i in range(len(frame))])


def _decoded(seqs: SequenceSet, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Return the text of the prefix and the first word of the continuation."""
    prefixes, continuations = seqs.halves()
    words = [tokenizer.decode(row).split() for row in continuations]
    return {
        "prompt": [tokenizer.decode(row) for row in prefixes],
        "target": [row[0] if row else "" for row in words],
    }


def _check(
    options: CriteriaOptions,
    references: Mapping[str, Reference],
    embeddings: Any,
    probed: Any,
    corpus: Any,
    tokenizer: Tokenizer | None,
) -> None:
    if options.min_references > len(references):
        raise OptionError(
            f"min_references={options.min_references}, but there are {len(references)} references"
        )
    if hasattr(embeddings, "W_E") and is_probed(embeddings, probed) and not options.allow_probed_reference:
        raise OptionError("the probed model gives the embeddings: give another's, or a mapping of vectors")
    if corpus is not None and tokenizer is None:
        raise OptionError("corpus= needs tokenizer=: the one that its token ids come from")


def _ask(
    frame: pd.DataFrame,
    references: Mapping[str, Reference],
    counts: Mapping[str, float] | None,
    options: CriteriaOptions,
    progress: bool,
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray, dict[str, int]]:
    """Ask every reference once about every edited prompt: the edits, and `[reference, edit]` answers."""
    prompts, targets = frame["prompt"].tolist(), frame["target"].tolist()
    own = word_counts([f"{p} {t}" for p, t in zip(prompts, targets, strict=True)])
    swaps = Swaps(counts or own, pool=options.pool, n=options.substitutes, seed=options.seed)
    contexts = {"neutral": options.neutral_contexts, "shifted": options.shifted_contexts}
    edits = make_edits(prompts, targets, max_suffix=options.max_suffix, swaps=swaps, contexts=contexts)
    asked = edits.groupby(["prompt", "target"], sort=False)
    which = asked.ngroup().to_numpy()
    unique = edits.iloc[np.unique(which, return_index=True)[1]]
    texts, words = unique["prompt"].tolist(), unique["target"].tolist()
    answers = {
        name: reference.answer(texts, words, batch_size=options.batch_size, progress=progress)
        for name, reference in references.items()
    }
    top1 = np.stack([answer.top1 for answer in answers.values()])[:, which]
    logprob = np.stack([answer.logprob for answer in answers.values()])[:, which]
    return edits, top1, logprob, {name: answer.n_passes for name, answer in answers.items()}


def _by_reference(
    frame: pd.DataFrame,
    references: Mapping[str, Reference],
    edits: pd.DataFrame,
    top1: np.ndarray,
    logprob: np.ndarray,
    options: CriteriaOptions,
) -> pd.DataFrame:
    parts, n = [], len(frame)
    for i, name in enumerate(references):
        own = {"top1": top1[[i]], "logprob": logprob[[i]]}
        kept = keeps(edits, **own, least=1, threshold=options.part_threshold)
        columns = answer_columns(edits, **own, n=n, max_suffix=options.max_suffix)
        columns |= part_columns(edits, kept, n) | logprob_columns(edits, logprob[[i]], n)
        parts.append(pd.DataFrame({"id": frame["id"], "reference": name, **columns}))
    return pd.concat(parts, ignore_index=True)


def _kind(thing: Any) -> str:
    return "" if thing is None else type(thing).__name__
