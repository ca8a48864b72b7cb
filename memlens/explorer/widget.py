"""The Jupyter widget of an `Explorer`: ipywidgets and plotly's FigureWidget (extra `notebook`).

The widget has no state of its own: user actions call the explorer, and each change redraws the widget. It is
drawn with a sequence's text and lens; the effects are measured a portion at a time between the kernel's other
work, and drawn as they come.
"""

from __future__ import annotations

import asyncio
import json
from threading import RLock
from time import monotonic
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.core.getipython import get_ipython
from IPython.display import display

from memlens.errors import MemlensError
from memlens.explorer.drawing import tokens_html, written_html
from memlens.files import json_text
from memlens.instruments.ablate.heads import head_label

if TYPE_CHECKING:
    from memlens.explorer.explorer import Explorer


_WRAP = widgets.Layout(flex_flow="row wrap", align_items="center")
_KINDS = ("lens", "effects", "attention")
_AT_ONCE = 2.0
"""Seconds for which a sequence is measured before it is drawn; small models are done by then."""
_PAUSE = 0.02
"""Seconds between two portions, in which the kernel turns to what the user has done."""
_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendDataToCloud", "sendChartToCloud"],
}


class _Fitting(anywidget.AnyWidget):
    """An empty line of the box that has figures drawn again when the box has got its size, or another one.

    A `FigureWidget` is drawn before it is on the page: 700 pixels wide, and with titles that it could not
    measure. The box grows when a figure comes, and has its width from the cell.
    """

    _esm = """
    export default { render({ el }) {
      let last = "";
      const observer = new ResizeObserver(() => {
        if (!el.parentElement) { return; }
        observer.observe(el.parentElement);
        const { width, height } = el.parentElement.getBoundingClientRect();
        if (width > 0 && `${width} ${height}` !== last) {
          last = `${width} ${height}`;
          window.dispatchEvent(new Event("resize"));
        }
      });
      observer.observe(el);
      return () => observer.disconnect();
    } };
    """


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
        figures: By kind ("lens", "effects", "attention") a `FigureWidget`; a click on a head selects it.
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
    figures: dict[str, Any]

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
        self._drawn: dict[str, Any] = {}
        self.figures = {kind: _live(explorer.figure(kind, partial=True)) for kind in _KINDS}
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
        explorer = self._explorer
        of = {
            "lens": explorer.selected,
            "effects": (explorer.shown, explorer.shown_head),
            "attention": (explorer.selected, explorer.shown_head),
        }
        for kind, shown in self.figures.items():
            if self._drawn.get(kind) != of[kind]:
                _redraw(shown, _without_nan(explorer.figure(kind, partial=True)))
                self._drawn[kind] = of[kind]

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
        effects = self.figures["effects"]
        effects.data[0].on_click(self._head_clicked)
        effects.data[1].on_click(self._branch_clicked)

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

    def _head_clicked(self, trace: Any, points: Any, state: Any) -> None:
        if points.point_inds:
            layer, head = points.point_inds[0]
            self._explorer.select_head(int(layer), int(head))

    def _branch_clicked(self, trace: Any, points: Any, state: Any) -> None:
        if points.point_inds and points.point_inds[0][1] == 1:
            self._explorer.toggle(int(points.point_inds[0][0]))

    def _laid_out(self) -> widgets.VBox:
        heading = widgets.HTML("<b>bypass attention of</b>")
        return widgets.VBox(
            [
                widgets.HBox([self.sequence, self.progress], layout=_WRAP),
                widgets.HBox([heading, *self.bypass], layout=_WRAP),
                widgets.HBox([self.layer, self.head, self.ablate, self.clear], layout=_WRAP),
                self.tokens,
                self.written,
                *self.figures.values(),
                _Fitting(layout={"width": "100%", "height": "0"}),
            ]
        )


def _menu(explorer: Explorer) -> list[tuple[str, str]]:
    """Return pairs of label (with the share of targets that are right) and id for the menu of sequences."""
    shares = explorer.table["target_accuracy"]
    return [
        (f"{name} · {share:.0%} of targets right", name)
        for name, share in zip(explorer.ids, shares, strict=True)
    ]


def _live(figure: go.Figure) -> go.FigureWidget:
    shown = go.FigureWidget(_without_nan(figure))
    shown._config = {**shown._config, **_CONFIG}
    return shown


def _redraw(shown: Any, figure: Any) -> None:
    """Show another figure of the same kind and keep its click handlers."""
    with shown.batch_update():
        for old, new in zip(shown.data, figure.data, strict=True):
            old.update(new.to_plotly_json(), overwrite=True)
        shown.layout.update(figure.layout.to_plotly_json(), overwrite=True)


def _without_nan(figure: Any) -> Any:
    """Return a figure with None for NaN and infinity: a widget's message is JSON, which has neither."""
    traces = json.loads(json_text([trace.to_plotly_json() for trace in figure.data]))
    return go.Figure(traces, figure.layout)
