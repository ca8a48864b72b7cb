"""Which strings leak: one row per string, and how far each secret stands out from others of its form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from memlens.instruments.detect.exposure import exposure, other_digits
from memlens.recall.scores import RecallScores
from memlens.sequences.secrets import SECRET
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import decode
from memlens.studies.auditing.options import AuditOptions

WHOLE, SAMPLED, NEARLY, NO = LEAKS = ("whole", "by sampling", "nearly", "no")
"""How a string leaks: greedily and whole, by sampling, nearly (which does not count as a leak), or not."""

FEWEST_DIGITS = 4
"""Fewest digits of a secret whose exposure is measured."""
_SHORTEST = 4
_OTHERS = 200
_KEPT = ("tokenizer", "vocab_size", "vocabulary", "prepend_bos")


def blind(strings: SequenceSet) -> SequenceSet:
    """Return the same sequences without any text: named by their place, with the number of copies if known.

    >>> named = pd.DataFrame({"id": ["ada@lovelace.org"], "text": ["..."], "copies": [3]})
    >>> blind(SequenceSet.from_tokens([[1, 2]], 1, table=named)).table.to_dict("records")
    [{'id': 'string 1', 'copies': 3}]
    """
    table = pd.DataFrame({"id": [f"string {i + 1}" for i in range(len(strings))]})
    if "copies" in strings.table and pd.api.types.is_numeric_dtype(strings.table["copies"]):
        table["copies"] = strings.table["copies"].to_numpy()
    attrs = {name: value for name, value in strings.attrs.items() if name in _KEPT}
    return SequenceSet(strings.tokens, strings.mask, strings.prefix_len, table, attrs)


def leak_table(model: Any, strings: SequenceSet, recall: RecallScores, options: AuditOptions) -> pd.DataFrame:
    """Return what is known of each string after scoring, in the order of the set.

    Args:
        model: Its tokenizer decodes prefixes and targets.
        strings: With texts, and the column `secret` where only a part of a text is the target.
        recall: The scores of the blind set.
        options: What counts as nearly.
    """
    scores, given = recall.table, strings.table
    prefixes, targets = (decode(model.tokenizer, rows) for rows in strings.halves())
    secrets = given[SECRET].astype(str).tolist() if SECRET in given else targets
    generated = scores["generated_text"].tolist()
    shown = [len(s.strip()) >= _SHORTEST and s.strip() in g for s, g in zip(secrets, generated, strict=True)]
    whole = (scores["exact_match"].to_numpy() == 1) | np.array(shown)
    similar = scores[["edit_similarity", "edit_similarity_characters"]].max(axis=1).to_numpy()
    how = np.select(
        [whole, scores["np_discoverable"].to_numpy() == 1, similar >= options.near], LEAKS[:3], NO
    )
    wanted = (
        "exact_match", "memorization_score", "edit_similarity", "edit_similarity_characters",
        "samples_needed", "np_discoverable", "target_logprob", "trivial",
    )  # fmt: skip
    return pd.DataFrame(
        {
            "string": scores["id"],
            "id": given["id"],
            "row": given.get("row", range(len(given))),
            "kind": given.get("kind", "text"),
            "leaks": how,
            **{name: scores[name] for name in wanted},
            "likeness_to_others": likeness_to_others(generated, targets, options.seed),
            "target_tokens": strings.n_targets.numpy(),
            "prefix_tokens": strings.prefix_len.numpy() - int(bool(strings.attrs.get("prepend_bos"))),
            "secret": secrets,
            "prefix": prefixes,
            "target": targets,
            "generated": generated,
        }
    )


def likeness_to_others(generated: list[str], targets: list[str], seed: int) -> np.ndarray:
    """Return the mean edit similarity, by characters, of each generated text to the other targets.

    It is what the form of the secrets alone gives, such as a common domain of addresses. At most 200 others
    are drawn; NaN where there is none.

    >>> likeness_to_others(["ab", "cd"], ["ab", "xb"], 0).tolist()
    [0.5, 0.0]
    """
    n = len(targets)
    chosen = np.sort(np.random.default_rng(seed).permutation(n)[:_OTHERS])
    others = [targets[i] for i in chosen]
    likeness = np.asarray(cdist(generated, others, scorer=Levenshtein.normalized_similarity), dtype=float)
    same = np.array([[target == other for other in others] for target in targets])
    counted = np.where(same, np.nan, likeness)
    number = (~same).sum(1)
    return np.where(number > 0, np.nansum(counted, axis=1) / np.maximum(number, 1), np.nan)


def exposures(model: Any, strings: SequenceSet, options: AuditOptions, *, progress: bool) -> pd.DataFrame:
    """Return the exposure of secrets with enough digits, among all that differ from them in digits only.

    Args:
        model: A TransformerLens model.
        strings: The blind set.
        options: How many secrets, and how.
        progress: Show progress bars.

    Returns:
        One row per measured string: `string`, `exposure` and `exposure_most` (bits), `exposure_method`.
    """
    slots = other_digits(model, strings.halves()[1])
    bits = np.array([math.log2(math.prod(map(len, row))) for row in slots])
    canaries = np.flatnonzero(bits >= FEWEST_DIGITS * math.log2(10))
    drawn = np.random.default_rng(options.seed).permutation(canaries)[: options.max_canaries]
    groups: dict[str, list[int]] = {}
    for i in sorted(drawn.tolist()):
        groups.setdefault(str(slots[i]), []).append(i)
    parts = []
    for rows in groups.values():
        found = exposure(model, strings[rows], slots[rows[0]], options=options.exposure(), progress=progress)
        parts.append(
            pd.DataFrame(
                {
                    "string": found["sequence"].values,
                    "exposure": found["exposure"].values,
                    "exposure_most": bits[rows],
                    "exposure_method": found["method"].values,
                }
            )
        )
    names = ["string", "exposure", "exposure_most", "exposure_method"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=names)
