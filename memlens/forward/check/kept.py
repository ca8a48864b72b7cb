"""Verdicts of the check at load that are kept on disk, so that a large model is checked once.

One small file per model in memlens' cache, `checks/<key>-<state>.json`. The key is a digest of everything
that is known before TransformerLens touches the Hugging Face model: the files of weights, the model as
transformers read it, the options of the call, the versions, the hardware. The state is a digest of the model
that TransformerLens made of it (`memlens.forward.check.identity`). Only a check that was passed is kept, and
a file that cannot be read or written is as good as none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from pydantic import TypeAdapter

from memlens.errors import MemlensError, ModelLoadError
from memlens.files import cache_folder, json_text, parsing, read_json, remove_leftovers, write_json
from memlens.forward.check.identity import is_ordinary_process, model_digest, process_facts
from memlens.forward.check.table import ModelCheck
from memlens.forward.hooks import SITES
from memlens.models.huggingface import weight_files
from memlens.models.names import Source

LEAST_WEIGHTS = 10**7
"""Smaller models are checked each time, which takes less than a tenth of a second."""
_MOST = 3
"""If a model comes out in more forms than these from the same files, none of its verdicts is used."""
_UNREADABLE = (MemlensError, OSError, RuntimeError)  # the last where there is no home folder


@dataclass(frozen=True)
class Verdict:
    """A check at load that was passed.

    Attributes:
        model: The model's name.
        date: The day on which it was checked, such as "2026-11-28".
        difference: Of its logits from Hugging Face's, as in `Check`.
        allowed: The largest difference that passes.
        note: What was compared.
        refused: Sites that do not do what their names claim.
    """

    model: str
    date: str
    difference: float
    allowed: float
    note: str
    refused: tuple[str, ...]

    @classmethod
    def of(cls, found: ModelCheck) -> Verdict:
        """Return the verdict of a check that was passed."""
        logits = found.checks[0]
        refused = tuple(c.name.removeprefix("site ") for c in found.checks if c.status == "refused")
        today = date.today().isoformat()
        return cls(found.model, today, logits.difference, logits.allowed, logits.note, refused)


@dataclass(frozen=True)
class KeptVerdicts:
    """The verdicts that are kept on a model as transformers read it from its files.

    Attributes:
        folder: Where they are.
        key: What they are about.
    """

    folder: Path
    key: str

    @classmethod
    def about(
        cls, hf_model: Any, source: Source, options: Mapping[str, Any], *, begun: float
    ) -> KeptVerdicts | None:
        """Return what is kept on a model, before TransformerLens changes it; None where nothing may be kept.

        That is so for small models, for those that are not read from files alone (untrained ones of the zoo,
        adapters, code that comes with a checkpoint), if a file was written after the call began (as by a
        download), and in a process in which modules or functions are not what they are elsewhere.

        Args:
            hf_model: The Hugging Face model as it was read.
            source: Where it was read from.
            options: Whatever else decides what is made of it.
            begun: When reading it began, in seconds.
        """
        apart = source.untrained or getattr(hf_model, "_hf_peft_config_loaded", False)
        own_code = type(hf_model).__module__.startswith("transformers_modules")
        small = hf_model.num_parameters() < LEAST_WEIGHTS
        if apart or own_code or small or not is_ordinary_process():
            return None
        try:
            folder = cache_folder() / "checks"
            files = _files(source, hf_model.config)
            stats = [file.stat() for file in files]
        except _UNREADABLE:
            return None
        if not files or max(max(stat.st_mtime, stat.st_ctime) for stat in stats) > begun:
            return None
        facts = {
            "place": os.path.abspath(source.location) if source.local else source.location,
            "files": [
                [file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
                for file, stat in zip(files, stats, strict=True)
            ],
            "config": hf_model.config.to_json_string(use_diff=False),
            "attention": getattr(hf_model.config, "_attn_implementation", None),
            "model": model_digest(hf_model),
            "process": process_facts(hf_model.device),
            "options": {name: str(value) for name, value in options.items()},
        }
        return cls(folder, blake2b(json_text(facts).encode(), digest_size=16).hexdigest())

    def read(self) -> dict[str, Verdict]:
        """Return the verdicts by the state of the model; none if there are too many, or none can be read."""
        files = self._all()
        found = {file.stem.partition("-")[2]: _verdict(file) for file in files if len(files) <= _MOST}
        return {state: verdict for state, verdict in found.items() if verdict is not None}

    def keep(self, state: str, verdict: Verdict) -> None:
        """Keep a verdict on the model of this state, if there is a place for it."""
        if len(self._all()) > _MOST:
            return
        with suppress(*_UNREADABLE):
            remove_leftovers(self.folder)
            write_json(self.folder / f"{self.key}-{state}.json", asdict(verdict))

    def _all(self) -> list[Path]:
        try:
            return sorted(self.folder.glob(f"{self.key}-*.json"))
        except OSError:
            return []


def _files(source: Source, config: Any) -> list[Path]:
    """The files of the weights; of a model on the hub, those in its cache."""
    if source.local:
        return weight_files(source)
    name = source.gguf_file or "config.json"
    found = try_to_load_from_cache(source.location, name, revision=getattr(config, "_commit_hash", None))
    if not isinstance(found, str):
        return []
    return weight_files(Source(source.name, str(Path(found).parent), local=True, gguf_file=source.gguf_file))


def _verdict(file: Path) -> Verdict | None:
    if not file.is_file():  # a pipe would wait for a writer
        return None
    with suppress(*_UNREADABLE), parsing(file):
        found = TypeAdapter(Verdict).validate_python(read_json(file))
        if not (0 <= found.difference <= found.allowed < math.inf and {*found.refused} <= {*SITES}):
            raise ModelLoadError("it is not the verdict of a check that was passed.")
        return found
    return None
