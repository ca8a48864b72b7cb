"""Say in memlens' own errors what other libraries say when a checkpoint does not load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from memlens.errors import MemlensError, ModelLoadError, ModelNotFoundError, UnsupportedModelError
from memlens.models.names import Source, unknown_name_error

__all__ = ["named_errors"]

_EXPECTED = (
    SafetensorError,
    StrictDataclassError,
    RuntimeError,
    ImportError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)
_UNKNOWN_ARCHITECTURE = (
    "does not recognize this architecture",
    "Unrecognized model in",
    "Unrecognized configuration",
)
_OFFLINE = ("offline", "couldn't connect", "LocalEntryNotFound")
_NO_WEIGHTS = ("no file named model.safetensors", "does not appear to have a file named")


@contextmanager
def named_errors(source: Source, revision: str | None) -> Iterator[None]:
    """Turn what goes wrong while reading a checkpoint into a memlens error, with the first as its cause."""
    try:
        yield
    except MemlensError:
        raise
    except _EXPECTED as error:
        raise _translate(error, source, revision) from error


def _translate(error: Exception, source: Source, revision: str | None) -> MemlensError:
    chain = list(_causes(error))
    text = " ".join(map(str, chain))
    found = _about_hub(chain, text, source, revision) or _about_code(error, text, source)
    return found or _about_files(error, chain, text, source)


def _about_hub(
    chain: list[BaseException], text: str, source: Source, revision: str | None
) -> MemlensError | None:
    if any(isinstance(e, GatedRepoError) for e in chain):
        return ModelLoadError(
            f"{source.name!r} is gated: accept its terms on the hub and run `hf auth login`."
        )
    if any(isinstance(e, RevisionNotFoundError) for e in chain) or "not a valid git identifier" in text:
        return ModelNotFoundError(
            f"{source.name!r} has no revision {revision!r}: check the branch, tag or commit."
        )
    if any(isinstance(e, RepositoryNotFoundError | HFValidationError) for e in chain):
        return unknown_name_error(source.name)
    return None


def _about_code(error: Exception, text: str, source: Source) -> MemlensError | None:
    if "trust_remote_code" in text or "contains custom code" in text:
        return UnsupportedModelError(
            f"{source.name!r} comes with Python code of its own, which memlens does not run unasked: "
            f"pass trust_remote_code=True if you trust it."
        )
    if any(sign in text for sign in _UNKNOWN_ARCHITECTURE):
        return UnsupportedModelError(
            f"The config of {source.name!r} is of no architecture that the installed transformers knows: "
            f"upgrade transformers, or check its config.json ({_first_line(error)})."
        )
    if isinstance(error, ImportError):
        return ModelLoadError(f"{source.name!r} cannot be read without another package: {_first_line(error)}")
    return None


def _about_files(error: Exception, chain: list[BaseException], text: str, source: Source) -> MemlensError:
    if any(sign in text for sign in _NO_WEIGHTS) and "config.json" not in text:
        return _no_weights(source)
    if "mismatch" in text:
        return ModelLoadError(
            f"The weights of {source.name!r} do not have the shapes that its config.json says: "
            f"the two do not belong together."
        )
    unread = isinstance(error, OSError) and "JSON" not in text and not source.local
    if unread and not any(isinstance(e, SafetensorError) for e in chain):
        offline = any(sign in text for sign in _OFFLINE)
        return unknown_name_error(source.name, "which could not be asked" if offline else "")
    return ModelLoadError(
        f"{source.name!r} could not be read ({_first_line(error)}): a file is damaged or incomplete, or "
        f"is not what its name says; download or copy it again."
    )


def _no_weights(source: Source) -> MemlensError:
    pickled = not source.local or any(Path(source.location).glob("*.bin"))
    if not pickled:
        return ModelLoadError(
            f"The folder {source.location!r} has a config.json but no weights: copy them there."
        )
    return ModelLoadError(
        f"{source.name!r} has no safetensors weights: convert them, or pass allow_pickle=True to read a .bin "
        f"file (only from a source you trust, as it can run code)."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
