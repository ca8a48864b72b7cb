"""Studies by name: what each runs, which options it takes, and what its command reads.

A study of memlens or of another package registers itself in a module of its own folder:

    STUDIES.add("mine", Study(run="mypackage.study:study_mine", options=MyOptions, help="What it asks."))

and `memlens run mine` is there. The module imports nothing heavy, so that help texts appear at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field, PositiveInt

from memlens.choices import Backend
from memlens.errors import OptionError
from memlens.files import expanded
from memlens.options import Flags, options_class
from memlens.registry import Registry
from memlens.studies.times import LOADING, Stopwatch

if TYPE_CHECKING:
    from memlens.studies.pilot import Pilot
    from memlens.studies.plans import PlanTable
    from memlens.studies.running import StudyRun


@options_class
class Placement:
    """How models are loaded."""

    backend: Backend = "auto"
    """Which TransformerLens class runs the model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights."""
    device: str | None = None
    """cpu, cuda or mps; by default cuda where there is one."""

    def load(self, name: str, **more: Any) -> Any:
        """Load a model, with a spinner meanwhile."""
        from rich.console import Console

        import memlens as ml

        with Console(stderr=True, soft_wrap=True).status(f"loading {name}"):
            return ml.load_model(name, backend=self.backend, dtype=self.dtype, device=self.device, **more)


@options_class
class ModelChoice(Placement):
    """Which model, and how it is loaded."""

    model: Annotated[str, Flags("-m", positional=True)] = Field(kw_only=True)
    """Hub name, checkpoint folder, .gguf file or zoo name."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    checkpoint_step: int | None = None
    """Training step of a checkpoint of Pythia, OLMo or the zoo."""

    def load(self, name: str | None = None, **more: Any) -> Any:
        """Load the model, or another one in the same way, at its main revision."""
        if name is None:
            name = self.model
            more = {"revision": self.revision, "checkpoint_step": self.checkpoint_step, **more}
        return Placement.load(self, name, **more)


@options_class
class SequenceChoice:
    """Which sequences, and how they are read."""

    sequences: Annotated[str, Flags("-s")]
    """File (.npy, .jsonl, .csv, .parquet, .txt), hf:NAME, a name of `memlens data list`, or zoo."""
    prefix_len: PositiveInt | None = None
    """Tokens given to the model; by default the file's own number, or 32."""
    max_targets: PositiveInt | None = None
    """Most tokens of each continuation that count; by default all."""
    target: Literal["first_token", "word"] = "first_token"
    """For the idiom file: the first token of the last word, or the whole word."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    limit: PositiveInt | None = None
    """Read at most this many rows."""
    prepend_bos: Literal["auto", "always", "never"] = "auto"
    """Beginning-of-text token in front of sequences; auto: for text, where the model was trained so."""
    on_short: Literal["raise", "drop"] = "raise"
    """What to do if a sequence is not longer than its prefix: stop, or leave it out."""
    on_eos: Literal["raise", "drop", "keep"] = "raise"
    """What to do if a continuation contains an end-of-text token: stop, leave it out, or keep it."""
    text_column: str | None = None
    """Column of texts, where it has none of the usual names."""
    prompt_column: str | None = None
    """Column of prompts, likewise."""
    continuation_column: str | None = None
    """Column of continuations, likewise."""
    tokens_column: str | None = None
    """Column of token ids, likewise."""

    def reading(self) -> dict[str, Any]:
        """Return the options of `load_sequences`."""
        options = {each.name: getattr(self, each.name) for each in fields(self) if each.name in _READING}
        return {**options, "prepend_bos": {"always": True, "never": False}.get(self.prepend_bos, "auto")}

    def load(self, model: Any) -> Any:
        """Read the sequences for a model."""
        import memlens as ml

        return ml.load_sequences(self.sequences, model, **self.reading())

    def read(self, call: Call) -> dict[str, Any]:
        """Return the study's model and sequences."""
        model = call.load()
        return {"model": model, "sequences": self.load(model)}

    def plan(self, call: Call) -> PlanTable | None:
        """A study of another package counts nothing."""
        return None

    def pilot(self, call: Call, sizes: Sequence[str], number: int) -> Pilot | None:
        """Return the study's arguments for a small run: a few of the sequences."""
        given = self.read(call)  # first, so that what it imports counts as in a run
        from memlens.studies.pilot import Pilot, sizes_of
        from memlens.studies.running import at_most

        seqs = given["sequences"]
        pilot = Pilot.of({"sequences": len(seqs), **sizes_of(call.options, sizes)}, number)
        few = at_most(seqs, pilot.sizes["sequences"], 0)
        return pilot.giving({**given, "sequences": few, "options": pilot.options(call.options)})


_READING = (
    "prefix_len", "max_targets", "target", "split", "limit", "prepend_bos", "on_short", "on_eos",
    "text_column", "prompt_column", "continuation_column", "tokens_column",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """What the command line knows when it runs a study.

    Attributes:
        where: How models are loaded, and for studies of one model, which one.
        options: The study's options.
        out: The run's folder; a plan may do without.
        given: The options that were set by name or in a file.
        progress: Whether progress bars are shown.
        loaded: Models that were loaded and are kept; None: none are kept.
        watch: Counts the time of loading and reading.
        on: The device for which a plan is asked, as for `memlens.plan`.
        shared: Whether several commands do the run together, each a part.
    """

    where: Any
    options: Any
    out: Path | None
    given: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = True
    loaded: dict[Any, Any] | None = field(default=None, repr=False)
    watch: Stopwatch = field(default_factory=Stopwatch, repr=False)
    on: str | None = None
    shared: bool = False

    def load(self, name: str | None = None, **more: Any) -> Any:
        """Load the model, or another one."""
        key = (name, *sorted(more.items()))
        return self.once(key, lambda: self.where.load(*filter(None, [name]), **more))

    def once(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """Load a model, or return the one that `loaded` keeps under the same key."""
        kept = {} if self.loaded is None else self.loaded
        if key not in kept:
            with self.watch.timed(LOADING):
                kept[key] = load()
        return kept[key]

    @property
    def folder(self) -> Path:
        """The run's folder.

        Raises:
            OptionError: None was given.
        """
        if self.out is None:
            raise OptionError("--out is missing: name a folder for results and report.")
        return expanded(self.out)


class Inputs(Protocol):
    """What a study's command reads besides the study's options: an options class with these methods."""

    def read(self, call: Call) -> dict[str, Any]:
        """Return the keyword arguments of the study, such as `model` and `sequences`."""
        ...

    def plan(self, call: Call) -> PlanTable | None:
        """Return what can be counted before anything runs; None: nothing."""
        ...

    def pilot(self, call: Call, sizes: Sequence[str], number: int) -> Pilot | None:
        """Return a small run of the study, by which its time is planned.

        Args:
            call: As for `read`.
            sizes: The study's `sizes`.
            number: Which of the two sizes of small runs: 0 or 1. The first run and the second have size 0.

        Returns:
            None: The study cannot run here.
        """
        ...


@dataclass(frozen=True)
class Study:
    """A study and its command.

    Attributes:
        run: The function, or "module:function", which is imported when it runs. It is called as
            `run(**inputs, out=…, options=…, command=…, progress=…)` and returns a `StudyRun`.
        options: Its options class.
        help: The first line of the command's help: the question that it answers.
        example: A command that runs it.
        inputs: Which models' sequences and further inputs the command reads.
        where: `ModelChoice`, or `Placement` if `inputs` names the models.
        keeps: Folders inside the run's folder that hold only what a second run continues from; or a function
            that returns their paths.
        sizes: Options that limit how many sequences (questions, updates) are examined; `--plan` makes small
            runs with smaller ones.
        scales: Which of them, or "sequences" for all that were read, the time of a step is proportional to,
            by the end of the step's name; the entry "" is for the other steps, and the value "" says that the
            time does not depend on them.
        folder: The run's folder, if the command names none; "" where it must.
        shares: Whether `run` takes `part` and `executor`, so that several processes can do it together.
        alone: Why it does not share, in a sentence without its period.
    """

    run: Any
    options: type
    help: str
    example: str = ""
    inputs: type[Inputs] = SequenceChoice
    where: type = ModelChoice
    keeps: Sequence[str] | Callable[[Call], Sequence[Path]] = ("sweeps",)
    sizes: Sequence[str] = ()
    scales: Mapping[str, str] = field(default_factory=lambda: {"": "sequences"})
    folder: str = ""
    shares: bool = False
    alone: str = "this study cannot be shared by several processes"

    def kept(self, call: Call) -> Sequence[Path]:
        """Return the folders that hold only what a second run continues from."""
        if callable(self.keeps):
            return self.keeps(call)
        return [call.folder / name for name in self.keeps]

    def __call__(self, **given: Any) -> StudyRun:
        """Run the study.

        Raises:
            OptionError: It did not return a `StudyRun`.
        """
        run = self.run
        if isinstance(run, str):
            module, _, name = run.partition(":")
            run = getattr(import_module(module), name)
        found = run(**given)
        from memlens.studies.running import StudyRun

        if not isinstance(found, StudyRun):
            raise OptionError(
                f"the study {self.run} returned {found!r}: it must return a StudyRun, as "
                "StudyDirectory.done() does."
            )
        return found


STUDIES: Registry[Study] = Registry(
    "study",
    of=Study,
    modules=[
        f"memlens.studies.{name}.command"
        for name in ("localization", "idioms", "bypass", "comparative", "detectors", "auditing")
    ],
)
