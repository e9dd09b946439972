"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");

  // Tips ------------------------------------------------------------------------------------------------------------

  function tell(title, lines, x, y) {
    const parts = lines.map(([name, text]) => {
      const line = document.createElement("div");
      for (const one of [name, text]) line.append(Object.assign(document.createElement("span"), { textContent: one }));
      return line;
    });
    tip.replaceChildren(...(title ? [Object.assign(document.createElement("b"), { textContent: title })] : []), ...parts);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(x - width / 2, document.documentElement.clientWidth - width - 8));
    tip.style.left = `${left}px`;
    tip.style.top = `${y - height - 12 < 8 ? y + 22 : y - height - 12}px`;
  }
  const hush = () => { tip.hidden = true; };
  // A tip belongs to a place. What the keys have reached is told again there; what was pointed at has moved away.
  addEventListener("scroll", () => {
    const reached = document.activeElement;
    if (!tip.hidden && reached && reached.retell) reached.retell();
    else hush();
  }, { passive: true, capture: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hush(); });

  // The grid of ranks -----------------------------------------------------------------------------------------------

  const rows = (grid) => [...grid.querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll("td")]);
  const chooser = document.getElementById("choose");
  for (const grid of document.querySelectorAll(".ranks")) {
    const cells = [...grid.querySelectorAll("td[role=gridcell]")];
    const tellOf = (cell) => {
      const box = cell.getBoundingClientRect();
      tell(cell.dataset.label, JSON.parse(cell.dataset.facts), box.left + box.width / 2, box.top);
    };
    const enter = (cell) => {
      cells.forEach((one) => { one.tabIndex = one === cell ? 0 : -1; });
      cell.focus();
    };
    if (cells.length) (cells.find((one) => chooser && one.dataset.matrix === chooser.value) || cells[0]).tabIndex = 0;
    for (const cell of cells) {
      cell.retell = () => tellOf(cell);
      cell.addEventListener("pointerenter", () => tellOf(cell));
      cell.addEventListener("pointerleave", hush);
      cell.addEventListener("focus", () => tellOf(cell));
      cell.addEventListener("blur", hush);
      cell.addEventListener("click", () => { enter(cell); choose(cell.dataset.matrix); });
    }
    grid.addEventListener("keydown", (event) => {
      const all = rows(grid);
      let y = all.findIndex((row) => row.includes(document.activeElement));
      if (y < 0) return;
      let x = all[y].indexOf(document.activeElement);
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        choose(document.activeElement.dataset.matrix);
        return;
      }
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (event.key === "Home") { x = -1; [y, x] = next(all, y, x, [0, 1]); }
      else if (event.key === "End") { x = all[y].length; [y, x] = next(all, y, x, [0, -1]); }
      else if (step) [y, x] = next(all, y, x, step);
      else return;
      event.preventDefault();
      enter(all[y][x]);
    });
  }
  function next(all, y, x, [down, right]) {  // the next matrix in that direction; holes are passed over
    let [row, column] = [y + down, x + right];
    while (all[row] && all[row][column]) {
      if (all[row][column].matches("[role=gridcell]")) return [row, column];
      row += down;
      column += right;
    }
    return [y, x];
  }

  // Charts ----------------------------------------------------------------------------------------------------------

  const asRows = (columns) => {
    const names = Object.keys(columns);
    return names.length ? columns[names[0]].map((_, at) => Object.fromEntries(names.map((key) => [key, columns[key][at]]))) : [];
  };

  async function draw(place) {
    const { spec, data: sets, main } = data.charts[place.dataset.chart];
    if (place.view) place.view.finalize();
    const parsed = structuredClone(data.specs[spec]);
    for (const set of parsed.data) if (sets[set.name]) set.values = asRows(sets[set.name]);
    place.replaceChildren();
    const view = new vega.View(vega.parse(parsed), { renderer: "svg", container: place, hover: true });
    view.tooltip((_, event, item, value) => {
      if (!value || !event) return hush();
      tell("", Object.entries(value), event.clientX, event.clientY);
    });
    place.view = view;
    await view.runAsync();
    place.dataset.drawn = "yes";
    let at = -1;
    place.onkeydown = (event) => {
      const points = asRows(sets[main[0]]);
      const moves = { ArrowRight: at + 1, ArrowLeft: at < 0 ? points.length - 1 : at - 1, Home: 0, End: points.length - 1 };
      if (!(event.key in moves) || !points.length) return;
      event.preventDefault();
      at = Math.max(0, Math.min(moves[event.key], points.length - 1));
      place.retell = () => tellPoint(place, view, main, points[at]);
      place.retell();
    };
    place.onblur = () => { hush(); place.retell = null; at = -1; };
  }

  function tellPoint(place, view, [, across, up], point) {
    const box = place.querySelector("svg").getBoundingClientRect();
    const [left, top] = view.origin();
    const value = point[up];
    const scale = view.scale("y");
    const middle = scale.bandwidth ? scale.bandwidth() / 2 : 0;
    const inWords = (one) => (typeof one === "number" ? Number(one.toPrecision(5)).toLocaleString("en") : String(one));
    const named = "set" in point ? [["of", point.set]] : [];
    tell("", [...named, [across, inWords(point[across])], [up, inWords(value)]],
      box.left + left + view.scale("x")(point[across]), box.top + top + scale(value) + middle);
  }

  async function choose(name) {
    const found = data.matrices && data.matrices[name];
    if (!chooser || !found) return;
    chooser.value = name;
    for (const cell of document.querySelectorAll(".ranks td[data-matrix]"))
      cell.setAttribute("aria-selected", String(cell.dataset.matrix === name));
    document.getElementById("words").textContent = found.words;
    const place = document.querySelector('[data-chart="matrix"]');
    const chart = data.charts.matrix;
    chart.data.rank = found.rank;
    if (window.vega) await draw(place);
  }
  if (chooser) {
    chooser.addEventListener("change", () => choose(chooser.value));
    await choose(chooser.value);
  }

  for (const select of document.querySelectorAll("select[data-panels]")) {
    const show = () => {
      for (const panel of document.querySelectorAll("[data-panel]")) panel.hidden = panel.dataset.panel !== select.value;
    };
    select.addEventListener("change", show);
    show();
  }

  for (const button of document.querySelectorAll("button[data-copies]"))
    button.addEventListener("click", async () => {
      const code = document.getElementById(button.dataset.copies);
      getSelection().selectAllChildren(code);
      try { await navigator.clipboard.writeText(code.textContent); } catch { document.execCommand("copy"); }
      button.textContent = "Copied";
    });

  const packed = Uint8Array.from(atob(document.getElementById("packed-vega").textContent), (one) => one.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(Object.assign(document.createElement("script"), { textContent: await new Response(stream).text() }));
  for (const place of document.querySelectorAll(".plot")) await draw(place);
  document.body.dataset.ready = "yes";
})();
