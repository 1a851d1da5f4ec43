const CAPTION = "Layers: filled when merged; below, how much each changes";

function cell(one, largest) {
  const done = Math.min(1, Math.max(0, one.done || 0));
  const state = done >= 1 ? "merged" : done ? `${Math.round(100 * done)} % merged` : "waiting";
  const change = typeof one.change === "number" ? short(one.change) : null;
  const strength = change && largest ? Math.abs(one.change) / largest : 0.3;
  return h("li", { class: "hm-cell" },
    hidden(`Layer ${one.label}: ${state}${change ? `, change ${change}` : ""}`),
    h("span", { class: "hm-well", "aria-hidden": "true" },
      h("span", { class: "hm-fill", style: `height:${100 * done}%;opacity:${(0.3 + 0.7 * strength).toFixed(2)}` })),
    h("span", { class: "hm-cell-label", "aria-hidden": "true" }, String(one.label)),
    h("span", { class: "hm-cell-change", "aria-hidden": "true" }, change || "\u00a0"));
}

follow((value) => {
  const cells = value.cells || [];
  if (!cells.length) return draw();
  const largest = Math.max(0, ...cells.map((one) => Math.abs(one.change || 0)));
  draw(h("figure", { class: "hm-figure" }, h("figcaption", {}, value.caption || CAPTION),
    h("ol", { class: "hm-strip" }, cells.map((one) => cell(one, largest)))));
});
