"""What a model's name refers to: a zoo model, a checkpoint folder, a GGUF file, or a hub name."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session

from memlens.errors import MemlensError, ModelNotFoundError, OptionError, near_matches
from memlens.files import expanded, read_json, zoo_folders
from memlens.models.families import find_model, known_names, step_of
from memlens.models.zoo import UNTRAINED, is_zoo_name, zoo_names, zoo_path

ZOO_PREFIX = "zoo/"
_HUB_SECONDS = 5.0
"""How long the hub may take to answer."""


@cache
def has_hooked_transformer() -> bool:
    """Return whether the installed TransformerLens has `HookedTransformer` (removed in 4.0)."""
    try:
        return hasattr(import_module("transformer_lens"), "HookedTransformer")
    except ImportError:  # what 4.x raises for the removed name
        return False


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is.

    Attributes:
        name: What to call the model in results.
        location: A folder's path, or a name on the hub; what transformers' `from_pretrained` takes.
        local: Whether `location` is a folder.
        gguf_file: Name of the GGUF file in it, or None.
        checkpoint: Which of a local model's training checkpoints this is, such as "step512", or "".
        tokenizer_location: Where the tokenizer is; None for `location`.
        untrained: Whether to use the weights that training began from instead of those at `location`.
    """

    name: str
    location: str
    local: bool
    gguf_file: str | None = None
    checkpoint: str = ""
    tokenizer_location: str | None = None
    untrained: bool = False


def resolve_source(name: str | Path, *, gguf_file: str | None = None) -> Source:
    """Find out what a name refers to, without reading weights and without a network.

    Args:
        name: `"zoo/<name>"` or `"zoo/<name>-untrained"`, a checkpoint folder, a `.gguf` file, or a hub name.
            An existing folder wins over a hub name. A name in the family table may be given without its
            organization.
        gguf_file: A GGUF file inside the folder or hub repository.

    Raises:
        ModelNotFoundError: No such model in the zoo, no such path, or the folder is not a checkpoint.
    """
    text = str(name)
    if isinstance(name, str) and is_zoo_name(name):
        trained = text.removesuffix(UNTRAINED)
        return Source(text, str(zoo_path(trained)), local=True, untrained=trained != text)
    path = expanded(text)
    if path.is_file():
        return _file_source(path, gguf_file)
    if path.is_dir():
        return _folder_source(path, gguf_file)
    looks_like_path = text.startswith((".", "~", os.sep)) or text.count("/") > 1 or text.endswith(".gguf")
    if isinstance(name, Path) or looks_like_path:
        raise ModelNotFoundError(f"{text!r} is neither a folder nor a .gguf file: check the path.")
    found = find_model(text)
    hub_name = found[1].name if found is not None else text
    return Source(name=hub_name, location=hub_name, local=False, gguf_file=gguf_file)


def unknown_name_error(name: str, reason: str = "") -> ModelNotFoundError:
    """Return the error for an unknown name, with similar names from the table and the zoo."""
    known = known_names()
    zoo = [ZOO_PREFIX + n for n in zoo_names()]
    hint = near_matches(name, [*zoo, *known, *(n.rpartition("/")[2] for n in known)])
    why = f" ({reason})" if reason else ""
    return ModelNotFoundError(
        f"No model is called {name!r}: it is not in the zoo, not a folder here, and neither the Hugging Face "
        f"hub nor its local cache gave it{why}; check the name, or give a checkpoint folder.{hint}"
    )


def _file_source(path: Path, gguf_file: str | None) -> Source:
    if path.suffix.lower() != ".gguf":
        raise ModelNotFoundError(
            f"{str(path)!r} is a file, not a checkpoint folder: give its folder, or a file ending in .gguf."
        )
    if gguf_file is not None and gguf_file != path.name:
        raise OptionError(f"gguf_file={gguf_file!r} contradicts the path {str(path)!r}: give one of them.")
    return Source(name=path.stem, location=str(path.parent), local=True, gguf_file=path.name)


def _folder_source(path: Path, gguf_file: str | None) -> Source:
    if gguf_file is not None and not (path / gguf_file).is_file():
        raise ModelNotFoundError(f"The folder {str(path)!r} has no file {gguf_file!r}: check gguf_file.")
    if gguf_file is None and not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f" It holds {ggufs[0]!r}: give that file." if ggufs else ""
        raise ModelNotFoundError(
            f"The folder {str(path)!r} has no config.json, so it is not a Hugging Face checkpoint: "
            f"give the folder that save_pretrained wrote.{hint}"
        )
    name = path.resolve().name if gguf_file is None else Path(gguf_file).stem
    return Source(name=name, location=str(path), local=True, gguf_file=gguf_file)


def checkpoint_revision(source: Source, *, revision: str | None, step: int | None) -> str | None:
    """Return the revision to load: the given one, or the one of a training step.

    Raises:
        OptionError: Both are given.
        ModelNotFoundError: There is no revision of this step; the message lists the nearest ones.
    """
    _check_one(revision, step)
    if step is None:
        return revision
    steps = list_steps(source.location)
    if step in steps:
        return steps[step]
    raise ModelNotFoundError(
        f"{source.name!r} has no checkpoint of step {step}: {_what_there_is(steps, step)}"
    )


def checkpoint_steps(name: str | Path) -> list[int]:
    """Return the training steps that `load_model(name, checkpoint_step=...)` can load, in order.

    Args:
        name: Name of a model of the zoo or of the hub, or a checkpoint folder.

    Raises:
        ModelNotFoundError: There is no such model.

    Example:
        >>> from memlens.models.zoo import zoo_path
        >>> checkpoint_steps(zoo_path("zoo/pythia-s"))
        []
    """
    source = resolve_source(name)
    if source.untrained:
        return []
    return sorted(_steps_of(source)) if source.local else list(list_steps(source.location))


def local_checkpoint(source: Source, *, revision: str | None, step: int | None) -> Source:
    """Return the location of a local model's training checkpoint: `<folder>/checkpoints/step<N>`.

    Raises:
        OptionError: Both are given, or the folder holds a single checkpoint.
        ModelNotFoundError: There is no checkpoint of this step; the message lists those that exist.
    """
    _check_one(revision, step)
    if revision is None and step is None:
        return source
    if source.untrained:
        raise OptionError(f"{source.name!r} has no training steps: leave checkpoint_step and revision out.")
    wanted = revision if revision is not None else f"step{step}"
    folders = _steps_of(source)
    if not folders:
        what = f"revision={revision!r}" if revision is not None else f"checkpoint_step={step}"
        short = source.name.removeprefix(ZOO_PREFIX)
        train = f"; the zoo's Pythia models have checkpoints after `memlens zoo train {short}`"
        raise OptionError(
            f"{what} does not apply to the local folder {source.location!r}: it holds a single checkpoint"
            f"{train if is_zoo_name(source.name) else ''}."
        )
    for path in folders.values():
        if path.name == wanted:
            base = str(path.parent.parent)
            return replace(source, location=str(path), checkpoint=wanted, tokenizer_location=base)
    known = ", ".join(map(str, sorted(folders)))
    raise ModelNotFoundError(f"{source.name!r} has no checkpoint {wanted}: it has those of steps {known}.")


def _steps_of(source: Source) -> dict[int, Path]:
    """Return the folders of a local model's checkpoints by step.

    Checkpoints of a bundled model are in the cache, if the same recipe was run there.
    """
    own = Path(source.location)
    folders = [own]
    if is_zoo_name(source.name):
        others = [root / source.name.removeprefix("zoo/") for root in zoo_folders()]
        folders += [other for other in others if other.is_dir() and _recipe(other) == _recipe(own)]
    found = ([*folder.glob("checkpoints/step*/config.json")] for folder in folders)
    paths = [config.parent for config in next(filter(None, found), [])]
    return {step: path for path in paths if (step := step_of(path.name)) is not None}


def _recipe(folder: Path) -> list[Any] | None:
    """Return what determines the run that made a zoo model, or None if it is not recorded."""
    try:
        record = read_json(folder / "training.json")
        return [record[part]["spec"] for part in ("model", "corpus", "training")]
    except (MemlensError, KeyError, TypeError):
        return None


def _check_one(revision: str | None, step: int | None) -> None:
    if revision is not None and step is not None:
        raise OptionError(
            f"revision={revision!r} and checkpoint_step={step} contradict each other: give one."
        )


@contextmanager
def hub_or_cache(name: str | Path) -> Iterator[None]:
    """Let the hub's clients read their caches at once, as in offline mode, where the hub does not answer.

    On their own they ask several times for every file, which takes minutes.

    Args:
        name: What is read: a name on the hub; for a path that exists, nothing is asked and changed.
    """
    if Path(name).exists() or is_offline_mode() or hub_answers():
        yield
        return
    switches: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    held = [module.HF_HUB_OFFLINE for module in switches]
    try:
        for module in switches:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(switches, held, strict=True):
            module.HF_HUB_OFFLINE = value


def hub_answers() -> bool:
    """Return whether the hub may be asked (not in offline mode) and answers; it is asked once a minute."""
    return not is_offline_mode() and _answers(int(time.monotonic() // 60))


@lru_cache(maxsize=1)
def _answers(minute: int) -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # each client library has its own errors
        return False
    return True


def list_steps(repo: str) -> dict[int, str]:
    """Return the revision of each published training step of a hub repository, in order of steps.

    They come from the hub, or from the local cache without a network.
    """
    found = {step: name for name in _revisions(repo) if (step := step_of(name)) is not None}
    return dict(sorted(found.items()))


def _what_there_is(steps: dict[int, str], wanted: int) -> str:
    where = "on the hub" if hub_answers() else "in the local cache (offline)"
    if not steps:
        return f"none of its revisions {where} is named after a training step."
    nearest = sorted(sorted(steps, key=lambda step: abs(step - wanted))[:4])
    return f"the nearest of {len(steps)} {where} are {', '.join(map(str, nearest))}."


def _revisions(repo: str) -> list[str]:
    if hub_answers():
        try:
            refs = HfApi().list_repo_refs(repo)
            return [ref.name for ref in [*refs.branches, *refs.tags]]
        except HfHubHTTPError as error:
            if getattr(error.response, "status_code", None) in (401, 404):
                raise unknown_name_error(repo) from error
        except Exception:  # no network, for which each client library has its own error: read the cache
            pass
    return _cached_revisions(repo)


def _cached_revisions(repo: str) -> list[str]:
    refs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "refs"
    return [str(path.relative_to(refs).as_posix()) for path in sorted(refs.rglob("*")) if path.is_file()]
