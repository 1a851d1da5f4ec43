const live = h("div", { role: "status", "aria-live": "polite" });
host.append(live);

const scores = (listed, name) => h("ul", { class: "hm-scores" }, listed.slice(0, 5).map((one) => h("li", {},
  h("span", {}, String(one[name])), h("meter", { min: "0", max: "1", value: one.score, "aria-label": String(one[name]) }),
  h("span", { class: "hm-number" }, `${(100 * one.score).toFixed(1)} %`))));

/** How alike a model finds the texts: one row for each, in their order. */
function cosines(outputs) {
  const numbered = (i) => h("th", { scope: "col" }, String(i + 1));
  return scroller("Cosines of the texts", h("table", { class: "hm-table" }, h("caption", {}, "Cosines of the texts"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "text"), outputs.map((_, i) => numbered(i)))),
    h("tbody", {}, outputs.map((one, i) => h("tr", {}, h("th", { scope: "row" }, String(i + 1)),
      one.similarity.map((value) => h("td", {}, value.toFixed(2))))))));
}

/** What a model answered to one input: a text, labels or tokens with scores, or anything else as it is. */
function answer(output) {
  if (output && typeof output.text === "string") return h("p", { class: "hm-answer" }, output.text || "(nothing)");
  if (output && Array.isArray(output.labels)) return scores(output.labels, "label");
  if (output && Array.isArray(output.tokens)) return scores(output.tokens, "token");
  return h("pre", { class: "hm-answer", tabindex: "0" }, JSON.stringify(output, null, 1).slice(0, 2000));
}

function answers(outputs) {
  return outputs.length && outputs.every((one) => one && Array.isArray(one.similarity)) ? cosines(outputs) : outputs.map(answer);
}

function column(one) {
  return h("article", { class: "hm-trial" }, h("h4", {}, String(one.label)),
    one.error ? h("p", {}, mark("bad"), " ", String(one.error)) : answers(one.outputs || []),
    one.seconds ? h("p", { class: "hm-note" }, one.seconds < 10 ? `${one.seconds.toFixed(1)} s` : duration(one.seconds)) : null);
}

follow((value) => {
  const listed = value.trials || [];
  live.replaceChildren(...[
    value.error ? h("div", { class: "hm-message hm-bad" }, mark("bad"), h("p", {}, String(value.error))) : null,
    listed.length ? h("div", { class: "hm-trials" }, listed.map(column)) : null,
  ].filter(Boolean));
});
