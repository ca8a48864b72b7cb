"""inspect_ai: a model under interventions as one of its model providers (extra `inspect`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from memlens.errors import ModelLoadError, OptionError
from memlens.instruments.tasks.lm_eval import LensLM, lens_lm
from memlens.models.provenance import describe
from memlens.sweeps.interventions import Intervention

_MAX_TOKENS = 256
"""Tokens of an answer, if inspect_ai does not say."""


def as_inspect(
    model: Any,
    interventions: Intervention | Sequence[Intervention] = (),
    *,
    prepend_bos: bool | None = None,
) -> Any:
    """Wrap a model under interventions for inspect_ai, for tasks that are scored by what is generated.

    Messages are put into the form of the tokenizer's chat template; without one their texts are joined by
    empty lines. Decoding is greedy, up to `max_tokens` or a stop sequence.

    Args:
        model: A TransformerLens model.
        interventions: Applied to the model for every request, in this order; none for the unchanged model. A
            hook that differs between sequences (`ByBatch`) needs `sweep`.
        prepend_bos: See `as_lm_eval`.

    Returns:
        An `inspect_ai.model.Model`, for `inspect_ai.eval(task, model=...)`.

    Raises:
        ModelLoadError: inspect_ai is not installed.
        SiteError: The model does not have one of the hooks.
        OptionError: The model has no tokenizer; in a request: tools, sampling, or pictures.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> bypass = ml.edits.attention_bypasses(model, layers=[5])
        >>> from inspect_ai import eval  # doctest: +SKIP
        >>> logs = eval("task.py", model=ml.tasks.as_inspect(model, bypass))  # doctest: +SKIP
    """
    if find_spec("inspect_ai") is None:
        raise ModelLoadError("inspect_ai is not installed: run `pip install 'memlens[inspect]'`.")
    from inspect_ai.model import (  # pyright: ignore[reportMissingImports]  # an extra of its own
        GenerateConfig,
        Model,
        ModelAPI,
        ModelOutput,
        modelapi,
    )

    lm = lens_lm(model, interventions, prepend_bos)
    name = str(describe(model)["model"])

    @modelapi(name="memlens")
    class LensAPI(ModelAPI):
        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:
            if tools:
                raise OptionError("the model cannot call tools: evaluate it on tasks without any.")
            return ModelOutput.from_content(name, _answer(lm, input, config))

        def max_connections(self) -> int:
            return 1

    return Model(LensAPI(name), GenerateConfig())


def _answer(lm: LensLM, messages: Sequence[Any], config: Any) -> str:
    """Return the greedy answer to a conversation."""
    if config.temperature:
        raise OptionError(
            f"temperature={config.temperature}: answers here are greedy, leave it out or give 0."
        )
    options = {
        "until": list(config.stop_seqs or []),
        "max_gen_toks": config.max_tokens or _MAX_TOKENS,
        "do_sample": False,
    }
    (answer,) = lm.generate_until([SimpleNamespace(args=(_text(lm.encoder.tokenizer, messages), options))])
    return answer


def _text(tokenizer: Any, messages: Sequence[Any]) -> str:
    """Return a conversation as one text, in the form of the tokenizer's chat template if it has one."""
    for message in messages:
        if not isinstance(message.content, str) and any(part.type != "text" for part in message.content):
            raise OptionError("the model reads text only: evaluate it on tasks without pictures or files.")
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": message.role, "content": message.text} for message in messages]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return "\n\n".join(message.text for message in messages)
