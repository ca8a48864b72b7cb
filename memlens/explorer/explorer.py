"""`explore`: explore sequences one by one, live on the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import UInt8

from memlens.errors import OptionError, SiteError, check_option, near_matches
from memlens.explorer import drawing
from memlens.explorer.attention import attention_maps
from memlens.explorer.data import Continuation, Edits, Exploration, SequenceView, strongest_heads
from memlens.explorer.measuring import ExploreOptions, continuations, explore_sequences
from memlens.figures.labels import metric_text
from memlens.figures.theme import dark
from memlens.forward.hooks import check_head, check_layer
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.heads import Head
from memlens.recall.score import score_recall
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from memlens.explorer.widget import ExplorerWidget


FIGURES = ("lens", "effects", "attention")


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

    Jupyter shows the returned object as a widget (extra `notebook`: ipywidgets and plotly's FigureWidget).
    Choose a sequence, click a head to see where it attends, switch ablations and bypasses on and see at once
    what the model generates. The same is available in Python, and `Explorer.write_html` writes a page that
    does not need Python.

    Args:
        model: A TransformerLens model.
        sequences: Any number of sequences. All are scored at once; the rest is computed when a sequence is
            selected.
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
    """The result of `explore`: a selected sequence, a selected head, and the current edits.

    Args:
        model: A TransformerLens model.
        sequences: The sequences to explore.
        options: See `ExploreOptions`.
        reference: The set for ablation by "mean"; `sequences` itself by default.
        dark: Figures for a dark notebook.
        progress: Show progress bars.

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
        self.options, self._model, self._progress = options, model, progress
        self._dark = dark
        self._sequences = sequences
        self._bare = sequences.with_table(sequences.table.filter(["id"]))
        self._reference = self._bare if reference is None else reference
        self._trunk = Trunk(model)
        scores = score_recall(model, self._bare, generate=False, metrics=(), progress=progress).table
        self.table = sequences.table.assign(
            **{name: scores[name].to_numpy() for name in ("exact_match", "target_accuracy")}
        )
        self.edits = Edits()
        self._row, self._head = 0, None
        self._views: dict[int, SequenceView] = {}
        self._written: dict[tuple[int, Edits], Continuation] = {}
        self._maps: dict[tuple[int, Head], np.ndarray] = {}
        self._listeners: list[Callable[[], None]] = []
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

    @property
    def view(self) -> SequenceView:
        """The selected sequence in the unchanged model; computed at first access."""
        if self._row not in self._views:
            found = explore_sequences(
                self._model,
                self._sequences[[self._row]],
                self.options,
                reference=self._reference,
                try_edits=False,
                keep_attention=False,
                progress=self._progress,
            )
            self._views[self._row] = found.views[0]
        return self._views[self._row]

    @property
    def head(self) -> Head:
        """The head whose attention is shown; initially the one whose ablation harms the sequence most."""
        if self._head is None:
            better = metric_text(self.options.metric).better
            return strongest_heads(self.view.head_effects, better)[0]
        return self._head

    @property
    def continuation(self) -> Continuation:
        """The prediction for the selected sequence under the current edits."""
        if not self.edits:
            return self.view.continuation
        key = (self._row, self.edits)
        if key not in self._written:
            one = self._bare[[self._row]]
            (found,) = continuations(self._model, one, self.edits, self.options, self._reference)
            self._written[key] = found
        return self._written[key]

    @property
    def attention(self) -> UInt8[np.ndarray, "query key"]:
        """The selected head's attention on the sequence in the unchanged model, from 0 to 255."""
        key = (self._row, self.head)
        if key not in self._maps:
            n = int(self._bare.lengths[self._row])
            self._maps[key] = attention_maps(self._model, self._bare.tokens[self._row, :n], [self.head])[
                self.head
            ]
        return self._maps[key]

    def figure(self, kind: str = "effects") -> go.Figure:
        """Return a figure of the selected sequence.

        Args:
            kind: "lens" (the targets' probability after each layer), "effects" (of each head, MLP and
                layer's attention) or "attention" (of the selected head).

        Raises:
            OptionError: The kind is unknown.
        """
        check_option("kind", kind, FIGURES)
        if kind == "lens":
            figure = drawing.lens_figure(self.view)
        elif kind == "attention":
            figure = drawing.attention_figure(self.view, self.head, self.attention)
        else:
            figure = drawing.effects_figure(self.view, self.options.metric, self.head)
        return dark(figure) if self._dark else figure

    # Selecting ----------------------------------------------------------------------------------------------

    def select(self, name: str) -> Explorer:
        """Select a sequence by its id; the edits remain.

        Raises:
            SiteError: There is no such sequence.
        """
        if name not in self.ids:
            raise SiteError(
                f"there is no sequence {name!r} among these {len(self.ids)}.{near_matches(name, self.ids)}"
            )
        self._row = self.ids.index(name)
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

    def _changed(self) -> Explorer:
        for listener in self._listeners:
            listener()
        return self

    # Showing -----------------------------------------------------------------------------------------------

    @property
    def widget(self) -> ExplorerWidget:
        """The widget that Jupyter shows; made at first access.

        Raises:
            OptionError: ipywidgets or anywidget is not installed.
        """
        if self._widget is None:
            try:
                from memlens.explorer.widget import ExplorerWidget
            except ImportError as error:
                raise OptionError(_missing(error)) from error
            self._widget = ExplorerWidget(self)
        return self._widget

    def exploration(
        self, names: list[str] | None = None, *, try_edits: bool = True, progress: bool | None = None
    ) -> Exploration:
        """Return the data of several sequences, with continuations under edits and attention.

        Args:
            names: Ids; all sequences by default.
            try_edits: Also compute continuations under the edits of `ExploreOptions`.
            progress: Show progress bars; as given to `explore` by default.

        Raises:
            SiteError: There is no such sequence.
        """
        for name in names or []:
            if name not in self.ids:
                raise SiteError(f"there is no sequence {name!r}.{near_matches(name, self.ids)}")
        rows = [self.ids.index(name) for name in (self.ids if names is None else names)]
        return explore_sequences(
            self._model,
            self._sequences[rows],
            self.options,
            reference=self._reference,
            try_edits=try_edits,
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
        """Write the same view as one page that opens from disk without Python or a network.

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


def _missing(error: ImportError) -> str:
    return (
        f"the explorer in Jupyter needs ipywidgets and anywidget ({error}): run "
        "`pip install 'memlens[notebook]'` and restart the kernel, or write a page with write_html(path)."
    )
