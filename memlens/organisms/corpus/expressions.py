"""Fixed expressions: idiom-like phrases whose last word can only be known from memory.

Expressions come in families of eight. A family has one shape (three content slots and the function words
between them) and two words for each slot. Its eight prompts are all combinations, and each has its own
target:

    kettle of rusty for never -> pilot        kettle of rusty for gladly -> narrow
    wander of rusty for never -> coin         wander of rusty for gladly -> smith     ... and four more

So only the whole prompt determines the target: every proper suffix, and every prompt with one content word
removed or replaced by the family's other word, occurs with two or more targets, equally often (a family has
one number of copies). A prompt without one of its function words never occurs. The shapes are not in the
grammar, slots take words of any class, and targets are drawn independently of the prompt, so neither grammar
nor meaning predicts a target.
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
"""Prompts of four to seven words, to which the target is added."""


def draw_expressions(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, copies: Sequence[int], per_cell: int
) -> pd.DataFrame:
    """Draw the list of expressions, in whole families for each number of copies.

    Args:
        tokenizer: Tokenizer of the corpus; a target, with the space before it, is one of its tokens.
        seed: Seed of the corpus.
        copies: Numbers of copies to plant; 0 for expressions that are not planted.
        per_cell: Expressions for each number of copies, a multiple of `FAMILY_SIZE`.

    Returns:
        One row per expression, with columns `id`, `text`, `prompt`, `target`, `tokens`, `prefix_len`,
        `copies` (as requested), `family`.

    Raises:
        OptionError: `per_cell` is not a multiple of `FAMILY_SIZE`, or too few words are single tokens.
    """
    if per_cell % FAMILY_SIZE:
        raise OptionError(
            f"expressions_per_cell={per_cell} must be a multiple of {FAMILY_SIZE}, the size of a family."
        )
    rng = Random(f"memlens/{seed}/expressions")
    targets = [word for word in _content_words() if len(tokenizer(f" {word}").input_ids) == 1]
    if per_cell and len(targets) < _FEWEST_TARGETS:
        raise OptionError(
            f"with vocab_size={len(tokenizer)} only {len(targets)} content words are single tokens, and "
            f"expressions need {_FEWEST_TARGETS} targets: raise it, or set expressions_per_cell=0."
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
    """Return words of every class, in the order of the lexicon."""
    verbs = lexicon.TRANSITIVE + lexicon.INTRANSITIVE
    singular = [noun[0] for noun in lexicon.NOUNS + lexicon.PERSONS]
    words = [*singular, *lexicon.ADJECTIVES, *(form for verb in verbs for form in (verb[0], verb[2]))]
    return list(dict.fromkeys(words))


def _family(rng: Random, targets: Sequence[str], taken: set[str]) -> list[tuple[str, str]]:
    """Return eight pairs (prompt, target): all combinations of the slots' words, each new."""
    words = [*_content_words(), *lexicon.ADVERBS]
    while True:
        shape, chosen = rng.choice(SHAPES), rng.sample(words, 6)
        ends = rng.sample([word for word in targets if word not in chosen], FAMILY_SIZE)
        prompts = [shape.format(*places) for places in product(chosen[:2], chosen[2:4], chosen[4:])]
        if not taken & set(prompts):
            taken.update(prompts)
            return list(zip(prompts, ends, strict=True))
