"""Where the zoo's models are: in this folder, in the package `memlens-zoo`, or trained into the user's cache.

Each model is an ordinary Hugging Face checkpoint folder. Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path

from memlens.errors import ModelNotFoundError, near_matches
from memlens.files import zoo_folders

__all__ = ["PACKAGED", "RECIPES", "UNTRAINED", "is_zoo_name", "zoo_cache", "zoo_names", "zoo_path"]

_PREFIX = "zoo/"

UNTRAINED = "-untrained"
"""`load_model("zoo/<name>-untrained")` has the weights that the training of `zoo/<name>` began from."""

RECIPES: tuple[str, ...] = (
    *(
        f"{family}-{size}"
        for family in ("pythia", "gpt-neo", "olmo1", "olmo2", "olmo3", "openllama", "starcoder")
        for size in ("xs", "s", "m")
    ),
    "pythia-s-clean",
    "pythia-s-routed",
)
"""The models that `memlens zoo train` can make (recipes: `memlens.organisms.training.recipes`), in order."""

PACKAGED: tuple[str, ...] = (
    "gpt-neo-s",
    "olmo1-s",
    "olmo2-s",
    "olmo3-s",
    "openllama-s",
    "pythia-m",
    "pythia-s-routed",
    "pythia-xs",
    "starcoder-s",
)
"""The models of the package `memlens-zoo`."""


def zoo_cache() -> Path:
    """Return the folder of models trained on demand: `$MEMLENS_CACHE/zoo`, or `~/.cache/memlens/zoo`.

    The folder need not exist.
    """
    return zoo_folders()[-1]


def is_zoo_name(name: str) -> bool:
    """Tell whether a name asks for the zoo: `"zoo/<name>"`, existing or not.

    >>> is_zoo_name("zoo/pythia-s"), is_zoo_name("EleutherAI/pythia-70m")
    (True, False)
    """
    return name.startswith(_PREFIX)


def zoo_names() -> list[str]:
    """Return the names of all available models, without the prefix: bundled ones first, then the cache's.

    >>> "pythia-s" in zoo_names()
    True
    """
    found = [folder.name for root in zoo_folders() for folder in _checkpoints(root)]
    return list(dict.fromkeys(found))


def zoo_path(name: str) -> Path:
    """Return the checkpoint folder of a zoo model; a bundled one takes precedence over the cache.

    Args:
        name: `"zoo/pythia-s"` or `"pythia-s"`.

    Raises:
        ModelNotFoundError: there is no such model, or it is to be trained first.

    >>> (zoo_path("zoo/pythia-s") / "config.json").exists()
    True
    """
    short = name.removeprefix(_PREFIX)
    for root in zoo_folders():
        for folder in _checkpoints(root):
            if folder.name == short:
                return folder
    if short in PACKAGED:
        raise ModelNotFoundError(
            f"{_PREFIX + short!r} is in the package memlens-zoo, which is not installed: "
            f"`pip install 'memlens[zoo]'`, or train it with `memlens zoo train {short}`, into {zoo_cache()}."
        )
    if short in RECIPES:
        raise ModelNotFoundError(
            f"{_PREFIX + short!r} is not trained here yet: `memlens zoo train {short}` trains it, into "
            f"{zoo_cache()}."
        )
    known = [_PREFIX + known for known in zoo_names()]
    names = dict.fromkeys([*known, *(_PREFIX + recipe for recipe in RECIPES)])
    raise ModelNotFoundError(
        f"The zoo has no {name!r}: it holds {', '.join(known) or 'no model'}; "
        f"train others with `memlens zoo train`.{near_matches(_PREFIX + short, names)}"
    )


def _checkpoints(root: Path) -> list[Path]:
    """Return folders with a finished checkpoint; a run in progress is in `<name>.partial`."""
    if not root.is_dir():
        return []
    folders = sorted(path for path in root.iterdir() if path.suffix != ".partial")
    return [
        path
        for path in folders
        if (path / "config.json").is_file() and (path / "model.safetensors").is_file()
    ]
