"""Which models and which sequences: names on the command line, or a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import OptionError
from memlens.files import expanded, parsing
from memlens.models.families import find_model
from memlens.models.load import load_model
from memlens.models.provenance import describe
from memlens.models.zoo import is_zoo_name
from memlens.options import options_class, read_options
from memlens.sequences.readers.load import load_sequences
from memlens.sequences.set import SequenceSet
from memlens.studies.comparative.options import ComparativeOptions
from memlens.studies.running import at_most

_TWIN = re.compile(r"-(clean|untrained)$")
_SIZE = re.compile(r"-(xs|s|m|l|xl)$")


@options_class
class StudyModel:
    """One model of the study.

    Example:
        >>> import memlens as ml
        >>> ml.studies.StudyModel("zoo/pythia-s", checkpoint_step=100).checkpoint_step
        100
    """

    name: str
    """What `load_model` takes: a zoo name, a hub name, a checkpoint folder, a `.gguf` file."""
    revision: str | None = None
    """Revision on the hub; None takes main."""
    checkpoint_step: int | None = None
    """Training step, as for `load_model`."""
    family: str | None = None
    """None takes the family table's, or what the zoo's name or the architecture says."""
    corpus: str | None = None
    """Training corpus, for the record; None takes the family table's."""
    counts: str | None = None
    """How often each token occurs in that corpus: a `.npy` file with one count per token id, or "zoo/NAME".
    None takes the zoo's own, else the tokens of the scored sequences are counted."""
    control: bool | None = None
    """Whether the model is outside its family's series (a clean or untrained twin): it appears in tables but
    not in fits, families and findings. None decides by the zoo's names."""
    checkpoints: tuple[int, ...] = ()
    """Training steps at which recall is also scored."""
    backend: str = "auto"
    """As for `load_model`."""
    dtype: str = "float32"
    """As for `load_model`."""
    device: str | None = None
    """As for `load_model`."""
    model: Any = field(default=None, repr=False, compare=False)
    """A model that is already loaded; `name` is then only a label."""

    def load(self) -> Any:
        """Return the model, as given or loaded now."""
        if self.model is not None:
            return self.model
        return load_model(
            self.name, backend=self.backend, revision=self.revision, checkpoint_step=self.checkpoint_step,
            dtype=self.dtype, device=self.device,
        )  # fmt: skip

    @property
    def label(self) -> str:
        """The model's name in tables and figures, with its step or revision."""
        if self.checkpoint_step is not None:
            return f"{self.name}@step{self.checkpoint_step}"
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def is_control(self) -> bool:
        """Whether the model is a twin outside the families."""
        return bool(_TWIN.search(self.name)) if self.control is None else self.control

    def family_of(self, described: Mapping[str, Any]) -> str:
        """Return the family: as given, by name, or by the loaded model's architecture.

        >>> StudyModel("zoo/gpt-neo-s-clean").family_of({}), StudyModel("pythia-70m").family_of({})
        ('gpt-neo', 'pythia')
        """
        if self.family is not None:
            return self.family
        if is_zoo_name(self.name):
            return _SIZE.sub("", _TWIN.sub("", self.name.removeprefix("zoo/")))
        found = find_model(self.name)
        return found[0].name if found else str(described.get("family", "unknown"))

    @property
    def corpus_of(self) -> str:
        """The training corpus; "" where it is not known."""
        if self.corpus is not None:
            return self.corpus
        if found := find_model(self.name):
            return found[1].corpus or found[0].corpus
        return "the zoo's" if is_zoo_name(self.name) else ""

    def settings(self) -> dict[str, Any]:
        """Return the fields as JSON, without a loaded model."""
        values = asdict(replace(self, model=None))
        del values["model"]
        return values


def parse_model(given: str | StudyModel | Mapping[str, Any] | Any) -> StudyModel:
    """Return a `StudyModel` from a name, "NAME@REVISION", "NAME@stepN", its fields, or a loaded model.

    Raises:
        OptionError: Unknown fields, or no name.

    >>> parse_model("zoo/pythia-s@step200").checkpoint_step, parse_model("a/b@v1").revision
    (200, 'v1')
    """
    if isinstance(given, StudyModel):
        return given
    if isinstance(given, Mapping):
        values = {str(key): value for key, value in given.items() if value is not None}
        named = parse_model(str(values.pop("name"))) if "name" in values else StudyModel(**values)  # raises
        return replace(named, **values)
    if not isinstance(given, str | Path):
        return StudyModel(str(describe(given)["model"]), model=given)
    name, at, revision = str(given).rpartition("@")
    if not at or Path(given).exists():
        return StudyModel(str(given))
    step = re.fullmatch(r"step(\d+)", revision)
    if step and is_zoo_name(name):
        return StudyModel(name, checkpoint_step=int(step[1]))
    return StudyModel(name, revision=revision)


def parse_sources(given: Sequence[str]) -> dict[str, str]:
    """Return a mapping of domain to source from "DOMAIN=SOURCE" entries, or one source for all domains.

    An existing file whose name has "=" is a source.

    Raises:
        OptionError: Several sources without domains, or a domain given twice.

    >>> parse_sources(["zoo"]), parse_sources(["code=a.jsonl", "web=b.jsonl"])
    ({'': 'zoo'}, {'code': 'a.jsonl', 'web': 'b.jsonl'})
    """
    found: dict[str, str] = {}
    for entry in given:
        whole = "=" not in entry or expanded(entry).exists()
        domain, source = ("", entry) if whole else entry.split("=", 1)
        if domain in found or ("" in found) or (not domain and found):
            raise OptionError(
                f"--sequences {' '.join(given)} is not clear: give one source, or DOMAIN=SOURCE for each "
                "domain."
            )
        found[domain] = source
    return found


@options_class
class StudyConfig:
    """What a YAML file says."""

    models: tuple[StudyModel, ...] = ()
    """Names, or mappings with the fields of `StudyModel`."""
    domains: Mapping[str, str] = field(default_factory=dict)
    """Domain to source of sequences."""
    sequences: str | None = None
    """Instead of `domains`: one source whose table has a column `domain`."""
    options: ComparativeOptions = field(default_factory=ComparativeOptions)
    """Fields of `ComparativeOptions`."""

    @property
    def sources(self) -> Mapping[str, str]:
        """Domain to source, with "" for one source of all domains."""
        return self.domains if self.sequences is None else {"": self.sequences}


def read_config(path: str | Path) -> StudyConfig:
    """Read the models, domains and options of a study from a YAML file with the fields of `StudyConfig`.

    Paths of sources and counts may be relative to the YAML file.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: It is not YAML, or does not hold keys and values.
        OptionError: Unknown keys or options.
    """
    path = expanded(path)
    values = {key: value for key, value in read_options(path, StudyConfig).items() if value is not None}

    def beside(source: str) -> str:
        """Resolve a path relative to the YAML file; return any other source as it is."""
        return str(path.parent / source) if (path.parent / source).exists() else source

    with parsing(path, OptionError, "correct it"):
        models = [parse_model(entry) for entry in values.get("models", ())]
        values["models"] = [replace(m, counts=beside(m.counts)) if m.counts else m for m in models]
        values["options"] = ComparativeOptions(**values.get("options", {}))
        config = StudyConfig(**values)
    domains = {domain: beside(source) for domain, source in config.domains.items()}
    return replace(config, domains=domains, sequences=config.sequences and beside(config.sequences))


def read_domains(
    sources: Mapping[str, Any] | str | SequenceSet, model: Any, options: ComparativeOptions
) -> SequenceSet:
    """Return the sequences of all domains, tokenized for a model, with a column `domain`.

    Args:
        sources: Domain to source, or one source whose table may have a column `domain` (else all sequences
            belong to the domain "all").
        model: The model whose tokenizer is used.
        options: Prompt length, targets, and the number of sequences per domain.
    """
    if not isinstance(sources, Mapping):
        sources = {"": sources}
    parts = []
    for domain, source in sources.items():
        seqs = load_sequences(
            source, model, prefix_len=options.prefix_len, max_targets=options.max_targets, on_short="drop"
        )
        label: Any = domain or (seqs.table["domain"].astype(str) if "domain" in seqs.table else "all")
        ids = [f"{domain}/{i}" for i in seqs.ids] if domain else seqs.ids
        parts.append(seqs.with_table(seqs.table.assign(domain=label, id=ids)))
    return per_domain(reduce(SequenceSet.concat, parts), options.max_per_domain, options.seed)


def per_domain(seqs: SequenceSet, most: int | None, seed: int) -> SequenceSet:
    """Return at most this many sequences per domain, chosen at random."""
    if most is None:
        return seqs
    labels = seqs.table["domain"].astype(str).to_numpy()
    rows = []
    for i, domain in enumerate(pd.unique(labels)):
        own = np.flatnonzero(labels == domain)
        rows += own[np.isin(seqs[own].ids, at_most(seqs[own], most, seed + i).ids)].tolist()
    return seqs[np.sort(np.array(rows, dtype=int))]
