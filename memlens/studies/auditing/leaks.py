"""Which strings leak: one row per string, and how far each secret stands out from others of its form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from memlens.errors import EmptySetError
from memlens.instruments.detect.exposure import exposure, other_characters, other_digits
from memlens.recall.extraction import first_tokens
from memlens.recall.score import score_recall
from memlens.recall.scores import RecallScores
from memlens.sequences.secrets import SECRET
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import decode
from memlens.studies.auditing.options import AuditOptions
from memlens.studies.running import StudyDirectory

WHOLE, SAMPLED, NEARLY, NO = LEAKS = ("whole", "by sampling", "nearly", "no")
"""How a string leaks: greedily and whole, by sampling, nearly (which does not count as a leak), or not."""

FEWEST_DIGITS = 4
"""Fewest digits of a secret whose exposure is measured."""
FEWEST_MADE = 16
"""Fewest strings that are made if none was given that does not leak."""
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


def exposures(
    model: Any, strings: SequenceSet, options: AuditOptions, folder: StudyDirectory, *, progress: bool
) -> pd.DataFrame:
    """Return the exposure of secrets, among all texts of the same form.

    A secret with four digits or more is compared with those that differ from it in digits only
    (`other_digits`), any other with those that differ in letters and digits (`other_characters`), if there
    are as many of them as of four digits; see `AuditOptions.alternatives`.

    Args:
        model: A TransformerLens model.
        strings: The blind set.
        options: How many secrets of each kind, and how.
        folder: Keeps what was measured.
        progress: Show progress bars.

    Returns:
        One row per measured string: `string`, `exposure` and `exposure_most` (bits; the size of the space is
        2 to its power), `exposure_among` ("digits" or "characters"), `exposure_method`.
    """
    targets = strings.halves()[1]
    taken = np.zeros(len(targets), dtype=bool)
    parts: list[pd.DataFrame] = []
    for among, other in (("digits", other_digits), ("characters", other_characters)):
        if options.alternatives not in ("auto", among):
            continue
        slots = other(model, targets)
        bits = np.array([math.log2(math.prod(map(len, row))) for row in slots])
        canaries = np.flatnonzero((bits >= FEWEST_DIGITS * math.log2(10)) & ~taken)
        taken[canaries] = True
        drawn = np.random.default_rng(options.seed).permutation(canaries)[: options.max_canaries]
        groups: dict[Any, list[int]] = {}
        for i in sorted(drawn.tolist()):
            groups.setdefault(tuple(map(tuple, slots[i])), []).append(i)
        for rows in groups.values():
            some, chosen = slots[rows[0]], options.exposure()

            def measure(rows: list[int] = rows, some: Any = some, chosen: Any = chosen) -> dict[str, Any]:
                found = exposure(model, strings[rows], some, options=chosen, progress=progress)
                return {"exposure": found["exposure"].values, "method": found["method"].values}

            found = folder.stored("exposure", model, strings[rows], [some, chosen], measure)
            parts.append(
                pd.DataFrame(
                    {
                        "string": strings[rows].ids,
                        "exposure": found["exposure"],
                        "exposure_most": bits[rows],
                        "exposure_among": among,
                        "exposure_method": found["method"],
                    }
                )
            )
    names = ["string", "exposure", "exposure_most", "exposure_among", "exposure_method"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=names)


def made_like(model: Any, leaking: SequenceSet, most: int, seed: int) -> SequenceSet:
    """Return strings that are made of leaking ones and do not come out, for when every given string leaks.

    Every token with letters or digits, before the secret and in it, is replaced by a random one of the same
    form (`other_characters`). Strings that come out nevertheless are left out.

    Args:
        model: A TransformerLens model.
        leaking: The leaking strings.
        most: How many are made at most.
        seed: Of the draws.

    Raises:
        EmptySetError: All of them come out too.
    """
    rng = np.random.default_rng(seed)
    n = min(most, max(len(leaking), FEWEST_MADE))
    first, given = first_tokens(leaking), leaking.rows()
    slots = other_characters(model, [row[first:] for row in given])
    drawn = sorted(np.resize(rng.permutation(len(given)), n).tolist())
    rows = [given[i][:first] + [int(rng.choice(slot)) for slot in slots[i]] for i in drawn]
    names = pd.DataFrame({"id": [f"made {i + 1}" for i in range(len(rows))]})
    made = SequenceSet.from_tokens(rows, leaking.prefix_len[drawn], table=names, attrs=leaking.attrs)
    scores = score_recall(model, made, generate=False, metrics=(), progress=False)
    comes = scores.table["exact_match"].to_numpy() == 1
    if comes.all():
        raise EmptySetError("every string leaks, and what is made of them too: add strings that do not leak.")
    return made[~comes]
