"""The methods paragraph, made from the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["flatten", "methods_text"]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return one row a parameter, nested dictionaries as dotted names.

    >>> flatten({"seed": 0, "ablation": {"mode": "zero"}})
    {'seed': '0', 'ablation.mode': 'zero'}
    """
    rows: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows |= flatten(value, f"{name}.")
        else:
            rows[name] = str(value)
    return rows


def methods_text(settings: Mapping[str, Any]) -> str:
    """Return paragraphs that say how a run was made; only what the settings hold is said.

    Args:
        settings: facts of the model (`model`, `revision`, `backend`, `transformer_lens`, `dtype`, `device`,
            `processed_weights`), of the sequences (`sequences`, `n_sequences`, `prefix_len`), `seed`, and
            one dictionary for each analysis.

    Example:
        >>> print(methods_text({"model": "zoo/pythia-s", "dtype": "float32", "ablation": {"mode": "zero"}}))
        The model is zoo/pythia-s, run in float32.
        <BLANKLINE>
        Ablation: mode = zero.
        <BLANKLINE>
        Means and intervals are over sequences: values of one sequence are averaged before they enter.
    """
    parts = [_model(settings), _sequences(settings)]
    parts += [_analysis(str(key), value) for key, value in settings.items() if isinstance(value, Mapping)]
    parts.append(_statistics(settings))
    return "\n\n".join(part for part in parts if part)


def _model(settings: Mapping[str, Any]) -> str:
    if "model" not in settings:
        return ""
    text = f"The model is {settings['model']}"
    text += f" (revision {settings['revision']})" if settings.get("revision") else ""
    if settings.get("backend"):
        text += f", a {settings['backend']}"
        text += (
            f" of TransformerLens {settings['transformer_lens']}" if settings.get("transformer_lens") else ""
        )
    text += f", run in {settings['dtype']}" if settings.get("dtype") else ""
    text += f" on {settings['device']}" if settings.get("device") else ""
    if "processed_weights" in settings:
        text += ", with its weights " + ("processed" if settings["processed_weights"] else "as trained")
    return text + "."


def _sequences(settings: Mapping[str, Any]) -> str:
    said = []
    if "n_sequences" in settings:
        said.append(f"{settings['n_sequences']} sequences")
    if "sequences" in settings and not isinstance(settings["sequences"], Mapping):
        said.append(f"from {settings['sequences']}")
    if "prefix_len" in settings:
        said.append(f"of which the model is given the first {settings['prefix_len']} tokens")
    return f"It was measured on {' '.join(said)}." if said else ""


def _analysis(name: str, options: Mapping[str, Any]) -> str:
    if not options:
        return ""
    words = name.replace("_", " ")
    listed = "; ".join(f"{key.replace('_', ' ')} = {value}" for key, value in flatten(options).items())
    return f"{words[:1].upper()}{words[1:]}: {listed}."


def _statistics(settings: Mapping[str, Any]) -> str:
    text = "Means and intervals are over sequences: values of one sequence are averaged before they enter."
    if "seed" in settings:
        text += f" The seed is {settings['seed']}."
    return text
