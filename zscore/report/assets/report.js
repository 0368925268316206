"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  /** Draws into a box at its width, and again when that changes; returns what draws anew. */
  function mount(id, draw) {
    const box = byId(id);
    if (!box) return () => {};
    let width = 0;
    const redraw = () => {
      if (width < 40) return;
      const svg = draw(width);
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", box.dataset.label);
      // Plot labels its groups, which ARIA forbids for elements without a role.
      svg.querySelectorAll("g[aria-label]").forEach((group) => group.removeAttribute("aria-label"));
      box.replaceChildren(svg);
    };
    new ResizeObserver(() => {
      if (Math.abs(box.clientWidth - width) < 1) return;
      width = box.clientWidth;
      redraw();
    }).observe(box);
    return redraw;
  }

  mount("status-chart", (width) => charts.statuses(data, width));
  if (!data.scores) return;
  const means = data.scores.map((_, s) => d3.sum(data.sums[s][s]) / data.rows);
  data.scores.forEach((_, s) => mount(`score-${s}`, (width) => charts.histogram(data, s, width, means[s])));
  if (data.correlation) mount("correlation-chart", (width) => charts.correlation(data, width));
  data.uncertainty.forEach((_, d) => mount(`uncertainty-${d}`, (width) => charts.uncertainty(data, d, width)));

  // Of bins, what lies at or above each stop; bin 0 is below the first one.
  const from = (bins) => d3.cumsum(bins.slice(1).reverse()).reverse();
  const kept = data.counts.map((bins) => Array.from(from(bins)));
  const sums = data.sums.map((of) => of.map((bins) => Array.from(from(bins))));
  const covered = data.covered.map((bins) => Array.from(from(bins)));
  const meanOf = (s, t, i) => (kept[s][i] ? sums[s][t][i] / kept[s][i] : null);
  const chosen = { score: 0, at: 0 };
  const slider = byId("t-value");
  // The command is there to be pasted, and a table made elsewhere may call a column anything.
  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);
  const written = (i) => data.stops[i].toFixed(data.decimals);

  const redraws = [
    mount("t-histogram", (width) => charts.parted(data, chosen.score, chosen.at, width)),
    mount("t-shares", (width) => charts.curve(data, [
      { values: kept[chosen.score].map((count) => count / data.rows) },
      ...(data.groups ? [{ values: covered[chosen.score].map((count) => count / data.groups), dashed: true }] : []),
    ], chosen.at, width, { percent: true, domain: [0, 100], tickFormat: (value) => `${value}%` })),
    mount("t-means", (width) => charts.curve(data, [
      { values: data.stops.map((_, i) => meanOf(chosen.score, chosen.score, i)) },
    ], chosen.at, width, { nice: true, zero: false })),
  ];

  function numbers() {
    const { score, at } = chosen;
    const count = kept[score][at];
    const mean = meanOf(score, score, at);
    byId("t-shown").textContent = written(at);
    byId("t-name").textContent = data.scores[score];
    byId("t-kept").textContent = charts.whole(count);
    byId("t-share").textContent = charts.percent(count / data.rows);
    byId("t-mean").textContent = mean === null ? "–" : charts.score(mean);
    if (data.groups) {
      byId("t-groups").textContent = `${charts.whole(covered[score][at])} of ${charts.whole(data.groups)}`;
    }
    [...byId("t-table").rows].forEach((row, t) => {
      const of = meanOf(score, t, at);
      const change = of === null ? null : of - means[t];
      row.cells[2].textContent = of === null ? "–" : charts.score(of);
      row.cells[3].textContent = change === null ? "–" : `${change < 0.005 ? "" : "+"}${charts.signed(change)}`;
    });
    const name = data.scores[score] === "overall" ? "" : `${data.scores[score]}=`;
    byId("t-command").textContent = `${data.command} --min ${quoted(`${name}${written(at)}`)}`;
    slider.setAttribute("aria-valuetext", `${written(at)}, keeps ${charts.percent(count / data.rows)}`);
  }

  // What is read aloud waits until the slider rests.
  let resting;
  function say() {
    clearTimeout(resting);
    resting = setTimeout(() => {
      const text = (id) => byId(id).textContent;
      byId("t-status").textContent =
        `${data.scores[chosen.score]} of at least ${text("t-shown")} keeps ${text("t-kept")} of ` +
        `${charts.whole(data.rows)} pictures, ${text("t-share")}, with a mean of ${text("t-mean")}` +
        (data.groups ? `, in ${text("t-groups")} groups.` : ".");
    }, 350);
  }

  let asked = 0;
  function show(at, quietly) {
    chosen.at = Math.max(0, Math.min(data.stops.length - 1, at));
    slider.value = String(data.stops[chosen.at]);
    numbers();
    if (!quietly) say();
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(() => redraws.forEach((redraw) => redraw()));
  }

  /** The stop that keeps the share nearest to the wanted one. */
  const nearest = (share) => d3.leastIndex(kept[chosen.score], (count) => Math.abs(count / data.rows - share));

  slider.addEventListener("input", () =>
    show(d3.leastIndex(data.stops, (stop) => Math.abs(stop - Number(slider.value)))));
  byId("t-score").addEventListener("change", (event) => {
    chosen.score = Number(event.target.value);
    show(chosen.at);
  });
  for (const button of document.querySelectorAll("[data-share]")) {
    button.addEventListener("click", () => show(nearest(Number(button.dataset.share) / 100)));
  }
  byId("threshold-live").hidden = false;
  byId("t-score").value = "0";
  show(nearest(0.3), true);
})();
