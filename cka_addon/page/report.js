// Values on hover and the line charts. All numbers are in the element "data"; nothing is fetched.
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2"];

function shown(value) {
  return value === null ? "not computed" : value.toFixed(4);
}

// What is said of the pair of layers (i, j).
function describe(i, j) {
  let text = `${data.labels[j]}\n${data.labels[i]}\n${data.measure} ${shown(data.values[i][j])}`;
  if (data.lower) {
    text += `\n${data.confidence} interval ${shown(data.lower[i][j])} to ${shown(data.upper[i][j])}`;
  }
  if (data.permuted) {
    text += `\npermuted ${shown(data.permuted[i][j])}`;
  }
  return text;
}

document.addEventListener("mousemove", (event) => {
  const cell = event.target.closest && event.target.closest("[data-i],[data-t]");
  if (!cell) {
    tip.style.display = "none";
    return;
  }
  tip.textContent = cell.dataset.t !== undefined ? cell.dataset.t : describe(+cell.dataset.i, +cell.dataset.j);
  tip.style.display = "block";
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
});

function add(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const key in attributes) {
    element.setAttribute(key, attributes[key]);
  }
  if (text !== undefined) {
    element.textContent = text;
  }
  parent.appendChild(element);
  return element;
}

// Draw lines over layers. series : [{name, points: [[i, j], ...]}], one line per model.
function drawLines(id, series) {
  const svg = document.getElementById(id);
  const width = 760, height = 320, left = 46, bottom = 40, legend = 170;
  const count = Math.max(...series.map((s) => s.points.length), 2);
  const x = (k) => left + (k * (width - left - legend)) / (count - 1);
  const y = (value) => height - bottom - Math.max(-0.05, Math.min(1.05, value)) * (height - bottom - 14);
  const line = (points, values) => points.map(([i, j], k) => `${x(k)},${y(values[i][j])}`);

  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const value of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
    add(svg, "line", { x1: left, x2: x(count - 1), y1: y(value), y2: y(value), stroke: "#ddd" });
    add(svg, "text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(1));
  }
  for (let k = 0; k < count; k += Math.ceil(count / 20)) {
    add(svg, "text", { x: x(k), y: height - bottom + 18, "text-anchor": "middle" }, k);
  }
  add(svg, "text", { x: (left + x(count - 1)) / 2, y: height - 6, "text-anchor": "middle", class: "axis" }, "layer");

  series.forEach(({ name, points }, m) => {
    const colour = COLOURS[m % COLOURS.length];
    if (data.lower) {
      const band = line(points, data.upper).concat(line(points, data.lower).reverse());
      add(svg, "polygon", { points: band.join(" "), fill: colour, opacity: 0.18 });
    }
    add(svg, "polyline", {
      points: line(points, data.values).join(" "), fill: "none", stroke: colour, "stroke-width": 2,
    });
    points.forEach(([i, j], k) => {
      add(svg, "circle", { cx: x(k), cy: y(data.values[i][j]), r: 4, fill: colour, "data-i": i, "data-j": j });
    });
    add(svg, "rect", { x: width - 158, y: 16 + m * 20, width: 12, height: 12, fill: colour });
    add(svg, "text", { x: width - 140, y: 26 + m * 20 }, name);
  });
}

// One line per model over the pairs that `pair(k, model)` names, where they were computed.
function seriesOf(pair) {
  return data.models
    .map((model) => {
      const points = [];
      for (let k = model.start; k < model.stop; k++) {
        const found = pair(k, model);
        if (found && data.values[found[0]][found[1]] !== null) {
          points.push(found);
        }
      }
      return { name: model.name, points };
    })
    .filter((s) => s.points.length);
}

const pick = document.getElementById("pick");
function drawTo(target) {
  drawLines("to", seriesOf((k) => [k, target]));
}
data.labels.forEach((label, k) => pick.add(new Option(label, k)));
pick.value = data.labels.length - 1;
pick.onchange = () => drawTo(+pick.value);
drawTo(data.labels.length - 1);
drawLines("next", seriesOf((k, model) => (k + 1 < model.stop ? [k, k + 1] : null)));
