// Draws the figures of a report page from the data that stands in it, and draws them anew against another axis.
"use strict";
(function () {
  const page = JSON.parse(document.getElementById("figures").textContent);
  const fonts = { family: "system-ui, sans-serif", size: 13, color: "#333" };
  const words = Object.fromEntries(page.axes);
  const drawing = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

  function faded(colour, share) {
    const part = (i) => parseInt(colour.slice(i, i + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${share})`;
  }

  // The plotting library takes tags in a name for formats.
  function plain(name) {
    return name.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  }

  // An area is two lines, the upper one filled down to the lower one. One that stands alone has a name and values.
  function area(line, band) {
    const edge = (y, which) => ({
      x: band.x, y: y, mode: "lines", name: plain(line.name), legendgroup: line.name, showlegend: false,
      line: { width: 0, color: line.colour },
      ...(line.alone ? { hovertemplate: `%{y}<extra>${plain(line.name)}, ${which}</extra>` } : { hoverinfo: "skip" }),
    });
    return [edge(band.low, "lowest"), { ...edge(band.high, "highest"), showlegend: Boolean(line.alone),
                                        fill: "tonexty", fillcolor: faded(line.colour, line.fill || 0.18) }];
  }

  function tracesOf(figure, axis) {
    const traces = [];
    for (const line of figure.lines) {
      const part = line.parts[axis];
      if (part.band) traces.push(...area(line, part.band));
      if (part.raw) {
        traces.push({ x: part.raw.x, y: part.raw.y, mode: "lines", legendgroup: line.name, showlegend: false,
                      hoverinfo: "skip", line: { width: 0.8, color: faded(line.colour, 0.3) } });
      }
      if (line.alone) continue;
      traces.push({ x: part.x, y: part.y, name: plain(line.name), legendgroup: line.name,
                    mode: line.points ? "lines+markers" : "lines", marker: { size: 6 },
                    line: { width: 2, color: line.colour, dash: line.dash || "solid" } });
    }
    return traces;
  }

  // Names stand below, buttons above: neither covers a curve, however narrow the window is.
  const margin = { l: 75, r: 20, t: 34, b: 50 };
  // A finger that moves over a picture scrolls the page.
  const dragmode = window.matchMedia("(pointer: coarse)").matches ? false : "zoom";

  function layoutOf(figure, axis) {
    const y = { title: { text: figure.unit }, hoverformat: figure.digits, gridcolor: "#e6e6e6", zeroline: false };
    if (figure.log) Object.assign(y, { type: "log", tickformat: "~g" });
    if (figure.limits) y.range = figure.limits;
    const level = { type: "line", xref: "paper", x0: 0, x1: 1, y0: figure.level, y1: figure.level,
                    line: { width: 1, color: "#444", dash: "dash" } };
    return {
      height: 420, margin: margin, font: fonts, dragmode: dragmode, hovermode: "x unified", hoverdistance: -1,
      uirevision: axis, hoverlabel: { namelength: -1 }, shapes: figure.level === null ? [] : [level],
      xaxis: { title: { text: words[axis], standoff: 8 }, automargin: true, tickformat: "~s", hoverformat: ".4~s",
               gridcolor: "#e6e6e6", zeroline: false },
      yaxis: y, showlegend: true,
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", uirevision: "names" },
    };
  }

  function drawMap(figure) {
    const rows = figure.map.length;
    const traces = [{ type: "heatmap", z: figure.map, zmin: 0, zmax: figure.top, colorscale: "Viridis",
                      colorbar: { title: { text: "1 = fair share" } },
                      hovertemplate: "mixture %{y}, expert %{x}: %{z:.3f} fair shares<extra></extra>" }];
    const layout = { height: Math.min(900, 160 + 24 * rows), margin: margin, font: fonts, dragmode: dragmode,
                     xaxis: { title: { text: "expert" } },
                     yaxis: { title: { text: "mixture" }, autorange: "reversed", dtick: Math.ceil(rows / 24) } };
    Plotly.newPlot(figure.id, traces, layout, drawing);
  }

  function draw(axis) {
    for (const figure of page.figures) {
      if (figure.lines) Plotly.react(figure.id, tracesOf(figure, axis), layoutOf(figure, axis), drawing);
    }
    for (const button of document.querySelectorAll("button[data-axis]")) {
      button.setAttribute("aria-pressed", String(button.dataset.axis === axis));
    }
  }

  for (const button of document.querySelectorAll("button[data-axis]")) {
    button.addEventListener("click", () => draw(button.dataset.axis));
  }
  for (const figure of page.figures) if (figure.map) drawMap(figure);
  draw(page.against);
})();
