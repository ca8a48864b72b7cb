// The explorer's figures in a notebook. anywidget gives a module two seconds to load, and delivers no message
// to a widget whose module took longer. Plotly's script takes a slow browser longer than that, so it is no part
// of this module but data of the widget; and what is drawn comes through models of ipywidgets, which always hear.
const CONFIG = {
  displaylogo: false, displayModeBar: "hover", plotlyServerURL: "",
  modeBarButtonsToRemove: ["sendDataToCloud", "sendChartToCloud", "zoomIn2d", "zoomOut2d", "autoScale2d"],
};
const turn = () => new Promise((resolve) => setTimeout(resolve));  // lets the page do something else

// Plotly of this script, once for all explorers of a page; the page's own Plotly stays what it was.
function plotly(script) {
  window.memlensPlotly ??= (async () => {
    const before = window.Plotly;
    const parts = ["const module = {exports: {}}, exports = module.exports, define = undefined;\n",
      script, "\nexport default module.exports;"];
    const address = URL.createObjectURL(new Blob(parts, {type: "text/javascript"}));
    try {
      return (await import(address)).default;
    } finally {
      URL.revokeObjectURL(address);
      if (before) { window.Plotly = before; }
    }
  })();
  return window.memlensPlotly;
}

function render({ model, el }) {
  const kinds = Object.keys(model.get("sources"));  // in the order in which they are shown
  el.classList.add("memlens-figures");
  const waiting = document.createElement("div");
  waiting.textContent = "The figures are being prepared …";
  el.append(waiting);
  const places = Object.fromEntries(kinds.map((kind) => [kind, document.createElement("div")]));
  const stale = new Set(kinds);
  let drawing = false, gone = false, width = 0, library = null;
  const sources = {};

  async function draw(kind) {
    const { data, layout } = JSON.parse(sources[kind].get("value")), place = places[kind];
    const first = !place.parentElement;
    if (first) { el.append(place); }
    await library.react(place, data, { ...layout, width }, CONFIG);
    if (first) {
      place.on("plotly_click", ({ points: [{ curveNumber, pointNumber }] }) =>
        model.send({ clicked: kind, trace: curveNumber, cell: pointNumber }));
    }
  }

  async function drawStale() {
    if (drawing || !width) { return; }  // outside the page nothing can be measured
    drawing = true;
    try {
      library ??= await plotly(model.get("script"));
      waiting.remove();
      while (stale.size && !gone) {
        const kind = kinds.find((one) => stale.has(one));
        stale.delete(kind);
        await draw(kind);
        await turn();
      }
    } catch (error) {
      waiting.textContent = `The figures cannot be drawn: ${error}`;
      el.append(waiting);
      throw error;
    } finally {
      drawing = false;
    }
  }

  const renew = Object.fromEntries(kinds.map((kind) => [kind, () => { stale.add(kind); drawStale(); }]));
  const observer = new ResizeObserver(() => {
    if (el.clientWidth === width) { return; }
    width = el.clientWidth;
    kinds.forEach((kind) => stale.add(kind));
    drawStale();
  });
  (async () => {
    for (const kind of kinds) {
      sources[kind] = await model.widget_manager.get_model(model.get("sources")[kind]);
      sources[kind].on("change:value", renew[kind]);
    }
    observer.observe(el);
  })();
  return () => {
    gone = true;
    observer.disconnect();
    kinds.forEach((kind) => {
      sources[kind]?.off("change:value", renew[kind]);
      if (places[kind].parentElement) { library?.purge(places[kind]); }
    });
  };
}

export default { render };
