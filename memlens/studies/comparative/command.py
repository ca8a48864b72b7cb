"""The command `memlens run comparative`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field, PositiveInt

from memlens.errors import OptionError, near_matches
from memlens.options import Flags, options_class
from memlens.studies.comparative.options import ComparativeOptions
from memlens.studies.plans import PlanTable
from memlens.studies.registry import STUDIES, Call, Placement, Study

if TYPE_CHECKING:
    from memlens.studies.comparative.config import StudyConfig, StudyModel
    from memlens.studies.pilot import Pilot


@options_class
class ComparativeInputs:
    """Models, and the sequences that each of them reads with its own tokenizer."""

    models: Annotated[list[str], Flags("-m", positional=True)] = Field(default_factory=list)
    """Models: zoo names, hub names, folders; NAME@REVISION."""
    sequences: Annotated[list[str], Flags("-s")] = Field(default_factory=list)
    """zoo, one source with a column domain, or DOMAIN=SOURCE for each domain."""
    config: Path | None = None
    """YAML file with models, domains and options."""
    checkpoints: list[str] = Field(default_factory=list)
    """MODEL=STEP,STEP or MODEL=all: training steps to follow."""
    option: list[str] = Field(default_factory=list)
    """NAME=VALUE: any option of the study, as in a YAML file."""
    add: bool = False
    """Also compare the models that the folder holds from earlier runs."""
    device_tflops: float = 100.0
    """Speed that --plan assumes, in TFLOP/s."""
    per_domain: PositiveInt = 300_000
    """Sequences per domain that --plan assumes."""
    plan_domains: PositiveInt = 5
    """Domains that --plan assumes."""

    def read(self, call: Call) -> dict[str, Any]:
        """Return the models, which are loaded in their turn, the sources and the options."""
        from memlens.studies.comparative.config import parse_sources

        config = self._config()
        return {
            "models": self._models(config, call.where),
            "sequences": parse_sources(self.sequences) if self.sequences else config.sources or {"": "zoo"},
            "options": self._options(config, call),
            "include_saved": self.add,
        }

    def plan(self, call: Call) -> PlanTable | None:
        """Count every pass over models of the family table; without models, over those of the paper.

        Models that are here (the zoo's, folders, files) are planned by small runs only, but for another
        device counted, too.
        """
        from memlens.studies.comparative.plan import PlanSizes, plan_comparative
        from memlens.sweeps.roofline import HERE, LEFT_OUT

        config = self._config()
        if self._here(config, call) and call.on is None:
            return None
        options = self._options(config, call)
        sizes = PlanSizes(per_domain=self.per_domain, domains=self.plan_domains)
        models = self._models(config, call.where)
        table = plan_comparative(
            models, sizes=sizes, options=options, device_tflops=self.device_tflops, on=call.on
        )
        speed, notes = f"at {self.device_tflops:g} TFLOP/s", []
        about: dict[str, Any] = {"device_tflops": self.device_tflops}
        if call.on is not None:
            name = "this machine's device" if call.on == HERE else call.on
            speed, notes = f"at best on {name}, by the roofline", [f"Not counted: {', '.join(LEFT_OUT)}."]
            about = {"on": call.on, "left_out": LEFT_OUT}
        hours, for_heads = (table[name].to_numpy().sum() for name in ("hours", "head_hours"))
        return PlanTable(
            table.drop(columns=["family", "sequences", "head_sequences", "heads", "pflop", "note"]),
            f"{self.per_domain:,} sequences in each of {self.plan_domains} domains, "
            f"{sizes.heads_per_domain:,} for heads ({sizes.heads_if_large:,} for models beyond "
            f"{sizes.large / 1e9:g} B), {speed}",
            [
                f"together {hours:,.0f} hours, {for_heads:,.0f} of them for heads; loading, reading, tables, "
                "tests, figures and the report are not included",
                *notes,
                f"Assumes {sizes.memorized:.0%} memorized sequences, {len(options.alphas)} noise strengths "
                f"in {options.noise_draws} draws, and greedy decoding of every sequence.",
                *(
                    f"{', '.join(part['model'].str.rpartition('/')[2])}: {note}"
                    for note, part in table.groupby("note", sort=False)
                ),
            ],
            {**about, "sizes": asdict(sizes), "models": table.to_dict("records")},
            parts=len(table),
            part_gflop=1e6 * float(table["pflop"].to_numpy().max()),
        )

    def pilot(self, call: Call, sizes: Sequence[str], number: int) -> Pilot | None:
        """Return a small run: few sequences of each domain; None where a model is not here."""
        from memlens.studies.comparative.config import read_domains
        from memlens.studies.pilot import Pilot, sizes_of

        if not self._here(self._config(), call):
            return None
        given = self.read(call)
        models, options = given["models"], given["options"]
        first = replace(models[0], model=call.once(models[0].label, models[0].load))
        domains = read_domains(given["sequences"], first.model, options).table["domain"]
        whole = {**sizes_of(options, sizes), "max_per_domain": int(domains.value_counts().max())}
        pilot = Pilot.of(whole, number, least=4, source="max_per_domain")
        return pilot.giving({**given, "models": [first, *models[1:]], "options": pilot.options(options)})

    def _here(self, config: StudyConfig, call: Call) -> bool:
        """Whether all models are the zoo's, folders or files, so that nothing is fetched for a plan."""
        from memlens.models.zoo import is_zoo_name

        models = self._models(config, call.where)
        return bool(models) and all(is_zoo_name(m.name) or Path(m.name).exists() for m in models)

    def _config(self) -> StudyConfig:
        from memlens.studies.comparative.config import StudyConfig, read_config

        return read_config(self.config) if self.config is not None else StudyConfig()

    def _models(self, config: StudyConfig, where: Placement) -> list[StudyModel]:
        from memlens.studies.comparative.config import parse_model

        names = [name for entry in self.models for name in entry.split(",") if name]
        return with_checkpoints(
            [*config.models, *(replace(parse_model(name), **vars(where)) for name in names)], self.checkpoints
        )

    def _options(self, config: StudyConfig, call: Call) -> ComparativeOptions:
        """Return the options of the configuration, changed by those of the command line."""
        known = [f.name for f in fields(ComparativeOptions)]
        values = dict(call.given)
        for entry in self.option:
            name, equals, value = entry.partition("=")
            if not equals or name not in known:
                raise OptionError(
                    f"--option {entry!r} is not clear: give NAME=VALUE with an option of the study."
                    f"{near_matches(name, known)}"
                )
            many = isinstance(getattr(config.options, name), tuple)
            values[name] = yaml.safe_load(f"[{value}]" if many else value)
        return replace(config.options, **values)


def with_checkpoints(entries: Sequence[StudyModel], given: Sequence[str]) -> list[StudyModel]:
    """Return the models with the training steps to follow, from entries such as "zoo/pythia-s=100,200"."""
    from memlens.models.names import checkpoint_steps

    wanted: dict[str, tuple[int, ...]] = {}
    for entry in given:
        name, _, steps = entry.rpartition("=")
        if not name or (steps != "all" and not steps.replace(",", "").isdigit()):
            raise OptionError(f"--checkpoints {entry!r} is not clear: give MODEL=100,200 or MODEL=all.")
        wanted[name] = tuple(
            checkpoint_steps(name) if steps == "all" else map(int, filter(None, steps.split(",")))
        )
    unknown = sorted(set(wanted) - {entry.label for entry in entries})
    if unknown:
        raise OptionError(
            f"--checkpoints names {unknown[0]!r}, which is not among the models: name it there."
        )
    return [replace(e, checkpoints=wanted[e.label]) if e.label in wanted else e for e in entries]


STUDIES.add(
    "comparative",
    Study(
        run="memlens.studies.comparative.study:study_comparative",
        options=ComparativeOptions,
        inputs=ComparativeInputs,
        where=Placement,
        keeps=("models",),
        shares=True,
        sizes=("max_per_domain", "max_compressed", "noise_per_domain", "max_examined", "heads_per_domain"),
        scales={
            "": "max_per_domain",
            "compression": "max_compressed",
            "noise": "noise_per_domain",
            "decoding": "max_examined",
            "recovery": "max_examined",
            "heads": "heads_per_domain",
            "reading": "",
            "report": "",
        },
        help="Compare how models memorize: rates, domains, noise, layers, heads, signatures of families.",
        example="memlens run comparative --models zoo/pythia-s zoo/gpt-neo-s --out my-comparison",
    ),
)
