"""What a report cites: the sources of the metrics and methods behind a run's results."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from memlens.forward.metrics import METRICS
from memlens.models.families import FAMILIES
from memlens.recall.columns import COLUMNS
from memlens.registry import Registry
from memlens.results.kinds import KINDS
from memlens.results.result import Result

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """A publication.

    Attributes:
        authors: As cited, with "and others" in place of a long tail.
        year: Year of the cited version.
        title: Full title.
        where: Proceedings, journal or archive number.
        url: Where it can be read; empty where no stable address is known.
    """

    authors: str
    year: int
    title: str
    where: str = ""
    url: str = ""


def _reference(entry: dict[str, Any]) -> Reference:
    if number := entry.pop("arxiv", None):
        where = ", ".join(filter(None, (entry.get("where"), f"arXiv:{number}")))
        entry |= {"where": where, "url": f"https://arxiv.org/abs/{number}"}
    return Reference(**entry)


_FILE = resources.files("memlens.report").joinpath("references.yaml")
REFERENCES: Registry[Reference] = Registry("reference", of=Reference)
"""The publications that memlens (`references.yaml`) and its plugins cite, by key."""
for _key, _entry in yaml.safe_load(_FILE.read_text(encoding="utf-8")).items():
    REFERENCES.add(_key, _reference(_entry))


def register_reference(key: str, reference: Reference) -> Reference:
    """Register a publication, such as "meng2022", for the `cite` and `cites` of what a package adds.

    Raises:
        OptionError: Another publication has this key.
    """
    return REFERENCES.add(key, reference)


@dataclass(frozen=True)
class Citation:
    """A reference and what it is cited for.

    Attributes:
        key: A key of `REFERENCES`.
        what: What it is cited for, in a few words.

    Raises:
        OptionError: The key is not in `REFERENCES`.
    """

    key: str
    what: str

    def __post_init__(self) -> None:
        REFERENCES[self.key]


_SETTINGS = (  # a setting, the start of its value, its source
    ("lens", "tuned lens", Citation("belrose2023", "tuned lens")),
    ("lens", "logit lens", Citation("nostalgebraist2020", "logit lens")),
    ("mode", "mean_of_other_heads", Citation("chen2026", "ablating a head by the mean of the other heads")),
    ("method", "integrated_gradients", Citation("sundararajan2017", "integrated gradients")),
    ("path", "embedding", Citation("hanna2024", "integrating along a path of input embeddings (EAP-IG)")),
)
_ALWAYS = (
    Citation("nanda2022", "TransformerLens, which runs the model"),
    Citation("wilson1927", "confidence intervals of proportions"),
    Citation("efron1979", "bootstrap confidence intervals"),
)


def citations_of(result: Result) -> list[Citation]:
    """Return the sources of a result's metrics, kind and settings, and of the model's family.

    Example:
        >>> import xarray as xr
        >>> data = xr.Dataset({"memorization_score": ("sequence", [1.0, 0.5])})
        >>> [citation.key for citation in citations_of(Result.create(data, kind="recall"))]
        ['chen2026']
    """
    pairs = [pair for name in result.metrics for pair in _cites(name)]
    pairs += KINDS[result.kind].cites if result.kind in KINDS else ()
    found = _known(pairs)
    settings = result.settings
    found += [said for name, start, said in _SETTINGS if str(settings.get(name, "")).startswith(start)]
    attrs: Mapping[str, Any] = result.data.attrs
    return [*found, *family_citation(str(attrs.get("family", "")), str(attrs.get("model", "")))]


def _cites(quantity: str) -> Iterable[tuple[str, str]]:
    """Return the sources of a metric, or of another column of recall scores."""
    found = COLUMNS.get(quantity) or METRICS.get(quantity)
    return found.cites if found else ()


def family_citation(family: str, model: str) -> list[Citation]:
    """Return the paper of a model's family; none for zoo models, which do not use the family's weights.

    >>> [citation.key for citation in family_citation("pythia", "EleutherAI/pythia-70m")]
    ['biderman2023']
    >>> family_citation("pythia", "zoo/pythia-s")
    []
    """
    found = FAMILIES.get(family)
    if found is None or not found.cite or not model or model.startswith("zoo/"):
        return []
    return _known([(found.cite, f"the models of {family}")])


def _known(pairs: Iterable[tuple[str, str]]) -> list[Citation]:
    """Return citations; a source that a plugin did not register costs its citation alone."""
    found = []
    for key, what in pairs:
        if key in REFERENCES:
            found.append(Citation(key, what))
        else:
            _LOG.warning("%s is cited as %r, which is not in the bibliography", what, key)
    return found


def bibliography(citations: Iterable[Citation]) -> list[tuple[Reference, str]]:
    """Return each reference once, ordered by first author and year, with everything it is cited for.

    The sources that every run uses (TransformerLens, the intervals) are added if anything is cited.

    Example:
        >>> cited = [Citation("chen2026", "memorization score M"), Citation("carlini2023", "exact match")]
        >>> [(reference.year, what) for reference, what in bibliography(cited)][:2]
        [(2023, 'exact match'), (2026, 'memorization score M')]
    """
    said: dict[str, list[str]] = {}
    given = list(citations)
    for citation in [*given, *(_ALWAYS if given else ())]:
        uses = said.setdefault(citation.key, [])
        if citation.what not in uses:
            uses.append(citation.what)
    order = sorted(said, key=lambda key: (REFERENCES[key].authors.lower(), REFERENCES[key].year))
    return [(REFERENCES[key], "; ".join(said[key])) for key in order]
