// Text is black or white, whichever has more contrast; with these ends that is 4.5 at least everywhere between.
const PALE = [240, 243, 241], FULL = [12, 94, 86], OTHER = [150, 62, 22];

const mixed = (end, share) => PALE.map((one, i) => Math.round(one + Math.min(1, Math.max(0, share)) * (end[i] - one)));

function luminance(colour) {
  const [r, g, b] = colour.map((one) => one / 255).map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function cell(value, low, high, digits) {
  if (typeof value !== "number" || !isFinite(value)) return h("td", { class: "hm-none" }, "–");
  const share = low < 0 && high > 0 ? Math.abs(value) / Math.max(-low, high) : high > low ? (value - low) / (high - low) : 0;
  const ground = mixed(low < 0 && value < 0 ? OTHER : FULL, share);
  const ink = 1.05 / (luminance(ground) + 0.05) >= (luminance(ground) + 0.05) / 0.0565 ? "#fff" : "#11161c";
  const shown = value === 0 || Math.abs(value) >= 0.5 * 10 ** -digits ? value.toFixed(digits) : value.toExponential(0);
  return h("td", { style: `background:rgb(${ground.join()});color:${ink}` }, shown);
}

follow((value) => {
  const { rows = [], columns = [], values = [], caption = "", digits = 2 } = value;
  if (!rows.length || !columns.length) return draw();
  const known = values.flat().filter((one) => typeof one === "number" && isFinite(one));
  const low = value.low ?? Math.min(...known), high = value.high ?? Math.max(...known);
  draw(h("figure", { class: "hm-figure" },
    scroller(caption || "Table", h("table", { class: "hm-heat" }, h("caption", {}, caption),
      h("thead", {}, h("tr", {}, h(value.corner ? "th" : "td", value.corner ? { scope: "col" } : {}, value.corner || ""),
        columns.map((one) => h("th", { scope: "col" }, String(one))))),
      h("tbody", {}, rows.map((label, i) => h("tr", {}, h("th", { scope: "row" }, String(label)),
        columns.map((_, j) => cell((values[i] || [])[j], low, high, digits))))))),
    value.reading ? h("figcaption", {}, value.reading) : null));
});
