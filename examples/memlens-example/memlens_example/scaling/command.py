"""The command `memlens run scaling`."""

from __future__ import annotations

from memlens.studies.registry import STUDIES, Study
from memlens_example.scaling.options import ScalingOptions

STUDIES.add(
    "scaling",
    Study(
        run="memlens_example.scaling.study:study_scaling",
        options=ScalingOptions,
        help="How much of its MLPs does a model need to recite?",
        example="memlens run scaling --model zoo/pythia-s --sequences zoo --out my-run",
        sizes=("max_sequences",),
        scales={"": "sequences", "scaling": "max_sequences"},
    ),
)
