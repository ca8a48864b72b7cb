// Boxes of everything in a figure that is read: which of them overlap, and which are cut.
// Oriented boxes, since labels of tokens are turned.
window.problemsOfFigure = function (div) {
  const frame = div.querySelector("svg.main-svg").getBoundingClientRect();
  const corners = function (element) {
    const box = element.getBBox(), matrix = element.getScreenCTM();
    return [[box.x, box.y], [box.x + box.width, box.y], [box.x + box.width, box.y + box.height],
      [box.x, box.y + box.height]].map(([x, y]) => {
      const point = new DOMPoint(x, y).matrixTransform(matrix);
      return [point.x, point.y];
    });
  };
  const turned = (a, b) => [b[1] - a[1], a[0] - b[0]];
  const range = function (points, axis) {
    const on = points.map((p) => (p[0] * axis[0] + p[1] * axis[1]) / Math.hypot(...axis));
    return [Math.min(...on), Math.max(...on)];
  };
  const depth = function (one, two) {  // of the overlap, in pixels; 0 or less where boxes are apart
    const axes = [one, two].flatMap((box) => [turned(box[0], box[1]), turned(box[1], box[2])]);
    return Math.min(...axes.filter((axis) => Math.hypot(...axis) > 0).map((axis) => {
      const [a, b] = [range(one, axis), range(two, axis)];
      return Math.min(a[1], b[1]) - Math.max(a[0], b[0]);
    }));
  };
  const hidden = (element) => element.closest("[style*='opacity: 0'],[style*='visibility: hidden']") !== null;
  const kinds = {
    tick: ".xtick text, .ytick text", "axis title": ".xtitle, .ytitle, .x2title, .y2title, .x3title, .y3title," +
      ".x4title, .y4title, .x5title, .x6title", title: ".gtitle, .gtitle-subtitle",
    annotation: ".annotation-text", legend: ".legendtext", "color bar": ".cbaxis text, .cbtitle text",
    menu: ".updatemenu-header", label: ".textpoint text"
  };
  const boxes = Object.entries(kinds).flatMap(([kind, selector]) =>
    Array.from(div.querySelectorAll(selector)).filter((e) => e.textContent.trim() && !hidden(e))
      .map((e) => ({kind, text: e.textContent.trim(), points: corners(e)})));
  Array.from(div.querySelectorAll(".cbfills")).forEach((e) =>
    boxes.push({kind: "color bar", text: "(scale)", points: corners(e)}));
  const layout = div._fullLayout, edge = div.getBoundingClientRect();
  const areas = Object.values(layout._plots).map(({xaxis, yaxis}) => {
    const [x, y] = [edge.x + xaxis._offset, edge.y + yaxis._offset];
    return {kind: "plot area", text: "", points: [[x, y], [x + xaxis._length, y],
      [x + xaxis._length, y + yaxis._length], [x, y + yaxis._length]]};
  });
  const named = (box) => `${box.kind} '${box.text}'`;
  const found = [];
  boxes.forEach(function (one, place) {
    const [xs, ys] = [range(one.points, [1, 0]), range(one.points, [0, 1])];
    if (xs[0] < frame.left - 1 || xs[1] > frame.right + 1 || ys[0] < frame.top - 1 || ys[1] > frame.bottom + 1) {
      found.push(`${named(one)} is cut`);
    }
    boxes.slice(place + 1).forEach(function (two) {
      if (one.kind === "label" && two.kind === "label") { return; }
      if (depth(one.points, two.points) > 1.5) { found.push(`${named(one)} overlaps ${named(two)}`); }
    });
    if (!["annotation", "label"].includes(one.kind)) {
      areas.forEach((area) => {
        if (depth(one.points, area.points) > 2.5) { found.push(`${named(one)} lies on a plot`); }
      });
    }
  });
  areas.forEach((area) => {
    const [xs, ys] = [range(area.points, [1, 0]), range(area.points, [0, 1])];
    if (xs[1] - xs[0] < 60 || ys[1] - ys[0] < 60) { found.push(`a plot of ${Math.round(xs[1] - xs[0])} × ${Math.round(ys[1] - ys[0])} px`); }
  });
  return found;
};
