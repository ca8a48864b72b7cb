"""Edited models that leave the building: an ordinary checkpoint with the edit in its weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from importlib.metadata import version
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlens.errors import InterventionError, ResultError, UnsupportedModelError
from memlens.files import expanded, json_text, replacing_files, write_json
from memlens.forward.exclusive import computes
from memlens.instruments.edit.folding import as_weight_edit
from memlens.instruments.edit.plain import plain_model, plain_tokenizer
from memlens.instruments.edit.weight_edit import WeightEdit, join_edits
from memlens.instruments.edit.writing import write_edit
from memlens.models.provenance import describe
from memlens.models.quiet import quiet
from memlens.sweeps.contexts import applied
from memlens.sweeps.interventions import Intervention, as_interventions

RECORD = "memlens_edit.json"
"""The file of an exported model that says what was changed."""
_FORMAT = "memlens edited model 1"
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits, relative to the largest logit."""
_ROWS, _LENGTH = 2, 32


@computes
@torch.no_grad()
def edited_model(model: Any, edit: Intervention | Sequence[Intervention]) -> PreTrainedModel:
    """Return the plain Hugging Face model that an edit makes of a model.

    It is compared with the model under the edit on a few random tokens, as `export_edited` says.

    Args:
        model: A TransformerLens model, which stays as it is.
        edit: As of `export_edited`.

    Raises:
        InterventionError: Weights cannot express the edit, or it was made for another model.
        UnsupportedModelError: The architecture has no place for it, or the model cannot be exported.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> edit = ml.edits.attention_bypasses(model, layers=[4], mode="zero")[0]
        >>> type(ml.instruments.edited_model(model, edit)).__name__
        'GPTNeoXForCausalLM'
    """
    return _edited(model, edit)[0]


@computes
@torch.no_grad()
def export_edited(model: Any, edit: Intervention | Sequence[Intervention], out: str | Path) -> Path:
    """Write a model with an edit in its weights as an ordinary Hugging Face checkpoint.

    The folder has the configuration, the weights as safetensors, the tokenizer, a card (`README.md`) that
    says what was changed, and the same as `memlens_edit.json`. It is written whole or not at all. Before it
    is, the plain model's logits must equal those of the model under the edit, on random tokens: in float32
    to 1e-5 of the largest logit.

    What weights can express: every `WeightEdit` (`edit_weights`, `weight_transplants`), and interventions
    that change `hook_z`, `mlp.hook_post`, `hook_attn_out` or `hook_mlp_out` by an affine function which is
    the same at every position, such as ablations of heads and neurons to zero or to a mean, and zeroed
    attention or MLPs (`memlens.instruments.edit.folding`). A mean needs a bias to go to, which Llama and OLMo
    do not have.

    Args:
        model: A TransformerLens model with unprocessed weights. A `HookedTransformer` must have been loaded
            by name or folder, since its checkpoint is read again.
        edit: An edit or intervention made for this model, or several to be joined.
        out: A new folder, or an empty one.

    Returns:
        The folder.

    Raises:
        InterventionError: Weights cannot express the edit, or it was made for another model; the message says
            which. An attention bypass to the
            identity is served by `memlens.bypass.in_transformers` instead.
        UnsupportedModelError: The architecture has no place for the edit, such as a bias; or the model's
            weights are processed, or not those of its checkpoint any more.
        ResultError: `out` is not empty.
        WriteError: `out` cannot be written.

    Example:
        >>> import memlens as ml, tempfile
        >>> model = ml.load_model("zoo/pythia-s")
        >>> edit = ml.instruments.edit_weights(model, ["L1H7", "L0N12"], how="zero")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = ml.instruments.export_edited(model, edit, folder)
        ...     again = ml.load_model(out)
        >>> float(again.blocks[1].attn.W_O[7].abs().max())
        0.0
    """
    folder = expanded(out)
    if folder.is_dir() and any(folder.iterdir()):
        raise ResultError(f"{folder} is not empty: give a new folder for the edited model.")
    plain, joined, names, gap = _edited(model, edit)
    tokenizer = plain_tokenizer(model)
    record = _record(model, joined, names, gap)
    with replacing_files(folder) as part, quiet():
        plain.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        (part / "README.md").write_text(edit_card(record), encoding="utf-8")
        write_json(part / RECORD, record)
    return folder


def _edited(
    model: Any, edit: Intervention | Sequence[Intervention]
) -> tuple[PreTrainedModel, WeightEdit, list[str], float]:
    some = _few(model, as_interventions(edit))
    folded = [as_weight_edit(model, one) for one in some]
    joined = folded[0] if len(folded) == 1 else join_edits(model, folded)
    plain, tokens = plain_model(model), _tokens(model)
    own = model(tokens).float().cpu()
    if _gap(plain, tokens, own) > _TOLERANCE[plain.dtype]:
        raise UnsupportedModelError(
            "the model does not compute what its checkpoint does: its weights or hooks were changed after it "
            "was loaded, so load it again, or with backend='bridge'."
        )
    names = write_edit(plain, joined)
    with applied(model, *some):
        wanted = model(tokens).float().cpu()
    gap = _gap(plain, tokens, wanted)
    if gap > _TOLERANCE[plain.dtype]:
        raise InterventionError(
            f"the weights of {joined.name!r} do not give the intervention's logits: they differ by {gap:.1e} "
            "of the largest logit, so the weights cannot express it, or it was made for another model."
        )
    return plain, joined, names, gap


def _few(model: Any, given: Sequence[Intervention]) -> list[Intervention]:
    """The same in at most two: weight edits, which are joined, and interventions, whose hooks are chained."""
    edits = [one for one in given if isinstance(one, WeightEdit)]
    others = [one for one in given if not isinstance(one, WeightEdit)]
    found: list[Intervention] = [edits[0] if len(edits) == 1 else join_edits(model, edits)] if edits else []
    return found + ([reduce(add, others)] if others else [])


def _tokens(model: Any) -> Tensor:
    length = min(_LENGTH, int(model.cfg.n_ctx))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, int(model.cfg.d_vocab), (_ROWS, length), generator=generator)
    return tokens.to(next(model.parameters()).device)


def _gap(plain: PreTrainedModel, tokens: Tensor, wanted: Tensor) -> float:
    width = wanted.shape[-1]  # a bridge and its model may pad the vocabulary differently
    got = plain(input_ids=tokens.to(plain.device), use_cache=False).logits.float()[..., :width]
    return float((got - wanted).abs().max() / wanted.abs().max())


def _record(model: Any, edit: WeightEdit, names: list[str], gap: float) -> dict[str, Any]:
    about = describe(model)
    kept = ("model", "revision", "architecture", "backend", "dtype")
    packages = ("memlens", "transformer-lens", "transformers", "torch")
    return {
        "format": _FORMAT,
        "edit": edit.name,
        "base": {name: about[name] for name in kept},
        "components": [str(component) for component in edit.components],
        "about": dict(edit.about),
        "parameters": names,
        "changes": [
            {
                "layer": change.layer,
                "part": change.part,
                "rows_or_columns": None if change.index is None else len(change.index),
                "bias": change.bias is not None,
            }
            for change in edit.changes
        ],
        "largest_difference": gap,
        "versions": {name: version(name) for name in packages},
    }


def edit_card(record: dict[str, Any]) -> str:
    """Return the card of an edited model as Markdown, from its record."""
    base, components = record["base"], record["components"]
    where = ", ".join(components) if len(components) <= 60 else f"{len(components)} components"
    revision = f" (revision {base['revision']})" if base["revision"] else ""
    facts = [
        f"- {name.replace('_', ' ')}: {value if isinstance(value, (str, int, float)) else json_text(value)}"
        for name, value in record["about"].items()
        if value is not None
    ]
    rows = [
        f"| {c['layer']} | {c['part']} | {'all' if c['rows_or_columns'] is None else c['rows_or_columns']} "
        f"| {'yes' if c['bias'] else 'no'} |"
        for c in record["changes"]
    ]
    lines = [
        "---", "library_name: transformers", f"base_model: {json_text(base['model'])}",
        "tags: [memlens, model-editing]", "---", "",
        f"# {base['model']}, edited: {record['edit']}", "",
        f"`{base['model']}`{revision} with changed weights. Everything else is the base model's.", "",
        "## What was changed", "", f"Components: {where or 'see the table'}.", "", *facts, "",
        "| layer | map | rows or columns | bias |", "|---:|---|---:|---|", *rows, "",
        "Maps: `q`, `k`, `v` and `o` of attention (a head has rows of the first three and columns of `o`), "
        "`in`, `gate` and `out` of the MLP (a neuron has rows of the first two and a column of `out`).", "",
        "Parameters: " + ", ".join(f"`{name}`" for name in record["parameters"]) + ".", "",
        "## Check", "",
        "On random tokens the logits of these weights differ from those of the intervention by at most "
        f"{record['largest_difference']:.1e} of the largest logit.", "",
        f"Made with memlens {record['versions']['memlens']}.", "",
    ]  # fmt: skip
    return "\n".join(lines)
