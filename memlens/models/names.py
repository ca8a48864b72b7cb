"""What a model's name refers to: a zoo model, a checkpoint folder, a GGUF file, or a name on the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from memlens.errors import ModelNotFoundError, OptionError, near_matches
from memlens.models.families import find_model, known_names
from memlens.models.zoo import UNTRAINED, is_zoo_name, zoo_names, zoo_path

ZOO_PREFIX = "zoo/"


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
        return _zoo_source(text)
    path = Path(text).expanduser()
    if path.is_file():
        return _file_source(path, gguf_file)
    if path.is_dir():
        return _folder_source(path, gguf_file)
    if isinstance(name, Path) or _looks_like_path(text):
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


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "~", os.sep)) or text.count("/") > 1 or text.endswith(".gguf")


def _zoo_source(name: str) -> Source:
    trained = name.removesuffix(UNTRAINED)
    return Source(name=name, location=str(zoo_path(trained)), local=True, untrained=trained != name)


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
