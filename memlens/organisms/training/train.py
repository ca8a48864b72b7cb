"""Training of an organism: plain PyTorch, seeded and resumable.

The order of the rows is a pure function of the seed and the step, and the model has no dropout, so a run that
was interrupted and resumed gives the same result as one without interruption (bit for bit on the CPU with the
same number of threads). Weights may be kept on the way, as checkpoints by training step.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from memlens.errors import EmptySetError, OptionError, ResultError
from memlens.files import json_text, parsed_json, parsing, remove_leftovers, replacing
from memlens.models.quiet import quiet
from memlens.organisms.corpus.corpus import fingerprint
from memlens.organisms.training.routing import Routes

CHECKPOINTS = "checkpoints"
"""The folder of snapshots inside an organism's folder."""

_LINEAR = 10
_HALVINGS = 6


@dataclass(frozen=True)
class TrainSpec:
    """Everything that determines a training run, except rows and model.

    Attributes:
        seed: Seed of the weights and of the order of rows.
        passes: Passes over the corpus; a sequence with c copies is seen `passes * c` times.
        batch_size: Rows per step.
        learning_rate: The highest learning rate, reached after the warm-up.
        final_ratio: The last learning rate as a share of the highest, with a half cosine in between.
        warmup: Share of the steps in which the learning rate rises linearly.
        weight_decay: Weight decay of AdamW, on matrices only.
        betas: Betas of AdamW.
        clip: Largest norm of the gradient.
        steps: Number of steps; by default as many as the passes need.
    """

    seed: int = 0
    passes: int = 2
    batch_size: int = 32
    learning_rate: float = 2e-3
    final_ratio: float = 0.05
    warmup: float = 0.03
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    steps: int | None = None

    def n_steps(self, n_rows: int) -> int:
        """Return the number of steps on a corpus of `n_rows` rows.

        >>> TrainSpec(passes=2, batch_size=32).n_steps(100)
        6
        """
        return self.steps if self.steps is not None else max(1, self.passes * n_rows // self.batch_size)

    def rate(self, step: int, n_steps: int) -> float:
        """Return the learning rate of a step (from 0)."""
        warm = max(1, round(self.warmup * n_steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        progress = (step - warm) / max(1, n_steps - 1 - warm)
        low = self.final_ratio
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return parsed_json(json_text(asdict(self)))


@dataclass(frozen=True)
class TrainLog:
    """The losses and the time of a run.

    Attributes:
        losses: Mean loss of each step's batch (nats per token), before its update.
        seconds: Wall time of training, including earlier interrupted runs.
        finished: False if it was stopped early.
    """

    losses: list[float]
    seconds: float
    finished: bool


@lru_cache(maxsize=2)  # a batch has rows of at most two passes, unless the corpus is tiny
def pass_order(seed: int, number: int, n_rows: int) -> Sequence[int]:
    """Return the order of the rows in a pass: corpus order in pass 0, a new shuffle in later passes.

    >>> pass_order(0, 0, 4)
    (0, 1, 2, 3)
    """
    order = list(range(n_rows))
    if number:
        Random(f"memlens/{seed}/pass/{number}").shuffle(order)
    return tuple(order)


def rows_of_step(spec: TrainSpec, step: int, n_rows: int) -> list[int]:
    """Return the corpus rows in the batch of a step (from 0).

    Args:
        spec: Specification of the run.
        step: Number of the step.
        n_rows: Number of rows of the corpus.

    >>> rows_of_step(TrainSpec(batch_size=3), 1, 100)
    [3, 4, 5]
    """
    places = range(step * spec.batch_size, (step + 1) * spec.batch_size)
    return [pass_order(spec.seed, place // n_rows, n_rows)[place % n_rows] for place in places]


def snapshot_steps(n_steps: int) -> tuple[int, ...]:
    """Return the steps at which weights are kept: 0, then doubling, then every tenth of the run.

    >>> snapshot_steps(2562)
    (0, 4, 8, 16, 32, 64, 128, 256, 512, 769, 1025, 1281, 1537, 1793, 2050, 2306, 2562)
    >>> snapshot_steps(4)
    (0, 1, 2, 3, 4)
    """
    tenths = [round(n_steps * k / _LINEAR) for k in range(1, _LINEAR + 1)]
    early = [n_steps // (_LINEAR * 2**k) for k in range(1, _HALVINGS + 1)]
    return tuple(sorted({0, *early, *tenths}))


@dataclass(frozen=True)
class Snapshots:
    """Where and at which steps a run's weights are kept: float16 checkpoints in `<folder>/step<N>`.

    Steps count updates: step 0 has the initial weights. Keeping weights does not change the run.

    Attributes:
        folder: The folder of the checkpoints; created if it does not exist.
        steps: Numbers of updates.
    """

    folder: Path
    steps: tuple[int, ...]

    def check(self, n_steps: int) -> None:
        """Raise `OptionError` if a run of `n_steps` steps does not reach one of the steps."""
        beyond = [step for step in self.steps if not 0 <= step <= n_steps]
        if beyond:
            raise OptionError(
                f"step {beyond[0]} cannot have a snapshot: the run has the steps 0 to {n_steps}."
            )

    def check_kept(self, step: int) -> None:
        """Raise `ResultError` if a run at `step` has passed a step whose weights were not kept."""
        lost = [s for s in self.steps if s < step and not (self._path(s) / "model.safetensors").is_file()]
        if lost:
            raise ResultError(
                f"the run is at step {step} and did not keep the weights of step {lost[0]}: start over with "
                "resume=False, or omit snapshots."
            )

    def keep(self, model: PreTrainedModel, step: int) -> None:
        """Write the weights if `step` is one of the steps; its folder is written atomically."""
        if step not in self.steps:
            return
        path = self._path(step)
        part = path.with_name(path.name + ".partial")
        part.mkdir(parents=True, exist_ok=True)
        with quiet():
            deepcopy(model).cpu().half().save_pretrained(part)  # pyright: ignore[reportCallIssue]
        (part / "generation_config.json").unlink(missing_ok=True)
        (part / "model.safetensors").chmod(0o644)
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)

    def _path(self, step: int) -> Path:
        return self.folder / f"step{step}"


def kept_steps(folder: str | Path) -> list[int]:
    """Return the training steps whose weights are in an organism's folder, in order."""
    found = (Path(folder) / CHECKPOINTS).glob("step*/model.safetensors")
    return sorted(int(path.parent.name.removeprefix("step")) for path in found)


def as_snapshots(folder: Path, steps: Sequence[int]) -> Snapshots | None:
    """Return `Snapshots`, or None without steps."""
    return Snapshots(folder, tuple(sorted(set(steps)))) if steps else None


def train(
    model: PreTrainedModel,
    rows: Int[np.ndarray, "row pos"],
    spec: TrainSpec,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    device: str | torch.device | None = None,
    progress: bool = True,
    resume: bool = True,
    stop_after: int | None = None,
    snapshots: Snapshots | None = None,
    routes: Routes | None = None,
    label: str = "train",
) -> TrainLog:
    """Train a model in place, in float32, on next-token cross-entropy over every position of every row.

    Args:
        model: A causal language model; it is moved to `device` and back to the CPU.
        rows: Token ids.
        spec: The run.
        checkpoint: File for the state (model, optimizer, step, losses), written atomically.
        checkpoint_every: Steps between two writes.
        device: Device; by default a GPU if there is one.
        progress: Show a progress bar.
        resume: Continue from `checkpoint` if it exists; False starts over.
        stop_after: Most steps to do in this call; the state is then written.
        snapshots: Where and when to keep weights; they do not change the run.
        routes: Which rows train which weights; by default every row trains all.
        label: Text of the progress bar.

    Returns:
        The losses and the time.

    Raises:
        EmptySetError: There are no rows.
        OptionError: The run does not reach the step of a snapshot.
        ResultError: The checkpoint is damaged, belongs to a run with other settings, or to one that did not
            keep the snapshots.
    """
    if len(rows) == 0:
        raise EmptySetError("the corpus has no rows to train on: raise background_rows or plant sequences.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(place).train()  # pyright: ignore[reportArgumentType]
    settings = {**spec.to_dict(), "rows": list(rows.shape), "fingerprint": fingerprint(rows)}
    if routes is not None:
        settings["routing"] = routes.spec.to_dict()
        routes = routes.to(place)
    run = _Run(model, spec, spec.n_steps(len(rows)), settings, routes)
    if checkpoint is not None:
        remove_leftovers(checkpoint.parent)
    if checkpoint is not None and resume and checkpoint.exists():
        run.load(checkpoint)
    if snapshots is not None:
        snapshots.check(run.n_steps)
        snapshots.check_kept(len(run.losses))
        snapshots.keep(model, len(run.losses))
    data = torch.from_numpy(np.ascontiguousarray(rows)).to(place)
    last = run.n_steps if stop_after is None else min(run.n_steps, len(run.losses) + stop_after)
    begun, earlier = time.perf_counter(), run.seconds
    with tqdm(
        total=run.n_steps, initial=len(run.losses), disable=not progress, desc=label, unit="step"
    ) as bar:
        while len(run.losses) < last:
            chosen = rows_of_step(spec, len(run.losses), len(rows))
            loss = run.step(data[chosen], chosen)
            run.seconds = earlier + time.perf_counter() - begun
            if snapshots is not None:
                snapshots.keep(model, len(run.losses))
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if checkpoint is not None and (
                len(run.losses) % checkpoint_every == 0 or len(run.losses) == last
            ):
                run.save(checkpoint)
    model.to("cpu").eval()  # pyright: ignore[reportArgumentType]
    return TrainLog(run.losses, run.seconds, finished=len(run.losses) == run.n_steps)


class _Run:
    """The state of a run: the model, its optimizer, losses and time."""

    def __init__(
        self,
        model: PreTrainedModel,
        spec: TrainSpec,
        n_steps: int,
        settings: dict[str, Any],
        routes: Routes | None,
    ) -> None:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": spec.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.model, self.spec, self.n_steps, self.settings = model, spec, n_steps, settings
        self.routes = routes
        self.optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas)
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, batch: Int[torch.Tensor, "row pos"], rows: Sequence[int]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.rate(len(self.losses), self.n_steps)
        self.optimizer.zero_grad(set_to_none=True)
        if self.routes is None:
            loss = self._loss(batch)
            loss.backward()
        else:
            loss = self._routed(batch, rows, self.routes)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
        if self.routes is None:
            self.optimizer.step()
        else:
            self.routes.scale_steps(dict(self.model.named_parameters()), self.optimizer.step)
        self.losses.append(loss.item())
        return self.losses[-1]

    def _loss(self, batch: Int[torch.Tensor, "row pos"]) -> torch.Tensor:
        logits = self.model(batch).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def _routed(
        self, batch: Int[torch.Tensor, "row pos"], rows: Sequence[int], routes: Routes
    ) -> torch.Tensor:
        """Set the gradients of a batch whose rows train different weights, and return its mean loss."""
        total = torch.zeros((), device=batch.device)
        parameters = dict(self.model.named_parameters())
        for value in parameters.values():
            value.grad = torch.zeros_like(value)
        for part in routes.parts(rows, len(self.losses)):
            weights = {**parameters, **part.switched_off(parameters)}
            some = batch[part.places]
            logits = torch.func.functional_call(self.model, weights, (some,)).logits[:, part.first : -1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), some[:, part.first + 1 :].flatten()
            ) * (len(part.places) / len(rows))
            trained = {name: parameters[name] for name in part.trains or parameters}
            found = torch.autograd.grad(loss, list(trained.values()))
            for (name, value), gradient in zip(trained.items(), found, strict=True):
                assert value.grad is not None
                value.grad += part.masked(name, gradient)
            total += loss.detach()
        return total

    def save(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"losses": self.losses, "seconds": self.seconds, "settings": self.settings}
        with replacing(path) as part:
            torch.save(state, part)

    def load(self, path: Path) -> None:
        with parsing(path, ResultError, "start over with resume=False"):
            state = torch.load(path, map_location=next(self.model.parameters()).device, weights_only=True)
            settings = dict(state["settings"])
        if settings != self.settings:
            changed = sorted(key for key in self.settings if settings.get(key) != self.settings[key])
            raise ResultError(
                f"the training checkpoint {path} belongs to a run with another {', '.join(changed)}: "
                "start over with resume=False, or write elsewhere."
            )
        with parsing(path, ResultError, "start over with resume=False"):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses, self.seconds = list(map(float, state["losses"])), float(state["seconds"])
