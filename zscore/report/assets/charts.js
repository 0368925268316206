"use strict";
// The drawings. Colours are CSS variables, so dark and light switch without drawing anew.
const charts = (() => {
  const whole = d3.format(",");
  const percent = (share) => d3.format(".1%")(share);
  const score = (value) => d3.format(".2f")(value);
  /** With two decimals and a true minus, but for −0.00. */
  const signed = (value) => score(Math.abs(value) < 0.005 ? 0 : value);
  const short = (name, most) => (name.length > most ? `${name.slice(0, most - 1)}…` : name);
  const marginFor = (names, most) => 18 + 6.8 * d3.max(names, (name) => short(name, most).length);
  const frame = { className: "plot", marginTop: 12, marginBottom: 24 };

  /** Bins of one score as bars of `width` stops; what lies below the first stop or on the last joins its neighbour. */
  function bars(data, s, width) {
    const steps = data.stops.length - 1;
    const found = [];
    for (let from = 0; from < steps; from += width) {
      const to = Math.min(from + width, steps);
      let count = d3.sum(data.counts[s].slice(from + 1, to + 1));
      if (from === 0) count += data.counts[s][0];
      if (to === steps) count += data.counts[s][steps + 1];
      found.push({ from, x1: data.stops[from], x2: data.stops[to], count });
    }
    return found;
  }

  const barTitle = (data) => (bar) =>
    `${bar.x1.toFixed(data.decimals)} to ${bar.x2.toFixed(data.decimals)}\n` +
    `${whole(bar.count)} pictures (${percent(bar.count / data.rows)})`;

  function ticks(data, width) {
    const levels = data.levels.filter((level) => level >= data.stops[0] && level <= data.stops.at(-1));
    const every = Math.ceil(levels.length / Math.max(2, Math.floor(width / 44)));
    return levels.length > 1 ? levels.filter((_, k) => k % every === 0) : Math.floor(width / 60);
  }

  function xAxis(data, width) {
    return { domain: [data.stops[0], data.stops.at(-1)], ticks: ticks(data, width), label: null };
  }

  const countAxis = (drawn) => (
    { grid: true, ticks: Math.min(4, d3.max(drawn, (bar) => bar.count)), tickFormat: "~s", label: null });

  function statuses(data, width) {
    const rows = data.statuses.map(([status, count]) => ({ status, count }));
    const most = width < 500 ? 17 : 30;
    const label = ({ count }) => `${whole(count)}  (${percent(count / d3.sum(rows, (row) => row.count))})`;
    return Plot.plot({
      ...frame, width, marginTop: 4, marginBottom: 4, marginLeft: marginFor(rows.map((row) => row.status), most), marginRight: 118,
      height: 12 + 30 * rows.length,
      x: { axis: null },
      y: { domain: rows.map((row) => row.status), label: null, tickSize: 0, tickFormat: (name) => short(name, most) },
      marks: [
        Plot.barX(rows, { x: "count", y: "status", insetTop: 2, insetBottom: 2,
          fill: ({ status }) => (status === "ok" ? "var(--accent)" : "var(--warn)") }),
        Plot.text(rows, { x: "count", y: "status", text: label, textAnchor: "start", dx: 7 }),
      ],
    });
  }

  function histogram(data, s, width, mean) {
    const drawn = bars(data, s, Math.max(1, Math.ceil((data.stops.length - 1) / 40)));
    return Plot.plot({
      ...frame, width, height: 190, marginLeft: 38, marginRight: 12,
      x: xAxis(data, width), y: countAxis(drawn),
      marks: [
        Plot.rectY(drawn, { x1: "x1", x2: "x2", y: "count", fill: "var(--accent)", fillOpacity: 0.65, inset: 0.5,
          title: barTitle(data), tip: true }),
        Plot.ruleY([0]),
        Plot.ruleX([mean], { stroke: "var(--ink)", strokeWidth: 1.5 }),
      ],
    });
  }

  function parted(data, s, at, width) {
    const drawn = bars(data, s, 1);
    return Plot.plot({
      ...frame, width, height: 230, marginLeft: 42, marginRight: 14,
      x: xAxis(data, width), y: countAxis(drawn),
      marks: [
        Plot.rectY(drawn, { x1: "x1", x2: "x2", y: "count", insetLeft: 0.4, insetRight: 0.4,
          fill: (bar) => (bar.from >= at ? "var(--accent)" : "var(--dropped)"), title: barTitle(data), tip: true }),
        Plot.ruleY([0]),
        Plot.ruleX([data.stops[at]], { stroke: "var(--ink)", strokeWidth: 2 }),
      ],
    });
  }

  /** `lines`: [{values, dashed}] by stop; null where there is no value. */
  function curve(data, lines, at, width, y) {
    const points = (values) => values.map((value, i) => ({ x: data.stops[i], value })).filter((d) => d.value !== null);
    const format = y.percent ? percent : score;
    return Plot.plot({
      ...frame, width, height: 190, marginLeft: 42, marginRight: 14,
      x: xAxis(data, width), y: { grid: true, ticks: 4, label: null, ...y },
      marks: [
        Plot.ruleX([data.stops[at]], { stroke: "var(--ink)", strokeWidth: 2 }),
        lines.map(({ values, dashed }) => Plot.lineY(points(values), { x: "x", y: "value", strokeWidth: 2,
          stroke: dashed ? "var(--muted)" : "var(--accent)", strokeDasharray: dashed ? "5 4" : null })),
        lines.map(({ values }) => Plot.dot(points(values).filter((d) => d.x === data.stops[at]), { x: "x", y: "value",
          r: 4.5, fill: "var(--ink)" })),
        Plot.tip(points(lines[0].values), Plot.pointerX({ x: "x", y: "value",
          title: (d) => `at least ${d.x.toFixed(data.decimals)}\n${format(d.value)}` })),
      ],
    });
  }

  function correlation(data, width) {
    const { names, spearman } = data.correlation;
    const cells = names.flatMap((a, i) => names.map((b, j) => ({ a, b, value: spearman[i][j], self: i === j })));
    const named = marginFor(names, 30);
    const narrow = (width - named) / names.length < named - 10; // no name would fit over its column
    const most = narrow ? 14 : 30;
    const margin = marginFor(names, most);
    const size = Math.min(width, margin + 110 * names.length);
    const scale = { domain: names, label: null, tickSize: 0, tickFormat: (name) => short(name, most) };
    return Plot.plot({
      ...frame, width: size, height: (narrow ? margin : 30) + names.length * (narrow ? 50 : 62), padding: 0.04,
      marginLeft: margin, marginRight: 8, marginTop: narrow ? margin : 30, marginBottom: 2,
      x: { axis: "top", ...scale, tickRotate: narrow ? -90 : 0 },
      y: scale,
      marks: [
        Plot.cell(cells, { x: "b", y: "a", rx: 4,
          fill: (d) => (d.self ? "var(--line)" : d.value < 0 ? "var(--warn)" : "var(--accent)"),
          // At most a half, so that the ink is readable on it in dark and in light.
          fillOpacity: (d) => (d.self ? 0.6 : 0.06 + 0.44 * Math.abs(d.value ?? 0)) }),
        Plot.text(cells, { x: "b", y: "a", fontSize: 13, fontWeight: 600, fill: "var(--ink)",
          text: (d) => (d.value === null ? "–" : signed(d.value)) }),
      ],
    });
  }

  function uncertainty(data, d, width) {
    const [low, high] = [data.stops[0], data.stops.at(-1)];
    const rise = (high - low) / 2 / data.std_bins;
    const most = d3.max(data.uncertainty[d].cells, (cell) => cell[2]) ?? 1;
    const shade = (count) => 0.12 + 0.88 * (Math.log(count) / Math.log(Math.max(most, 2)));
    const cells = data.uncertainty[d].cells.map(([x, y, count]) => ({
      x1: data.stops[2 * x], x2: data.stops[Math.min(2 * x + 2, data.stops.length - 1)],
      y1: y * rise, y2: (y + 1) * rise, count,
    }));
    const bound = d3.range(0, 101).map((i) => low + (i / 100) * (high - low));
    return Plot.plot({
      ...frame, width, height: 230, marginLeft: 38, marginRight: 12,
      x: xAxis(data, width), y: { domain: [0, (high - low) / 2], ticks: 5, label: null },
      opacity: { type: "identity" },
      marks: [
        Plot.rect(cells, { x1: "x1", x2: "x2", y1: "y1", y2: "y2", inset: 0.3, fill: "var(--accent)",
          fillOpacity: (cell) => shade(cell.count), tip: true,
          title: (c) => `mean ${score(c.x1)} to ${score(c.x2)}\nstd ${score(c.y1)} to ${score(c.y2)}\n${whole(c.count)} pictures` }),
        Plot.line(bound, { x: (m) => m, y: (m) => Math.sqrt((m - low) * (high - m)), stroke: "var(--muted)",
          strokeDasharray: "3 3" }),
        Plot.ruleY([0]),
      ],
    });
  }

  return { statuses, histogram, parted, curve, correlation, uncertainty, whole, percent, score, signed };
})();
