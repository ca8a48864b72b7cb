"""A family of models: names, sizes and license of Qwen2."""

from __future__ import annotations

from memlens.models.families import Family, ModelEntry, Shape, register_family

SMALL = Shape(24, 896, 14, 2, 4864, 151936, gated_mlp=True, tied=True)
MEDIUM = Shape(28, 1536, 12, 2, 8960, 151936, gated_mlp=True, tied=True)

register_family(
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        corpus="not published",
        license="Apache-2.0",
        cite="",
        models=(
            ModelEntry("Qwen/Qwen2-0.5B", "0.5B", shape=SMALL),
            ModelEntry("Qwen/Qwen2-1.5B", "1.5B", shape=MEDIUM),
        ),
    )
)
