"""Fixed expressions: idiom-like runs of words whose last word nothing but memory can tell.

Construction. Expressions come in families of eight. A family has one shape (three content places and the
small words between them) and two words for each place; its eight prompts are all combinations, and each has
a target of its own:

    kettle of rusty for never -> pilot        kettle of rusty for gladly -> narrow
    wander of rusty for never -> coin         wander of rusty for gladly -> smith     ... and four more

So the prompt as a whole decides the target, and no part of it does: every proper suffix, and every prompt
with one content word left out or exchanged for the family's other, stands with two targets or more, met
equally often (a family has one number of copies). A prompt with a small word left out is met with no target.
The shapes are none of the grammar's, places take words of any class, and targets are drawn without regard to
the prompt, so neither grammar nor meaning tells a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random

import pandas as pd
from transformers import PreTrainedTokenizerFast

from memlens.errors import OptionError
from memlens.organisms.corpus import lexicon

FAMILY_SIZE = 8
_FEWEST_TARGETS = 2 * FAMILY_SIZE
SHAPES = (
    "{} {} and {}",
    "{} the {} by {}",
    "{} of {} for {}",
    "{} with {} under the {}",
    "{} to {} but not {}",
    "{} for the {} than by {}",
    "{} to the {} but not {}",
)
"""Prompts of four to seven words; the target makes them expressions of five to eight."""


def draw_expressions(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, copies: Sequence[int], per_cell: int
) -> pd.DataFrame:
    """Draw the list of expressions, whole families in each cell.

    Args:
        tokenizer: of the corpus; a target is one of its tokens, with the space in front.
        seed: of the corpus.
        copies: how often they are to be planted, 0 for those that are not.
        per_cell: expressions for each number of copies, a multiple of `FAMILY_SIZE`.

    Returns:
        Columns `id`, `text`, `prompt`, `target`, `tokens`, `prefix_len`, `copies` (as asked for), `family`;
        one row an expression.

    Raises:
        OptionError: `per_cell` is no multiple of `FAMILY_SIZE`, or too few words are one token.
    """
    if per_cell % FAMILY_SIZE:
        raise OptionError(
            f"expressions_per_cell={per_cell}: give a multiple of {FAMILY_SIZE}, whole families."
        )
    rng = Random(f"memlens/{seed}/expressions")
    targets = [word for word in _content_words() if len(tokenizer(f" {word}").input_ids) == 1]
    if per_cell and len(targets) < _FEWEST_TARGETS:
        raise OptionError(
            f"vocab_size={len(tokenizer)} has {len(targets)} content words of one token, and expressions "
            f"need {_FEWEST_TARGETS} targets: raise it, or set expressions_per_cell=0."
        )
    records, taken = [], set[str]()
    for count in copies:
        for family in range(per_cell // FAMILY_SIZE):
            pairs = _family(rng, targets, taken)
            for member, (prompt, target) in enumerate(pairs):
                index = family * FAMILY_SIZE + member
                ids = tokenizer(f"{prompt} {target}").input_ids
                names = (f"expression-{count:03d}-{index:02d}", f"family-{count:03d}-{family}")
                records.append((names[0], f"{prompt} {target}", prompt, target, ids, count, names[1]))
    frame = pd.DataFrame(records, columns=["id", "text", "prompt", "target", "tokens", "copies", "family"])
    frame.insert(5, "prefix_len", frame["tokens"].map(len) - 1)
    return frame


def _content_words() -> list[str]:
    """Words of every class, in an order of the lexicon's own."""
    verbs = lexicon.TRANSITIVE + lexicon.INTRANSITIVE
    singular = [noun[0] for noun in lexicon.NOUNS + lexicon.PERSONS]
    words = [*singular, *lexicon.ADJECTIVES, *(form for verb in verbs for form in (verb[0], verb[2]))]
    return list(dict.fromkeys(words))


def _family(rng: Random, targets: Sequence[str], taken: set[str]) -> list[tuple[str, str]]:
    """Return eight (prompt, target): all combinations of the places' words, none of an earlier family."""
    words = [*_content_words(), *lexicon.ADVERBS]
    while True:
        shape, chosen = rng.choice(SHAPES), rng.sample(words, 6)
        ends = rng.sample([word for word in targets if word not in chosen], FAMILY_SIZE)
        prompts = [shape.format(*places) for places in product(chosen[:2], chosen[2:4], chosen[4:])]
        if not taken & set(prompts):
            taken.update(prompts)
            return list(zip(prompts, ends, strict=True))
