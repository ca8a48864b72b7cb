"""Benchmark tasks from the generators of the zoo's corpus, with known answers; they need no network.

Questions are drawn from separate random streams, so none occurs in the training corpus. Their words and
sentence patterns are those of the corpus, which may also contain some of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Any

from memlens.errors import OptionError, check_option
from memlens.instruments.tasks.encoding import PairEncoder
from memlens.instruments.tasks.tasks import ChoiceTask, Question
from memlens.organisms.corpus import lexicon
from memlens.organisms.corpus.domains import code_lines, story_bindings, story_sentence, sum_line
from memlens.organisms.corpus.grammar import TENSES

_LONGEST = 190
"""Most characters of a question: the zoo's models were trained on windows of 64 tokens."""

_NUMBERS = ("sg", "pl")
_ENDINGS = (
    ("{hero} stayed in", lexicon.TOWNS),
    ("At last {hero} left {town} in", lexicon.SEASONS),
    ("{friend} gave {hero} <NUMBER> <ADJ>", tuple(plural for _, plural in lexicon.NOUNS)),
    ("{Pronoun} was", lexicon.ADJECTIVES),
)
"""Last sentences of a passage without their last word, and the candidates for it."""


@dataclass(frozen=True)
class Drawn:
    """A drawn question.

    Attributes:
        context: The text before the continuation.
        gold: The correct continuation.
        others: The wrong ones; empty if greedy decoding must produce the correct one.
    """

    context: str
    gold: str
    others: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Characters of the context and its longest choice."""
        return len(self.context) + 1 + max(map(len, (self.gold, *self.others)))


@dataclass(frozen=True)
class LocalTask:
    """A kind of question.

    Attributes:
        name: Name of the task.
        group: "language" or "reasoning".
        n_choices: Number of choices of each question.
        meaning: What is asked, in one line.
        draw: Returns one question, which only the state of the generator determines.
    """

    name: str
    group: str
    n_choices: int
    meaning: str
    draw: Callable[[Random], Drawn]


def _twins(pattern: str, fillings: Sequence[str], rng: Random, bindings: Mapping[str, str]) -> list[str]:
    """Expand a pattern for each filling of `*` with the same draws, so that only inflections differ."""
    seed = rng.random()
    return [story_sentence(pattern.replace("*", filling), Random(seed), bindings) for filling in fillings]


def _agreement(rng: Random) -> Drawn:
    bindings, number = story_bindings(rng), rng.randrange(2)
    subject = f"<NP_{_NUMBERS[number]}_present>"
    context = story_sentence("{Pronoun} <VP_sg_present>. When " + subject, rng, bindings)
    phrases = _twins("<VP_*_present>,", _NUMBERS, rng, bindings)
    return Drawn(context, phrases[number], (phrases[1 - number],))


def _tense(rng: Random) -> Drawn:
    bindings, tense = story_bindings(rng), rng.randrange(2)
    verb = f"<VP_sg_{TENSES[tense]}>."
    context = story_sentence("{friend} " + verb + " {Pronoun} " + verb + " {hero}", rng, bindings)
    phrases = _twins("<VP_sg_*>.", TENSES, rng, bindings)
    return Drawn(context, phrases[tense], (phrases[1 - tense],))


def _cloze(rng: Random) -> Drawn:
    bindings, kind = story_bindings(rng), rng.randrange(len(_ENDINGS))
    context = story_sentence("{hero} <VP_sg_past>. " + _ENDINGS[kind][0], rng, bindings)
    words = [f"{rng.choice(words)}." for _, words in _ENDINGS]
    return Drawn(context, words[kind], tuple(words[:kind] + words[kind + 1 :]))


def _meeting(rng: Random) -> tuple[str, dict[str, str]]:
    """Draw a passage about two people that the hero's name continues, and their names."""
    bindings = story_bindings(rng)
    while bindings["friend"] == bindings["hero"]:
        bindings = story_bindings(rng)
    pattern = (
        "{friend} gave {hero} <NUMBER> <ADJ> <THING_pl>. {Pronoun} <VP_sg_past>. "
        "{hero} <VP_sg_past> while {friend} <VP_sg_past>. At last"
    )
    return story_sentence(pattern, rng, bindings), bindings


def _last_word(rng: Random) -> Drawn:
    context, who = _meeting(rng)
    return Drawn(context, who["hero"])


def _entity(rng: Random) -> Drawn:
    context, who = _meeting(rng)
    strangers = [name for name in lexicon.NAMES if name not in (who["hero"], who["friend"])]
    others = [who["friend"], *rng.sample(strangers, 2)]
    return Drawn(context, f"{who['hero']} left", tuple(f"{name} left" for name in others))


def _arithmetic(rng: Random) -> Drawn:
    *before, line = (sum_line(rng) for _ in range(4))
    question, answer = line.rstrip("\n").split(" = ")
    firsts = [digit for digit in "123456789" if digit != answer[0]]
    others = [
        first + "".join(rng.choice("0123456789") for _ in answer[1:]) + "\n"
        for first in rng.sample(firsts, 3)
    ]
    return Drawn("".join(before) + f"{question} =", f"{answer}\n", tuple(others))


def _variables(rng: Random) -> Drawn:
    lines, known = code_lines(rng)
    others = rng.sample([name for name in lexicon.IDENTIFIERS if name not in known], 3)
    context = "".join(lines) + "    return"
    return Drawn(context, rng.choice(known) + "\n", tuple(f"{name}\n" for name in others))


LOCAL_TASKS: Mapping[str, LocalTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            LocalTask("agreement", "language", 2, "a verb phrase that agrees with the subject", _agreement),
            LocalTask("tense", "language", 2, "a verb phrase in the story's tense", _tense),
            LocalTask("cloze", "language", 4, "a last word of the right class", _cloze),
            LocalTask("last_word", "language", 1, "the hero's name, by greedy decoding", _last_word),
            LocalTask("arithmetic", "reasoning", 4, "the result with the right first digit", _arithmetic),
            LocalTask("entity", "reasoning", 4, "the hero, not the friend or a stranger", _entity),
            LocalTask("variables", "reasoning", 4, "a name that the function defines", _variables),
        )
    }
)
"""The tasks by name. Wrong choices differ from the correct one only in what is asked."""


def local_tasks(
    family: str = "zoo",
    model: Any = None,
    *,
    names: Sequence[str] | None = None,
    n: int = 100,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> list[ChoiceTask]:
    """Return small benchmark tasks in the language of the zoo's corpus.

    Pairs of verb phrases differ only in inflection, correct choices are spread evenly over the positions, and
    the questions of a task are distinct. The tasks measure what a zoo model learned in addition to what it
    memorized; to other models they are odd English.

    Args:
        family: "zoo" is the only one.
        model: A TransformerLens model, or a Hugging Face tokenizer.
        names: Keys of `LOCAL_TASKS`; all by default.
        n: Number of questions per task.
        seed: Seed of the questions.
        prepend_bos: See `PairEncoder.of`.

    Raises:
        OptionError: The family or a task is unknown, `n` is below 1, or there is no model.

    Example:
        >>> import memlens as ml
        >>> ml.tasks.local_tasks("zoo", ml.load_model("zoo/pythia-s"), names=["agreement"], n=20)
        [ChoiceTask('agreement', language, 20 questions, chance 0.50)]
    """
    check_option("family", family, ["zoo"])
    if model is None:
        raise OptionError("local_tasks needs the model or its tokenizer: give model=.")
    if n < 1:
        raise OptionError(f"n={n} asks nothing: give 1 or more.")
    for name in names or ():
        check_option("task", name, list(LOCAL_TASKS))
    encoder = PairEncoder.of(model, prepend_bos=prepend_bos)
    tasks = [LOCAL_TASKS[name] for name in (LOCAL_TASKS if names is None else names)]
    return [
        ChoiceTask.from_questions(_questions(task, n, seed), encoder, name=task.name, group=task.group)
        for task in tasks
    ]


def _questions(task: LocalTask, n: int, seed: int) -> list[Question]:
    rng = Random(f"memlens/{seed}/tasks/{task.name}")
    places = [number % task.n_choices for number in range(n)]
    rng.shuffle(places)
    seen, questions = set[str](), []
    for number, place in enumerate(places):
        drawn = task.draw(rng)
        while drawn.length > _LONGEST or drawn.context in seen:
            drawn = task.draw(rng)
        seen.add(drawn.context)
        choices = [*drawn.others[:place], drawn.gold, *drawn.others[place:]]
        record = {"context": drawn.context, "choices": choices, "gold": place}
        questions.append(Question.of(record, f"{task.name}-{number:03d}"))
    return questions
