"use strict";
(function () {
  const report = window.memlensReport;

  // ---- reading the payload -------------------------------------------------------------------------------
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const sixteen = function (text) {
    const raw = bytes(text);
    return Array.from({ length: raw.length / 2 }, (_, i) => raw[2 * i] + 256 * raw[2 * i + 1]);
  };
  const shares = (text) => sixteen(text).map((value) => value / 65535);
  const rows = function (values, width) {
    return Array.from({ length: values.length / width }, (_, i) => values.slice(i * width, (i + 1) * width));
  };
  const causal = function (packed, n) { // a byte above 0 is a weight, a 0 is followed by a count of zeros
    const raw = bytes(packed), map = [];
    let at = 0, zeros = 0;
    for (let query = 0; query < n; query++) {
      const row = new Array(n).fill(null);
      for (let key = 0; key <= query; key++) {
        if (zeros === 0 && raw[at] === 0) { zeros = raw[at + 1]; at += 2; }
        if (zeros > 0) { row[key] = 0; zeros -= 1; } else { row[key] = raw[at] / 255; at += 1; }
      }
      map.push(row);
    }
    return map;
  };

  const start = function (root) {
    const data = JSON.parse(document.getElementById(root.id + "-data").textContent);
    const part = {};
    root.querySelectorAll("[data-part]").forEach(function (element) { part[element.dataset.part] = element; });
    const state = { sequence: 0, edit: "", layer: 0, head: 0, token: 0 };
    const shown = () => data.sequences[state.sequence];
    const written = () => shown().edited.find((one) => one.name === state.edit) || shown().as_it_is;
    const text = (word) => data.words[word][0];
    const label = (sequence, place) => data.words[sequence.tokens[place]][1] + "_" + place;
    const labels = (sequence, from) => sequence.tokens.slice(from).map((_, i) => label(sequence, from + i));
    const make = function (tag, content, kind) {
      const element = document.createElement(tag);
      element.textContent = content;
      if (kind) { element.className = kind; }
      return element;
    };
    const options = function (select, entries, chosen) {
      select.replaceChildren.apply(select, entries.map(function (entry) {
        const option = make("option", entry[1]);
        option.value = entry[0];
        return option;
      }));
      select.value = chosen;
    };

    // ---- tokens ------------------------------------------------------------------------------------------
    const shade = function (probability, right) {
      const depth = 0.1 + 0.35 * (right ? probability : 1 - probability);
      return "rgba(" + (right ? "0,114,178" : "213,94,0") + "," + depth.toFixed(2) + ")";
    };
    const describe = function (place) {
      const sequence = shown(), one = written(), target = place - sequence.prefix_len;
      const name = "token " + place + ": “" + text(sequence.tokens[place]) + "”";
      if (target < 0) { return name + ", given"; }
      return name + (one.correct[target] === "1" ? ", recalled" : ", not recalled") +
        ": probability " + shares(one.probability)[target].toFixed(3) +
        ", rank " + sixteen(one.rank)[target] + " (" + one.name + "); greedy: “" + text(one.greedy[target]) + "”";
    };
    const choose = function (place, focus) {
      const all = part.tokens.children;
      if (all[state.token]) { all[state.token].tabIndex = -1; }
      state.token = place;
      all[place].tabIndex = 0;
      part.detail.textContent = describe(place);
      if (focus) { all[place].focus(); }
    };
    const drawTokens = function () {
      const sequence = shown(), one = written(), p = shares(one.probability);
      part.tokens.replaceChildren.apply(part.tokens, sequence.tokens.map(function (word, place) {
        const target = place - sequence.prefix_len;
        const right = one.correct[target] === "1";
        const token = make("span", "", "token " + (target < 0 ? "given" : right ? "right" : "wrong"));
        token.setAttribute("role", "button");
        token.tabIndex = -1;
        token.append(make("bdi", text(word)));
        if (target >= 0) { token.style.backgroundColor = shade(p[target], right); }
        return token;
      }));
      choose(Math.min(state.token, sequence.tokens.length - 1), false);
    };
    const placeOf = function (event) {
      const token = event.target.closest(".token");
      return token ? Array.prototype.indexOf.call(part.tokens.children, token) : -1;
    };
    ["mouseover", "click", "focusin"].forEach(function (kind) {
      part.tokens.addEventListener(kind, function (event) {
        const place = placeOf(event);
        if (place >= 0 && place !== state.token) { choose(place, false); }
      });
    });
    part.tokens.addEventListener("keydown", function (event) {
      const last = part.tokens.children.length - 1;
      const next = { ArrowRight: Math.min(state.token + 1, last), ArrowLeft: Math.max(state.token - 1, 0),
        Home: 0, End: last }[event.key];
      if (next === undefined) { return; }
      event.preventDefault();
      choose(next, true);
    });

    // ---- what is written ---------------------------------------------------------------------------------
    const line = function (name, words, same) {
      const row = document.createElement("tr"), head = make("th", name), cell = document.createElement("td");
      const box = document.createElement("div");
      head.scope = "row";
      words.forEach(function (word, place) {
        const token = make("bdi", text(word));
        if (same && same[place] === "0") { token.className = "changed"; }
        box.append(token);
      });
      cell.append(box);
      row.append(head, cell);
      return row;
    };
    const share = function (one) {
      const right = one.same.split("1").length - 1;
      return one.name + " (memorization score: " + right + " of " + one.same.length + " tokens)";
    };
    const drawWritten = function () {
      const sequence = shown(), one = written(), plain = sequence.as_it_is;
      const lines = [line("the true continuation", sequence.tokens.slice(sequence.prefix_len))];
      lines.push(line(share(plain), plain.tokens, plain.same));
      if (one !== plain) { lines.push(line(share(one), one.tokens, one.same)); }
      part.written.replaceChildren.apply(part.written, lines);
    };

    // ---- figures -----------------------------------------------------------------------------------------
    const clone = (value) => JSON.parse(JSON.stringify(value));
    const dark = function (layout) { // lines in these maps are of colors that show on either page
      const change = report.colors(layout);
      Object.keys(change).filter((key) => key.startsWith("shapes")).forEach((key) => delete change[key]);
      return change;
    };
    const draw = function (name, traces, change) {
      const spec = clone(data.figures[name]), div = part[name];
      traces.forEach((trace, place) => Object.assign(spec.data[place], trace));
      if (change) { change(spec.layout); }
      div.style.height = spec.layout.height + "px";
      return Plotly.react(div, spec.data, spec.layout, report.config).then(function () {
        return report.query.matches ? Plotly.relayout(div, dark(div.layout)) : div;
      }).then(function () { div.dataset.drawn = "yes"; });
    };
    const range = (n) => Array.from({ length: n }, (_, i) => i);
    const drawLens = function () {
      const sequence = shown(), n = sequence.tokens.length - sequence.prefix_len;
      const z = rows(shares(sequence.lens_probability), n);
      draw("lens", [{ z: z, customdata: rows(sixteen(sequence.lens_rank), n), y: range(z.length),
        x: labels(sequence, sequence.prefix_len) }]);
    };
    const drawEffects = function () {
      const sequence = shown();
      const layers = range(sequence.heads.length), beside = layers.map((i) => [sequence.mlp[i], sequence.bypass[i]]);
      const map = function (z) {
        const limit = Math.max.apply(null, z.map((row) => Math.max.apply(null, row.map(Math.abs)))) || 1;
        return { z: z, y: layers, zmin: -limit, zmax: limit };
      };
      const traces = [map(sequence.heads), map(beside)];
      traces[1].customdata = layers.map(() => ["MLP", "bypass"]);
      draw("effects", traces, function (layout) {
        Object.assign(layout.shapes[0], { x0: state.head - 0.5, x1: state.head + 0.5,
          y0: state.layer - 0.5, y1: state.layer + 0.5 });
      }).then(function () {
        if (part.effects.dataset.listens) { return; }
        part.effects.dataset.listens = "yes";
        part.effects.on("plotly_click", function (event) {
          const point = event.points[0], layer = point.pointNumber[0], column = point.pointNumber[1];
          if (point.curveNumber === 0) { chooseHead(layer, column); } else if (column === 1) { chooseBypass(layer); }
        });
      });
    };
    const drawAttention = function () {
      const sequence = shown(), n = sequence.tokens.length, name = "L" + state.layer + "H" + state.head;
      const kept = sequence.attention.find((one) => one.layer === state.layer && one.head === state.head);
      part["attention-title"].textContent = "Attention of " + name + " in the unchanged model";
      const names = sequence.attention.map((one) => "L" + one.layer + "H" + one.head);
      part["attention-note"].textContent = kept ? "" : "The attention of " + name + " on this sequence is not " +
        "on this page, which keeps " + (names.length || "none") + " of its maps" + (names.length ?
        ", those of the heads with the largest effects: " + names.slice(0, 24).join(", ") : "") + ".";
      part.attention.hidden = !kept;
      if (!kept) { return; }
      const places = labels(sequence, 0);
      draw("attention", [{ z: causal(kept.map, n), x: places, y: places }], function (layout) {
        const cut = sequence.prefix_len - 0.5;
        Object.assign(layout.shapes[0], { x0: cut, x1: cut, y0: -0.5, y1: n - 0.5 });
        Object.assign(layout.shapes[1], { y0: cut, y1: cut, x0: -0.5, x1: n - 0.5 });
      });
    };

    // ---- choosing ----------------------------------------------------------------------------------------
    const chooseHead = function (layer, head) {
      state.layer = layer;
      state.head = head;
      part.layer.value = layer;
      part.head.value = head;
      drawEffects();
      drawAttention();
    };
    const chooseEdit = function (name) {
      state.edit = name;
      part.edit.value = name;
      drawTokens();
      drawWritten();
    };
    const chooseBypass = function (layer) {
      const one = shown().edited.find((edit) => edit.bypassed.length === 1 && edit.bypassed[0] === layer &&
        edit.ablated.length === 0);
      if (one) { chooseEdit(one.name); }
    };
    const chooseSequence = function (place) {
      state.sequence = place;
      const sequence = shown(), names = sequence.edited.map((one) => one.name);
      const plain = sequence.as_it_is.name;
      if (names.indexOf(state.edit) < 0) { state.edit = plain; }
      options(part.edit, [plain].concat(names).map((name) => [name, name]), state.edit);
      const missing = [];
      if (sequence.left_out.edited) { missing.push(sequence.left_out.edited + " edits"); }
      if (sequence.left_out.attention) { missing.push(sequence.left_out.attention + " attention maps"); }
      part["left-out"].textContent = missing.length ? "Left out to keep the page small, smallest effects first: " +
        missing.join(" and ") + "." : "";
      state.token = Math.min(sequence.prefix_len, sequence.tokens.length - 1);
      drawTokens();
      drawWritten();
      drawLens();
      drawEffects();
      drawAttention();
    };
    const first = data.sequences[0];
    options(part.sequence, data.sequences.map((one, place) => [place, one.label]), 0);
    options(part.layer, range(first.heads.length).map((layer) => [layer, layer]), 0);
    options(part.head, range(first.heads[0].length).map((head) => [head, head]), 0);
    part.sequence.addEventListener("change", () => chooseSequence(Number(part.sequence.value)));
    part.edit.addEventListener("change", () => chooseEdit(part.edit.value));
    ["layer", "head"].forEach(function (name) {
      part[name].addEventListener("change", () => chooseHead(Number(part.layer.value), Number(part.head.value)));
    });
    report.query.addEventListener("change", function () { drawLens(); drawEffects(); drawAttention(); });
    if (first.attention.length) { // the strongest head, if its map is here
      state.layer = first.attention[0].layer;
      state.head = first.attention[0].head;
      part.layer.value = state.layer;
      part.head.value = state.head;
    }
    chooseSequence(0);
    root.dataset.ready = "yes";
  };
  document.querySelectorAll("div.explorer").forEach(start);
})();
