"""Suites: which organisms a run of the benchmark makes, and where their text comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import yaml
from pydantic import Field, NonNegativeInt, PositiveInt

from memlens.errors import MemlensError, OptionError, SequenceError, near_matches
from memlens.files import parsing
from memlens.models.families import family_of
from memlens.models.huggingface import load_config, load_tokenizer, load_weights
from memlens.models.load import load_model
from memlens.models.names import resolve_source
from memlens.models.quiet import quiet
from memlens.models.zoo import is_zoo_name, zoo_path
from memlens.options import options_class, read_options
from memlens.organisms.corpus.domains import documents
from memlens.organisms.evaluate import read_ground_truth
from memlens.organisms.planting.carriers import Carrier
from memlens.organisms.planting.certificate import CertificateOptions
from memlens.organisms.planting.plant import PlantingOptions
from memlens.sequences.set import SequenceSet


@options_class
class Suite:
    """What a run of the benchmark plants, and which localizers it compares.

    Example:
        >>> import memlens as ml
        >>> suite = ml.benchmark.Suite(models=("zoo/pythia-s",), carriers=("heads=4",), sequences=2)
        >>> len(list(suite.organisms()))
        2
    """

    models: tuple[str, ...] = Field(kw_only=True, min_length=1)
    """Models that are planted into: zoo names, hub names or checkpoint folders."""
    carriers: tuple[str, ...] = Field(kw_only=True, min_length=1)
    """Carriers, such as neurons=30, heads=4, mlp, attention, path=15, spread and none."""
    sequences: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Organisms for each model and carrier; each holds one sequence of its own."""
    others: Annotated[int, Field(ge=3, le=10_000)] = 16
    """Sequences that were not planted, for references, controls and "less others"."""
    localizers: tuple[str, ...] | None = None
    """Names of the localizers; by default all that are registered."""
    first_seed: NonNegativeInt = 100
    """Seed of the first organism. Seeds below 100 are for developing methods."""
    prefix_len: PositiveInt = 32
    """Tokens of the prompt."""
    continuation_len: PositiveInt = 32
    """Planted tokens that follow."""
    twin: bool = True
    """Whether to also compare with the model without the memory."""
    planting: PlantingOptions = PlantingOptions()
    """How memories are planted."""
    certificate: CertificateOptions = CertificateOptions()
    """What an organism must show to be used."""
    about: str = ""
    """What the suite is for."""

    def organisms(self) -> Iterator[Planned]:
        """Return every organism of the suite, in order."""
        for model in self.models:
            for carrier in self.carriers:
                for i in range(self.sequences):
                    yield Planned(model, Carrier.parse(carrier), i, self.first_seed + i)


class Planned(NamedTuple):
    """One organism of a suite.

    Attributes:
        model: The base model's name.
        carrier: What it is written into.
        row: Which of the model's sequences.
        seed: Of components and training.
    """

    model: str
    carrier: Carrier
    row: int
    seed: int

    @property
    def name(self) -> str:
        """A name that files may have."""
        model = self.model.rstrip("/").split("/")[-1]
        return f"{model}--{str(self.carrier).replace('=', '-')}--{self.seed}"


def read_suite(suite: str | Path | Suite, **changes: Any) -> Suite:
    """Return a suite by its name, or from a YAML file with the fields of `Suite`.

    Args:
        suite: "mini", "standard", "transfer" or "inj", the path of a file, or a suite.
        changes: Fields to replace; None leaves a field as it is.

    Raises:
        OptionError: An unknown name, or a value that is not allowed.
        FileFormatError: The file is not a YAML mapping.

    Example:
        >>> import memlens as ml
        >>> ml.benchmark.read_suite("mini", sequences=2).sequences
        2
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    if isinstance(suite, Suite):
        return replace(suite, **changes)
    if suite in suites():
        return _suite(str(suite), dict(suites()[str(suite)]), changes)
    if Path(suite).suffix in (".yaml", ".yml") and Path(suite).is_file():
        with parsing(suite, OptionError, "correct it"):
            return _suite(str(suite), read_options(suite, Suite), changes)
    raise OptionError(
        f"there is no suite {str(suite)!r}: choose from {', '.join(suites())}, or give a .yaml file."
        f"{near_matches(str(suite), suites())}"
    )


def model_family(model: str) -> str:
    """Return the family of a model that is named; "" where it cannot be read here."""
    try:
        return family_of(load_config(resolve_source(model)), name=model)
    except (MemlensError, OSError):
        return ""


def of_families(suite: Suite, families: Sequence[str]) -> Suite:
    """Return a suite with only its models of some families.

    Raises:
        OptionError: A family of which the suite has no model.

    >>> of_families(read_suite("inj"), ["openllama"]).models
    ('zoo/openllama-s',)
    """
    own = {model: model_family(model) for model in suite.models}
    missing = [family for family in families if family not in own.values()]
    if missing:
        raise OptionError(
            f"the suite has no model of the family {missing[0]!r}: choose from "
            f"{', '.join(sorted(set(own.values()) - {''}))}."
        )
    return replace(suite, models=tuple(m for m, family in own.items() if family in families))


def _suite(name: str, fields: dict[str, Any], changes: dict[str, Any]) -> Suite:
    for part, cls in (("planting", PlantingOptions), ("certificate", CertificateOptions)):
        if isinstance(fields.get(part), dict):
            fields[part] = cls(**fields[part])
    fields |= changes
    if not fields.get("models"):
        raise OptionError(f"the suite {name!r} names no model: give models=.")
    made = Suite(**fields)
    for carrier in made.carriers:
        Carrier.parse(carrier)
    return made


@cache
def suites() -> dict[str, dict[str, Any]]:
    """Return the suites that come with memlens, by name."""
    return yaml.safe_load((files("memlens.benchmark") / "suites.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Material:
    """A base model with the texts that organisms are made with.

    Attributes:
        name: The base model's name.
        planted: One sequence for each organism.
        others: Sequences of the same kind that are never planted.
        training: Text on which planting keeps the model as it was.
        heldout: Text on which certificates measure harm.
    """

    name: str
    planted: SequenceSet
    others: SequenceSet
    training: SequenceSet
    heldout: SequenceSet

    def base(self) -> Any:
        """Return the base model anew, as a Hugging Face model in float32."""
        import torch

        source = resolve_source(self.name)
        with quiet():
            config = load_config(source)
            return load_weights(source, config, dtype=torch.float32, device=torch.device("cpu")).eval()

    @cached_property
    def twin(self) -> Any:
        """The base model as a TransformerLens model; it shares no weights with what `base` returns."""
        with quiet():
            return load_model(self.base(), check_weights=False)

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        with quiet():
            return load_tokenizer(resolve_source(self.name))


_N_TEXTS = 64


def material(name: str, suite: Suite) -> Material:
    """Return the texts for organisms of a model.

    For a model of the zoo, sequences that its corpus never planted, and its held-out rows. For any other
    model, invented stories (`memlens.organisms.corpus`), tokenized by the model's own tokenizer, so that
    nothing can have been memorized before.

    Raises:
        SequenceError: The model has fewer sequences than the suite asks for.
    """
    length, n = suite.prefix_len + suite.continuation_len, suite.sequences + suite.others
    if is_zoo_name(name):
        folder = zoo_path(name)
        table = read_ground_truth(folder, "sequences")
        rows = [list(map(int, t[:length])) for t in table.loc[table["copies"] == 0, "tokens"]]
        order = np.random.default_rng(0).permutation(len(rows))  # not domain by domain
        rows = [rows[i] for i in order]
        texts = [list(map(int, t[:length])) for t in read_ground_truth(folder, "heldout")["tokens"]]
        texts = [texts[i] for i in np.random.default_rng(1).permutation(len(texts))[: 2 * _N_TEXTS]]
    else:
        with quiet():
            tokenizer = load_tokenizer(resolve_source(name))
        found = list(islice(invented_rows(tokenizer, length), n + 2 * _N_TEXTS))
        rows, texts = found[:n], found[n:]
    if len(rows) < n:
        raise SequenceError(
            f"{name} has {len(rows)} sequences that were not planted, the suite needs {n}: lower "
            "sequences or others."
        )
    sets = [rows[: suite.sequences], rows[suite.sequences : n], texts[:_N_TEXTS], texts[_N_TEXTS:]]
    made = [SequenceSet.from_tokens(part, suite.prefix_len) for part in sets]
    return Material(name, *made)


def invented_rows(tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Yield rows of `length` tokens, each the beginning of an invented story that is long enough."""
    for text in documents("text", 0, "benchmark"):
        row = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(row) >= length:
            yield row[:length]


def check_localizers(names: Sequence[str] | None) -> None:
    """Raise `OptionError` for a name that no localizer has."""
    from memlens.benchmark.localizer import LOCALIZERS

    for name in names or ():
        LOCALIZERS[name]
