// A curve over depth: anchors that are dragged, or moved by keys, over a line; the value of each layer on hover and in a table.

/** The value of a curve at a depth from 0 to 1, as hf_merge reads it: linear between anchors. */
function at(points, depth) {
  const place = depth * (points.length - 1), low = Math.floor(place), high = Math.min(low + 1, points.length - 1);
  return points[low] + (place - low) * (points[high] - points[low]);
}

/** The same curve, as near as may be, with another number of anchors. */
const resampled = (points, count) => Array.from({ length: count }, (_, i) => Number(at(points, i / (count - 1)).toPrecision(4)));

const SHAPES = {
  "Flat": () => 1, "Ramp up": (depth) => depth, "Ramp down": (depth) => 1 - depth,
  "Valley": (depth) => Math.abs(2 * depth - 1), "Bell": (depth) => 1 - Math.abs(2 * depth - 1),
};

/** Names of the layers, and where each lies; ten places where the number of layers is not known. */
function depths(layers) {
  const count = layers > 1 ? layers : 11;
  return Array.from({ length: count }, (_, i) => ({ depth: i / (count - 1), name: layers > 1 ? `layer ${i}` : `${Math.round(100 * i / (count - 1))} % of the depth` }));
}

/**
 * Make an editor of a curve.
 * @param {number[]} points - its anchors.
 * @param {{low, high, least, most, step, top, layers, name, key}} about - the ends of the scale, limits, and words.
 * @param {(points: number[]) => void} changed - is called with the anchors.
 */
function curveEditor(points, about, changed) {
  points = [...points];
  const places = depths(about.layers);
  const low = Math.min(about.low, ...points), high = Math.max(about.high, ...points);
  const up = (value) => high > low ? (value - low) / (high - low) : 0.5;
  const clamped = (value) => Math.min(about.most ?? high, Math.max(about.least ?? low, value));
  const rounded = (value) => Number((Math.round(value / about.step) * about.step).toFixed(6));
  const plot = h("div", { class: "hm-plot" }), readout = h("output", { class: "hm-readout" });
  const line = h("polyline", { class: "hm-line", "vector-effect": "non-scaling-stroke" });
  const guide = h("line", { class: "hm-guide", y1: 0, y2: 100, "vector-effect": "non-scaling-stroke" });
  const cells = h("tbody", {}), box = h("div", { class: "hm-curve", role: "group", "aria-label": `Curve of ${about.name} over the layers` });
  let anchors = [];

  const nameAt = (i) => {
    const depth = i / (points.length - 1);
    return i === 0 ? "first layer" : i === points.length - 1 ? "last layer"
      : about.layers > 1 ? `near layer ${Math.round(depth * (about.layers - 1))}` : `${Math.round(100 * depth)} % of the depth`;
  };

  function tell(text) { readout.textContent = text; }

  function paint() {
    line.setAttribute("points", points.map((value, i) => `${(100 * i / (points.length - 1)).toFixed(2)},${(100 - 100 * up(value)).toFixed(2)}`).join(" "));
    anchors.forEach((anchor, i) => {
      anchor.style.left = `${100 * i / (points.length - 1)}%`;
      anchor.style.top = `${100 - 100 * up(points[i])}%`;
      anchor.setAttribute("aria-valuenow", points[i]);
      anchor.setAttribute("aria-valuetext", `${short(points[i])} at ${nameAt(i)}`);
    });
    cells.replaceChildren(...places.map(({ depth, name }) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, short(at(points, depth))))));
  }

  function set(i, value) {
    const wanted = clamped(rounded(value));
    if (wanted === points[i]) return;
    points[i] = wanted;
    paint();
    tell(`${nameAt(i)}: ${short(wanted)}`);
    changed([...points]);
  }

  function key(event, i) {
    const large = Math.max(about.step, (high - low) / 10);
    const moves = { ArrowUp: about.step, ArrowRight: about.step, ArrowDown: -about.step, ArrowLeft: -about.step, PageUp: large, PageDown: -large };
    if (event.key in moves) set(i, points[i] + moves[event.key]);
    else if (event.key === "Home") set(i, low);
    else if (event.key === "End") set(i, high);
    else return;
    event.preventDefault();
  }

  function drag(event, i) {
    const anchor = anchors[i];
    event.preventDefault();
    anchor.focus({ preventScroll: true });
    anchor.setPointerCapture(event.pointerId);
    const follow = (now) => {
      const frame = plot.getBoundingClientRect();
      set(i, Math.min(high, Math.max(low, low + (1 - (now.clientY - frame.top) / frame.height) * (high - low))));
    };
    anchor.addEventListener("pointermove", follow);
    for (const end of ["pointerup", "pointercancel"]) anchor.addEventListener(end, () => anchor.removeEventListener("pointermove", follow), { once: true });
  }

  function fill() {
    anchors = points.map((_, i) => h("span", {
      class: "hm-anchor", role: "slider", tabindex: "0", "aria-orientation": "vertical", "aria-valuemin": low, "aria-valuemax": high,
      "aria-label": `${about.name}, ${nameAt(i)}`, "data-key": `${about.key}-anchor-${i}`,
      onkeydown: (event) => key(event, i), onpointerdown: (event) => drag(event, i), onfocus: () => tell(`${nameAt(i)}: ${short(points[i])}`),
    }));
    plot.replaceChildren(
      h("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" },
        [0, 50, 100].map((y) => h("line", { class: "hm-grid", x1: 0, x2: 100, y1: y, y2: y, "vector-effect": "non-scaling-stroke" })), guide, line),
      ...anchors);
    fewer.disabled = points.length <= 2;
    further.disabled = points.length >= 9;
    paint();
  }

  function replace(made, told) {
    points = made;
    fill();
    tell(told);
    changed([...points]);
  }

  const shape = (name) => {
    const top = about.top, count = name === "Flat" || name.startsWith("Ramp") ? 2 : Math.max(3, points.length | 1);
    const level = name === "Flat" ? rounded(points.reduce((sum, one) => sum + one, 0) / points.length) : null;
    return Array.from({ length: count }, (_, i) => level ?? clamped(rounded(about.low + SHAPES[name](i / (count - 1)) * (top - about.low))));
  };
  const button = (text, name, act) => h("button", { type: "button", class: "hm-button hm-small", "aria-label": name, onclick: act }, text);
  const fewer = button("− point", `One point less on the curve of ${about.name}`, () => replace(resampled(points, points.length - 1), `${points.length - 1} points`));
  const further = button("+ point", `One point more on the curve of ${about.name}`, () => replace(resampled(points, points.length + 1), `${points.length + 1} points`));
  plot.addEventListener("pointermove", (event) => {
    const frame = plot.getBoundingClientRect();
    const place = places[Math.round(Math.min(1, Math.max(0, (event.clientX - frame.left) / frame.width)) * (places.length - 1))];
    guide.setAttribute("x1", 100 * place.depth);
    guide.setAttribute("x2", 100 * place.depth);
    guide.style.opacity = 1;
    tell(`${place.name}: ${short(at(points, place.depth))}`);
  });
  plot.addEventListener("pointerleave", () => { guide.style.opacity = 0; });
  box.append(
    h("div", { class: "hm-presets", role: "group", "aria-label": "Shapes" },
      Object.keys(SHAPES).map((name) => button(name, `${name}: shape of the curve of ${about.name}`, () => replace(shape(name), name))), fewer, further),
    h("div", { class: "hm-frame" }, h("span", { class: "hm-axis hm-axis-high", "aria-hidden": "true" }, short(high)), h("span", { class: "hm-axis hm-axis-low", "aria-hidden": "true" }, short(low)), plot),
    h("div", { class: "hm-under" }, h("span", {}, about.layers > 1 ? "layer 0" : "first layer"), readout, h("span", {}, about.layers > 1 ? `layer ${about.layers - 1}` : "last layer")),
    h("details", { "data-key": `${about.key}-table` }, h("summary", {}, "Value in each layer"),
      h("div", { class: "hm-scroll hm-low", tabindex: "0", role: "region", "aria-label": `${about.name} in each layer` },
        h("table", { class: "hm-table" }, h("caption", { class: "hm-hidden" }, `${about.name} in each layer`),
          h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Layer"), h("th", { scope: "col" }, "Value"))), cells))));
  fill();
  return box;
}
