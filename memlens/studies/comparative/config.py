"""Which models and which sequences: names on the command line, or a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import FileFormatError, OptionError, SourceNotFoundError, near_matches
from memlens.models.families import find_model
from memlens.models.zoo import is_zoo_name
from memlens.sequences.readers.load import load_sequences
from memlens.sequences.set import SequenceSet
from memlens.studies.comparative.options import ComparativeOptions
from memlens.studies.running import at_most

_TWIN = re.compile(r"-(clean|untrained)$")
_SIZE = re.compile(r"-(xs|s|m|l|xl)$")


@dataclass(frozen=True)
class StudyModel:
    """One model of the study.

    Attributes:
        name: What `load_model` takes: a zoo name, a hub name, a checkpoint folder, a `.gguf` file.
        revision: On the hub; None: main.
        checkpoint_step: A training step of it, as for `load_model`.
        family: None: the family table's, or what the zoo's name or the architecture says.
        corpus: What it was trained on, for the record; None: the family table's.
        counts: How often its tokens stand in that corpus: a `.npy` file of one count a token id, or
            "zoo/NAME"; None: the zoo's own, else they are counted in the scored sequences.
        control: A model that is no member of its family's series (a clean or untrained twin): it has its
            rows, and no part in fits, families and findings. None: by the zoo's names.
        checkpoints: Training steps that are followed.
        backend: As for `load_model`.
        dtype: As for `load_model`.
        device: As for `load_model`.
        model: A model that is loaded already, instead of loading `name`.
    """

    name: str
    revision: str | None = None
    checkpoint_step: int | None = None
    family: str | None = None
    corpus: str | None = None
    counts: str | None = None
    control: bool | None = None
    checkpoints: tuple[int, ...] = ()
    backend: str = "auto"
    dtype: str = "float32"
    device: str | None = None
    model: Any = field(default=None, repr=False, compare=False)

    @property
    def label(self) -> str:
        """Its name in tables and figures, with what tells it from others of the name."""
        if self.checkpoint_step is not None:
            return f"{self.name}@step{self.checkpoint_step}"
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def is_control(self) -> bool:
        """Whether it is a twin that stands beside the families."""
        return bool(_TWIN.search(self.name)) if self.control is None else self.control

    def family_of(self, described: Mapping[str, Any]) -> str:
        """Return its family: as given, by name, or by the loaded model's architecture.

        >>> StudyModel("zoo/gpt-neo-s-clean").family_of({}), StudyModel("pythia-70m").family_of({})
        ('gpt-neo', 'pythia')
        """
        if self.family is not None:
            return self.family
        if is_zoo_name(self.name):
            return _SIZE.sub("", _TWIN.sub("", self.name.removeprefix("zoo/")))
        found = find_model(self.name)
        return found[0].name if found is not None else str(described.get("family", "unknown"))

    @property
    def corpus_of(self) -> str:
        """Its training corpus, "" where it is not known."""
        found = find_model(self.name)
        if self.corpus is not None or found is None:
            return self.corpus or ("the zoo's" if is_zoo_name(self.name) else "")
        return found[1].corpus or found[0].corpus

    def settings(self) -> dict[str, Any]:
        """Return the fields as JSON would hold them, without a loaded model."""
        return {key: value for key, value in asdict(replace(self, model=None)).items() if key != "model"}


@dataclass(frozen=True)
class StudyConfig:
    """What a YAML file says.

    Attributes:
        models: The models.
        sources: Domain to source of sequences; "" for one source that tells domains itself.
        options: Options of the study.
    """

    models: tuple[StudyModel, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    options: ComparativeOptions = field(default_factory=ComparativeOptions)


def parse_model(given: str | StudyModel | Mapping[str, Any] | Any) -> StudyModel:
    """Return a model of the study from a name, "NAME@REVISION", "NAME@stepN", fields, or a loaded model.

    Raises:
        OptionError: Unknown fields, or no name.

    >>> parse_model("zoo/pythia-s@step200").checkpoint_step, parse_model("a/b@v1").revision
    (200, 'v1')
    """
    if isinstance(given, StudyModel):
        return given
    if isinstance(given, Mapping):
        return _from_fields(given)
    if isinstance(given, str | Path):
        name, at, revision = str(given).rpartition("@")
        if not at or Path(str(given)).exists():
            return StudyModel(str(given))
        step = re.fullmatch(r"step(\d+)", revision)
        if step and is_zoo_name(name):
            return StudyModel(name, checkpoint_step=int(step[1]))
        return StudyModel(name, revision=revision)
    from memlens.models.provenance import describe

    return StudyModel(str(describe(given)["model"]), model=given)


def _from_fields(given: Mapping[str, Any]) -> StudyModel:
    known = [f.name for f in fields(StudyModel) if f.name != "model"]
    for key in given:
        if key not in known:
            raise OptionError(
                f"a model has no field {key!r}: it has {', '.join(known)}.{near_matches(str(key), known)}"
            )
    if "name" not in given:
        raise OptionError(f"the model {dict(given)} has no name: give one.")
    more: dict[str, Any] = {key: value for key, value in given.items() if key != "name"}
    more["checkpoints"] = tuple(given.get("checkpoints") or ())
    return replace(parse_model(str(given["name"])), **more)


def parse_sources(given: Sequence[str]) -> dict[str, str]:
    """Return domain to source from "DOMAIN=SOURCE" entries, or one source for all.

    Raises:
        OptionError: Several sources without domains, or a domain twice.

    >>> parse_sources(["zoo"]), parse_sources(["code=a.jsonl", "web=b.jsonl"])
    ({'': 'zoo'}, {'code': 'a.jsonl', 'web': 'b.jsonl'})
    """
    found: dict[str, str] = {}
    for entry in given:
        domain, equals, source = entry.partition("=")
        domain, source = (domain, source) if equals else ("", entry)
        if domain in found or ("" in found) or (not domain and found):
            raise OptionError(
                f"--sequences {' '.join(given)} is not clear: give one source, or DOMAIN=SOURCE for each "
                "domain."
            )
        found[domain] = source
    return found


def read_config(path: str | Path) -> StudyConfig:
    """Read the models, domains and options of a study from a YAML file.

    The file has the keys `models` (a list of names or of mappings with the fields of `StudyModel`), `domains`
    (domain to source) or `sequences` (one source), and `options` (fields of `ComparativeOptions`). Sources
    and counts that are files may be given relative to the YAML file.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: It is no YAML, or not of this form.
        OptionError: Unknown keys or options.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise SourceNotFoundError(f"there is no configuration {path}: give a YAML file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is no YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict):
        raise FileFormatError(
            f"{path} holds a {type(content).__name__}: give keys such as models and domains."
        )
    known = ["models", "domains", "sequences", "options"]
    for key in content:
        if key not in known:
            raise OptionError(
                f"{path} has {key!r}: it may have {', '.join(known)}.{near_matches(str(key), known)}"
            )
    sources = {str(k): _beside(path, str(v)) for k, v in (content.get("domains") or {}).items()}
    if "sequences" in content:
        sources = {"": _beside(path, str(content["sequences"]))}
    models = [parse_model(entry) for entry in content.get("models") or []]
    models = [replace(m, counts=_beside(path, m.counts)) if m.counts else m for m in models]
    return StudyConfig(tuple(models), sources, _options(content.get("options") or {}, path))


def _options(given: Mapping[str, Any], path: Path) -> ComparativeOptions:
    known = [f.name for f in fields(ComparativeOptions)]
    for key in given:
        if key not in known:
            raise OptionError(
                f"{path} sets the option {key!r}, which there is not.{near_matches(str(key), known)}"
            )
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
    }
    return ComparativeOptions(**values)


def _beside(config: Path, source: str) -> str:
    """Return a source that lies beside the configuration by its path, any other as it is."""
    near = config.parent / source
    return str(near) if not Path(source).is_absolute() and near.exists() else source


def read_domains(
    sources: Mapping[str, Any] | str | SequenceSet, model: Any, options: ComparativeOptions
) -> SequenceSet:
    """Return the sequences of all domains, tokenized for a model, with a column `domain`.

    Args:
        sources: Domain to source; one source whose table may tell domains (else all are of "all").
        model: The model whose tokenizer is used.
        options: Prefix, targets, and how many of each domain.
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
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.concat(part)
    return per_domain(joined, options.max_per_domain, options.seed)


def per_domain(seqs: SequenceSet, most: int | None, seed: int) -> SequenceSet:
    """Return at most so many sequences of each domain: a random choice where there are more."""
    if most is None:
        return seqs
    labels = seqs.table["domain"].astype(str).to_numpy()
    rows = []
    for i, domain in enumerate(pd.unique(labels)):
        own = np.flatnonzero(labels == domain)
        chosen = at_most(seqs[own], most, seed + i)
        rows += own[seqs.table["id"].iloc[own].isin(chosen.ids).to_numpy()].tolist()
    return seqs[np.sort(np.array(rows, dtype=int))]
