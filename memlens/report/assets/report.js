"use strict";
(function () {
  const query = window.matchMedia("(prefers-color-scheme: dark)");
  const colors = function (layout) {
    const dark = query.matches;
    const ink = dark ? "#e4e7eb" : "#1f2933";
    const page = dark ? "#14181d" : "#ffffff";
    const grid = dark ? "#3a4450" : "#e4e7eb";
    const change = {
      paper_bgcolor: page, plot_bgcolor: page, "font.color": ink,
      "hoverlabel.bgcolor": page, "hoverlabel.font.color": ink
    };
    Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)).forEach(function (key) {
      change[key + ".gridcolor"] = grid;
    });
    (layout.updatemenus || []).forEach(function (menu, place) {
      change["updatemenus[" + place + "].bgcolor"] = page;
    });
    (layout.shapes || []).forEach(function (shape, place) {
      change["shapes[" + place + "].line.color"] = ink;
    });
    return change;
  };
  const plots = Array.from(document.querySelectorAll("div.chart"));
  const config = { responsive: true, displaylogo: false, showTips: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "sendDataToCloud", "sendChartToCloud"] };
  window.memlensReport = { query: query, colors: colors, config: config };
  plots.forEach(function (div) {
    const spec = JSON.parse(document.getElementById(div.id + "-data").textContent);
    Plotly.newPlot(div, spec.data, spec.layout, config).then(function () {
      return query.matches ? Plotly.relayout(div, colors(div.layout)) : div;
    }).then(function () { div.dataset.drawn = "yes"; });
  });
  query.addEventListener("change", function () {
    plots.forEach((div) => Plotly.relayout(div, colors(div.layout)));
  });
})();
