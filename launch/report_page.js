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

  // An area is two lines, the upper one filled down to the lower one.
  function area(line, band) {
    const edge = (y, name) => ({
      x: band.x, y: y, mode: "lines", legendgroup: line.name, showlegend: false, line: { width: 0, color: line.colour },
      name: line.edges ? `${line.name}: ${name}` : line.name, ...(line.edges ? {} : { hoverinfo: "skip" }),
    });
    return [edge(band.low, "lowest"),
            { ...edge(band.high, "highest"), fill: "tonexty", fillcolor: faded(line.colour, 0.18) }];
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
      traces.push({ x: part.x, y: part.y, name: line.name, legendgroup: line.name,
                    mode: line.points ? "lines+markers" : "lines", marker: { size: 6 },
                    line: { width: 2, color: line.colour, dash: line.dash || "solid" } });
    }
    return traces;
  }

  function layoutOf(figure, axis) {
    const y = { title: { text: figure.unit }, hoverformat: figure.digits, gridcolor: "#e6e6e6", zeroline: false };
    if (figure.log) y.type = "log";
    if (figure.limits) y.range = figure.limits;
    return {
      height: 400, margin: { l: 75, r: 20, t: 15, b: 50 }, font: fonts, hovermode: "x unified", uirevision: axis,
      xaxis: { title: { text: words[axis] }, tickformat: "~s", hoverformat: ".4~s", gridcolor: "#e6e6e6",
               zeroline: false },
      yaxis: y, legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, showlegend: true,
    };
  }

  function drawMap(figure) {
    const rows = figure.map.length;
    const traces = [{ type: "heatmap", z: figure.map, zmin: 0, zmax: figure.top, colorscale: "Viridis",
                      colorbar: { title: { text: "1 = fair share" } },
                      hovertemplate: "mixture %{y}, expert %{x}: %{z:.3f} fair shares<extra></extra>" }];
    const layout = { height: Math.min(900, 140 + 24 * rows), margin: { l: 75, r: 20, t: 15, b: 50 }, font: fonts,
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
