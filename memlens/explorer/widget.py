"""The Jupyter widget of an `Explorer`: ipywidgets and `show_plots` (extra `notebook`).

The widget has no state of its own: user actions call the explorer, and each change redraws the widget. It is
drawn with a sequence's text and lens; the effects are measured a portion at a time between the kernel's other
work, and drawn as they come.
"""

from __future__ import annotations

import asyncio
from threading import RLock
from time import monotonic
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.core.getipython import get_ipython
from IPython.display import display

from memlens.errors import MemlensError
from memlens.explorer.drawing import FIGURES, tokens_html, written_html
from memlens.explorer.plots import show_plots
from memlens.figures.exploring import BRANCHES
from memlens.instruments.ablate.heads import head_label

if TYPE_CHECKING:
    from memlens.explorer.explorer import Explorer


_WRAP = widgets.Layout(flex_flow="row wrap", align_items="center")
_AT_ONCE = 2.0
"""Seconds for which a sequence is measured before it is drawn; small models are done by then."""
_PAUSE = 0.02
"""Seconds between two portions, in which the kernel turns to what the user has done."""


class ExplorerWidget:
    """The parts of the Jupyter widget.

    Args:
        explorer: The explorer; its changes are shown at once.

    Attributes:
        box: The whole widget.
        sequence: The menu of sequences.
        layer: The menu of layers, for the head whose attention is shown.
        head: The menu of heads.
        ablate: Switches the ablation of the selected head.
        bypass: One switch per layer.
        clear: Switches all edits off.
        tokens: The tokens, colored by recall under the current edits.
        written: What the model generates, unchanged and under the edits.
        progress: A bar that shows while a sequence is measured, and names the step.
        figures: The figures as they are shown, by kind ("lens", "effects", "attention").
        plots: Shows the figures; a click on a head selects it.
    """

    box: Any
    sequence: Any
    layer: Any
    head: Any
    ablate: Any
    bypass: list[Any]
    clear: Any
    tokens: Any
    written: Any
    progress: Any
    figures: dict[str, go.Figure]
    plots: Any

    def __init__(self, explorer: Explorer) -> None:
        self._explorer, self._busy, self._waiting = explorer, False, False
        self._lock = RLock()  # JupyterLab has clicks handled in a thread of their own
        self._begun: set[str] = set()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._steps = explorer.steps
        self.progress = self._bar()
        explorer.on_step(self._show_step)
        if get_ipython() is not None:  # the box is there only after the first measurement
            display(self.progress)
        self._begin()
        n_layers, n_heads = explorer.shown.head_effects.shape
        self.progress.close()
        self.progress = self._bar()
        self.sequence = widgets.Dropdown(
            options=_menu(explorer), description="sequence", layout={"width": "32em"}
        )
        self.layer = widgets.Dropdown(options=range(n_layers), description="layer", layout={"width": "11em"})
        self.head = widgets.Dropdown(options=range(n_heads), description="head", layout={"width": "11em"})
        self.ablate = widgets.ToggleButton(icon="scissors", layout={"width": "11em"})
        self.bypass = [
            widgets.ToggleButton(
                description=f"L{layer}",
                tooltip=f"bypass the attention of layer {layer}",
                layout={"width": "4em"},
            )
            for layer in range(n_layers)
        ]
        self.clear = widgets.Button(
            description="clear", tooltip="switch all edits off", layout={"width": "5em"}
        )
        self.tokens, self.written = widgets.HTML(), widgets.HTML()
        self.figures = {kind: explorer.figure(kind, partial=True) for kind in FIGURES}
        self._drawn = self._figure_states()
        self.plots = show_plots(self.figures, self._cell_clicked)
        self.box = self._laid_out()
        self._listen()
        explorer.on_change(self.show)
        self.show()

    def show(self) -> None:
        """Draw everything again from the explorer."""
        with self._lock:
            if self._busy:
                return
            self._busy = True  # setting a menu's value must not count as a user's choice
            try:
                self._begin()
                self._show_controls()
                self._show_text()
                self._show_figures()
            finally:
                self._busy = False
        self._go_on()

    def _begin(self) -> None:
        """Measure what the first draw of the selected sequence needs, and more for a moment."""
        explorer = self._explorer
        if explorer.selected in self._begun and self._goes_on:
            return
        until = monotonic() + _AT_ONCE
        while explorer.measure_more() and not (self._goes_on and monotonic() > until):
            pass
        self._begun.add(explorer.selected)

    @property
    def _goes_on(self) -> bool:
        """Whether there is a kernel that turns to the next portion when it has nothing else to do."""
        return self._loop is not None and self._loop.is_running()

    def _go_on(self) -> None:
        """Measure the next portion when the kernel has nothing else to do."""
        if self._loop is not None and self._goes_on and not self._waiting and not self._explorer.complete:
            self._waiting = True
            self._loop.call_soon_threadsafe(self._loop.call_later, _PAUSE, self._measure)

    def _measure(self) -> None:
        self._waiting = False
        try:
            self._explorer.measure_more()
            self.show()
        except MemlensError as error:  # the model was changed
            self._show_step("stopped")
            self.progress.bar_style, self.progress.tooltip = "danger", str(error)

    def _show_step(self, step: str) -> None:
        """Show which step of a measurement begins; the bar is hidden when there is none."""
        self.progress.layout.visibility = "visible" if step else "hidden"
        self.progress.value = self._steps.index(step) if step in self._steps else 0
        self.progress.description, self.progress.bar_style = step, ""

    def _bar(self) -> widgets.IntProgress:
        """Return a bar that counts the steps of a measurement; hidden at first."""
        layout = {"width": "32em", "visibility": "hidden"}
        return widgets.IntProgress(max=len(self._steps), layout=layout, style={"description_width": "14em"})

    def _show_figures(self) -> None:
        """Redraw figures of which something changed; all figures show the unchanged model."""
        for kind, state in self._figure_states().items():
            if self._drawn[kind] != state:
                self.figures[kind] = self._explorer.figure(kind, partial=True)
                self.plots.draw(kind, self.figures[kind])
                self._drawn[kind] = state

    def _figure_states(self) -> dict[str, Any]:
        """Return what each figure depends on."""
        explorer = self._explorer
        return {
            "lens": explorer.selected,
            "effects": (explorer.shown, explorer.shown_head),
            "attention": (explorer.selected, explorer.shown_head),
        }

    def _show_controls(self) -> None:
        explorer = self._explorer
        self.sequence.value = explorer.selected
        head = explorer.shown_head
        self.layer.value, self.head.value = head
        self.ablate.description = f"ablate {head_label(head)}"
        self.ablate.value = head in explorer.edits.ablated
        for layer, button in enumerate(self.bypass):
            button.value = layer in explorer.edits.bypassed

    def _show_text(self) -> None:
        view, continuation = self._explorer.shown, self._explorer.continuation
        self.tokens.value = tokens_html(view, continuation)
        written = [written_html(view, view.continuation)]
        if continuation.edits:
            written.append(written_html(view, continuation))
        self.written.value = "".join(written)

    def _listen(self) -> None:
        explorer = self._explorer
        self.sequence.observe(self._chosen(lambda change: explorer.select(change["new"])), "value")
        for menu in (self.layer, self.head):
            menu.observe(self._chosen(lambda change: explorer.select_head(*self._asked)), "value")
        self.ablate.observe(self._chosen(lambda change: explorer.toggle(*explorer.shown_head)), "value")
        for layer, button in enumerate(self.bypass):
            button.observe(self._chosen(lambda change, layer=layer: explorer.toggle(layer)), "value")
        self.clear.on_click(self._chosen(lambda button: explorer.clear()))

    @property
    def _asked(self) -> tuple[int, int]:
        """The head that is selected in the two menus."""
        return int(self.layer.value or 0), int(self.head.value or 0)

    def _chosen(self, act: Any) -> Any:
        """Return a listener that ignores changes by the widget itself."""

        def listener(change: Any) -> None:
            with self._lock:
                if not self._busy:
                    act(change)

        return listener

    def _cell_clicked(self, kind: str, trace: int, row: int, column: int) -> None:
        """Select the head, or switch the bypass, of a cell of the map of effects."""
        if kind == "effects" and trace == 0:
            self._explorer.select_head(row, column)
        elif kind == "effects" and column == list(BRANCHES).index("bypass"):
            self._explorer.toggle(row)

    def _laid_out(self) -> widgets.VBox:
        heading = widgets.HTML("<b>bypass attention of</b>")
        return widgets.VBox(
            [
                widgets.HBox([self.sequence, self.progress], layout=_WRAP),
                widgets.HBox([heading, *self.bypass], layout=_WRAP),
                widgets.HBox([self.layer, self.head, self.ablate, self.clear], layout=_WRAP),
                self.tokens,
                self.written,
                self.plots,
            ]
        )


def _menu(explorer: Explorer) -> list[tuple[str, str]]:
    """Return pairs of label (with the share of targets that are right) and id for the menu of sequences."""
    shares = explorer.table["target_accuracy"]
    return [
        (f"{name} · {share:.0%} of targets right", name)
        for name, share in zip(explorer.ids, shares, strict=True)
    ]
