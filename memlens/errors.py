"""Every error that memlens raises, one class per kind.

Each message is one sentence that says what was wrong, with which value, and what to do. All of them
inherit from `MemlensError`, and from the built-in exception a caller would expect (`ValueError`,
`LookupError`, …), so that existing `except` clauses keep working.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class MemlensError(Exception):
    """Base class of every error that memlens raises on purpose.

    Example:
        >>> import memlens as ml
        >>> try:
        ...     ml.load_model("zoo/no-such-model")
        ... except ml.errors.MemlensError as error:
        ...     print(type(error).__name__)
        ModelNotFoundError
    """


class ModelNotFoundError(MemlensError, LookupError):
    """No model has this name: not in the zoo, not a folder, not in the hub or its cache."""


class ModelLoadError(MemlensError, RuntimeError):
    """A model was found but its files could not be read."""


class UnsupportedModelError(MemlensError, ValueError):
    """The architecture is not a causal language model, or the backend cannot run it."""


class SequenceError(MemlensError, ValueError):
    """A sequence is too short, too long, or holds what a target must not hold."""


class EmptySetError(SequenceError):
    """A set of sequences has no rows."""


class VocabularyError(SequenceError):
    """Token ids do not fit the model's vocabulary."""


class ColumnError(MemlensError, LookupError):
    """A table lacks a column that was asked for."""


class FileFormatError(MemlensError, ValueError):
    """A file is not what its name says."""


class SourceNotFoundError(MemlensError, FileNotFoundError):
    """There is no such file, dataset or zoo list of sequences."""


class PathError(MemlensError, OSError):
    """A path cannot be used: no permission, too long, or a folder where a file should be."""


class WriteError(PathError):
    """A file cannot be written: no space, no permission, or a path that cannot be."""


class OptionError(MemlensError, ValueError):
    """A mode, site, metric, backend or engine that does not exist."""


class SiteError(MemlensError, LookupError):
    """A layer, head, neuron, position or hook name that the model does not have."""


class NonFiniteError(MemlensError, ArithmeticError):
    """NaN or infinity in weights, activations or logits."""


class InterventionError(MemlensError, RuntimeError):
    """A hook of an intervention raised; the message names the intervention and the hook."""


class SilentInterventionError(InterventionError):
    """A hook changed its activation and the model ignored it: every logit stayed bit-identical."""


class DonorError(MemlensError, ValueError):
    """A second model does not fit the first one: another architecture, shape or vocabulary."""


class ModelInUseError(MemlensError, RuntimeError):
    """Two threads wait for each other's model."""


class ResultError(MemlensError, ValueError):
    """A result file is damaged, of another kind, or from other settings than those asked for."""


class FingerprintError(MemlensError, ValueError):
    """Something that identifies a run cannot be read, so the run cannot be kept in a folder."""


class OtherRunError(ResultError):
    """A folder holds the parts of another run than the one that is to continue there."""


class UnfinishedError(MemlensError, RuntimeError):
    """A run that several processes share is not done yet; the message names the missing parts.

    Attributes:
        missing: The names of the missing parts.
    """

    missing: list[str]

    def __init__(self, message: str, missing: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.missing = list(missing)


class WorkerError(MemlensError, RuntimeError):
    """Work cannot be given to the workers of an executor, or was lost with them too often."""


def near_matches(value: str, known: Iterable[str]) -> str:
    """Return a hint such as `" Did you mean 'zero' or 'mean'?"`, or an empty string.

    >>> near_matches("zro", ["zero", "mean"])
    " Did you mean 'zero'?"
    """
    close = get_close_matches(value, list(known), cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def check_option(name: str, value: object, known: Sequence[str]) -> None:
    """Raise `OptionError` unless `value` is one of `known`.

    >>> check_option("mode", "zero", ["zero", "mean"])
    """
    if value not in known:
        hint = near_matches(str(value), known)
        raise OptionError(
            f"{name}={value!r} is not known: choose one of {', '.join(map(repr, known))}.{hint}"
        )


def check_cites(of: str, cites: object) -> None:
    """Raise `OptionError` unless `cites` are pairs of a reference's key and what it is cited for.

    >>> check_cites("metric 'm'", (("carlini2023", "exact match"),))
    """
    pairs = [*cites] if isinstance(cites, tuple | list) else [cites]
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)):
            raise OptionError(
                f"{of} cites {pair!r}: give pairs, such as cites=(('carlini2023', 'exact match'),)."
            )
