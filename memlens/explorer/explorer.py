"""`explore`: explore sequences one by one, live on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import UInt8

from memlens.errors import OptionError, ResultError, check_option
from memlens.explorer import drawing
from memlens.explorer.attention import attention_maps
from memlens.explorer.data import Continuation, Edits, Exploration, SequenceView, row_of, strongest_heads
from memlens.explorer.drawing import FIGURES
from memlens.explorer.measuring import (
    ExploreOptions,
    continuations,
    explore_sequences,
    measured_views,
    planned_steps,
)
from memlens.figures.labels import metric_text
from memlens.figures.theme import dark
from memlens.forward.hooks import check_head, check_layer
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.heads import Head
from memlens.models.state import content_key
from memlens.recall.score import score_recall
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from memlens.explorer.widget import ExplorerWidget


def explore(
    model: Any,
    sequences: SequenceSet,
    *,
    options: ExploreOptions | None = None,
    reference: SequenceSet | None = None,
    dark: bool = False,
    progress: bool = False,
) -> Explorer:
    """Explore sequences one by one: recall of tokens, lens, heads, attention, and the model under edits.

    Jupyter shows the returned object as a widget (extra `notebook`: ipywidgets and anywidget).
    Select a sequence, click a head to see where it attends, switch on ablations and bypasses, and see at once
    what the model generates. Everything is also available from Python, and `Explorer.write_html` writes a
    page that does not need Python.

    Args:
        model: A TransformerLens model.
        sequences: Any number of sequences. All are scored at once; the rest is computed on selection, in
            Jupyter a portion at a time: text and lens are shown first, and effects as they are measured.
        options: Ablation mode, bypass mode, metric of the effects and more; see `ExploreOptions`.
        reference: The set for ablation by "mean"; `sequences` itself by default.
        dark: Figures for a dark notebook. (The page of `write_html` follows the reader's system.)
        progress: Show progress bars.

    Raises:
        EmptySetError, SequenceError, VocabularyError: The sequences do not fit; before any forward pass.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> sequences = ml.load_sequences("zoo", model)
        >>> often = sequences[sequences.table["copies"].to_numpy() == 256]
        >>> explorer = ml.explore(model, often[-3:])
        >>> plain = explorer.select(explorer.ids[1]).continuation
        >>> explorer.toggle(0).toggle(1, 3).edits.name
        'bypass L0 + ablate L1H3'
        >>> explorer.continuation.memorization_score < plain.memorization_score
        True
    """
    return Explorer(
        model, sequences, options or ExploreOptions(), reference=reference, dark=dark, progress=progress
    )


class Explorer:
    """What `explore` returns: a selected sequence, a selected head, and the current edits.

    See `explore` for the arguments.

    Attributes:
        table: One row per sequence: its columns, `exact_match` and `target_accuracy` (see `score_recall`).
        edits: The current edits.
        options: The given options.
    """

    options: ExploreOptions
    table: pd.DataFrame
    edits: Edits

    def __init__(
        self,
        model: Any,
        sequences: SequenceSet,
        options: ExploreOptions,
        *,
        reference: SequenceSet | None = None,
        dark: bool = False,
        progress: bool = False,
    ) -> None:
        check_sequences(sequences, model, on_eos="keep")
        self.options, self._model, self._sequences = options, model, sequences
        self._dark, self._progress = dark, progress
        self._bare = sequences.with_table(sequences.table.filter(["id"]))
        self._reference = self._bare if reference is None else reference
        self._trunk = Trunk(model)
        scores = score_recall(model, self._bare, generate=False, metrics=(), progress=progress).table
        self._content = content_key(model)
        self.table = sequences.table.assign(
            **{name: scores[name].to_numpy() for name in ("exact_match", "target_accuracy")}
        )
        self.edits = Edits()
        self._row, self._head = 0, None
        self._views: dict[int, SequenceView] = {}
        self._measuring: dict[int, Iterator[list[SequenceView]]] = {}
        self._complete: set[int] = set()
        self._lock = RLock()
        self._written: dict[tuple[int, Edits], Continuation] = {}
        self._maps: dict[tuple[int, Head], np.ndarray] = {}
        self._listeners: list[Callable[[], None]] = []
        self._told: list[Callable[[str], None]] = []
        self._widget: ExplorerWidget | None = None

    # What is selected ---------------------------------------------------------------------

    @property
    def ids(self) -> list[str]:
        """The ids of the sequences."""
        return self._sequences.ids

    @property
    def selected(self) -> str:
        """The id of the selected sequence."""
        return self.ids[self._row]

    def _check_unchanged(self) -> None:
        if content_key(self._model) != self._content:
            raise ResultError(
                "the model has changed since this explorer was made, and what it has shown is of the old: "
                "make a new explorer."
            )

    @property
    def view(self) -> SequenceView:
        """The selected sequence in the unchanged model; computed on first access.

        Raises:
            ResultError: The model has changed since this explorer was made.
        """
        while self.measure_more():
            pass
        return self._views[self._row]

    @property
    def shown(self) -> SequenceView:
        """The selected sequence as far as it is measured: at least its text and lens.

        Effects that are not measured yet are NaN.

        Raises:
            ResultError: The model has changed since this explorer was made.
        """
        self._check_unchanged()
        while self._row not in self._views:
            self.measure_more()
        return self._views[self._row]

    @property
    def complete(self) -> bool:
        """Whether everything about the selected sequence is measured."""
        return self._row in self._complete

    @property
    def steps(self) -> list[str]:
        """The names of the steps in which a sequence is measured, in order."""
        return planned_steps(self._model, self.options)

    def measure_more(self) -> bool:
        """Measure the next portion of the selected sequence; return whether there was one.

        Raises:
            ResultError: The model has changed since this explorer was made.
        """
        self._check_unchanged()
        with self._lock:
            row = self._row
            if row in self._complete:
                return False
            if row not in self._measuring:
                one = self._sequences[[row]]
                self._measuring[row] = measured_views(
                    self._model, one, self.options, self._reference,
                    in_portions=True, progress=self._progress, on_step=self._tell,
                )  # fmt: skip
            try:
                found = next(self._measuring[row], None)
            except BaseException:
                del self._measuring[row]  # an interrupted generator is at its end: begin anew
                self._tell("")
                raise
            if found is None:
                del self._measuring[row]
                self._complete.add(row)
                self._tell("")
                return False
            (self._views[row],) = found
            return True

    @property
    def head(self) -> Head:
        """The head whose attention is shown; initially the one whose ablation harms the sequence most."""
        return self._head_of(self.view) if self._head is None else self._head

    @property
    def shown_head(self) -> Head:
        """The same, without waiting: the first head until all heads are measured."""
        if self._head is None and self.complete:
            return self._head_of(self.shown)
        return self._head or (0, 0)

    def _head_of(self, view: SequenceView) -> Head:
        return strongest_heads(view.head_effects, metric_text(self.options.metric).better)[0]

    @property
    def continuation(self) -> Continuation:
        """The prediction for the selected sequence under the current edits."""
        self._check_unchanged()
        if not self.edits:
            return self.shown.continuation
        key = (self._row, self.edits)
        if key not in self._written:
            one = self._bare[[self._row]]
            written = continuations(self._model, one, self.edits, self.options, self._reference)
            (self._written[key],) = written
        return self._written[key]

    @property
    def attention(self) -> UInt8[np.ndarray, "query key"]:
        """The selected head's attention on the sequence in the unchanged model, from 0 to 255."""
        return self._attention_of(self.head)

    def _attention_of(self, head: Head) -> UInt8[np.ndarray, "query key"]:
        self._check_unchanged()
        key = (self._row, head)
        if key not in self._maps:
            n = int(self._bare.lengths[self._row])
            self._maps[key] = attention_maps(self._model, self._bare.tokens[self._row, :n], [head])[head]
        return self._maps[key]

    def figure(self, kind: str = "effects", *, partial: bool = False) -> go.Figure:
        """Return a figure of the selected sequence.

        Args:
            kind: "lens" (the targets' probability after each layer), "effects" (of each head, MLP and
                layer's attention) or "attention" (of the selected head).
            partial: Draw what is measured so far (`shown`, `shown_head`) instead of measuring the rest.

        Raises:
            OptionError: The kind is unknown.
        """
        check_option("kind", kind, FIGURES)
        view, head = (self.shown, self.shown_head) if partial else (self.view, self.head)
        if kind == "lens":
            figure = drawing.lens_figure(view)
        elif kind == "attention":
            figure = drawing.attention_figure(view, head, self._attention_of(head))
        else:
            figure = drawing.effects_figure(view, self.options.metric, head)
        return dark(figure) if self._dark else figure

    # Selecting ----------------------------------------------------------------------------------------------

    def select(self, name: str) -> Explorer:
        """Select a sequence by its id; the edits remain.

        Raises:
            SiteError: There is no such sequence.
        """
        self._row = row_of(name, self.ids)
        return self._changed()

    def select_head(self, layer: int, head: int) -> Explorer:
        """Select the head whose attention is shown.

        Raises:
            SiteError: There is no such head.
        """
        check_layer(layer, self._trunk.n_layers)
        check_head(head, self._trunk.n_heads)
        self._head = (layer, head)
        return self._changed()

    def toggle(self, layer: int, head: int | None = None) -> Explorer:
        """Switch the bypass of a layer's attention on or off; with `head`, that head's ablation.

        Raises:
            SiteError: There is no such layer or head.
        """
        edits = self.edits.toggled(layer, head)
        edits.check(self._trunk)
        self.edits = edits
        return self._changed()

    def clear(self) -> Explorer:
        """Switch all edits off."""
        self.edits = Edits()
        return self._changed()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Register a function that is called after every change."""
        self._listeners.append(listener)

    def on_step(self, listener: Callable[[str], None]) -> None:
        """Register a function that is called with each of `steps` as it begins, and with "" at the end."""
        self._told.append(listener)

    def _tell(self, step: str) -> None:
        for listener in self._told:
            listener(step)

    def _changed(self) -> Explorer:
        for listener in self._listeners:
            listener()
        return self

    # Showing -----------------------------------------------------------------------------------------------

    @property
    def widget(self) -> ExplorerWidget:
        """The widget that Jupyter shows; created on first access.

        Raises:
            OptionError: ipywidgets or anywidget is not installed.
        """
        if self._widget is None:
            try:
                from memlens.explorer.widget import ExplorerWidget
            except ImportError as error:
                raise OptionError(
                    f"the explorer in Jupyter needs ipywidgets and anywidget ({error}): run `pip install "
                    "'memlens[notebook]'` and restart the kernel, or write a page with write_html(path)."
                ) from error
            self._widget = ExplorerWidget(self)
        return self._widget

    def exploration(self, names: list[str] | None = None, *, progress: bool | None = None) -> Exploration:
        """Return the data of several sequences, with continuations under edits and attention.

        Args:
            names: Ids; all sequences by default.
            progress: Show progress bars; as given to `explore` by default.

        Raises:
            SiteError: There is no such sequence.
        """
        rows = [row_of(name, self.ids) for name in (self.ids if names is None else names)]
        return explore_sequences(
            self._model,
            self._sequences[rows],
            self.options,
            reference=self._reference,
            progress=self._progress if progress is None else progress,
        )

    def write_html(
        self,
        path: str | Path,
        names: list[str] | None = None,
        *,
        most: int = 12,
        progress: bool | None = None,
    ) -> Path:
        """Write the same view as a single page that opens from disk, without Python or a network.

        Args:
            path: The `.html` file.
            names: Ids; the first `most` sequences by default.
            most: Number of sequences if no ids are given.
            progress: Show progress bars; as given to `explore` by default.

        Returns:
            The path.
        """
        from memlens.explorer.page import write_explorer

        shown = self.ids[:most] if names is None else names
        return write_explorer(path, self.exploration(shown, progress=progress))

    def __repr__(self) -> str:
        return f"Explorer({len(self.ids)} sequences, at {self.selected!r}, {self.edits.name})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **options: Any) -> Any:
        try:
            found: Any = self.widget.box._repr_mimebundle_(include=include, exclude=exclude, **options)
        except OptionError as error:
            return {"text/plain": f"{self!r}\n{error}"}
        data, *facts = found if isinstance(found, tuple) else (found,)
        data = {**data, "text/plain": repr(self)}  # for front ends without widgets
        return (data, *facts) if facts else data
