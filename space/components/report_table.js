const COLUMNS = ["Model", "Architecture", "Tensors", "What differs", "Type, size", "Vocabulary", "Licence"];
const CAPTION = "What the models' files say, before any weights are read";
/** A name in camel case, which may break between its words. */
const camel = (name) => String(name).split(/(?<=[a-z])(?=[A-Z])/).flatMap((word) => [h("wbr"), word]);
const tag = (text, kind = "") => h("span", { class: `hm-tag ${kind}` }, String(text));

function tensors(row) {
  if (row.tensors === null || row.tensors === undefined) return "–";
  if (row.matching === null || row.matching === undefined) return grouped(count(row.tensors));
  const [all, fit] = [count(row.tensors), count(row.matching)];
  return [mark(all === fit ? "good" : "warn"), all === fit ? ` all ${grouped(all)} match` : ` ${grouped(fit)} of ${grouped(all)} match`];
}

function differences(row) {
  const words = { missing: "missing", extra: "extra", differing: "of another shape" };
  const found = Object.keys(words).filter((key) => count(row[key])).map((key) => `${grouped(count(row[key]))} ${words[key]}`);
  return [found.join(", ") || "nothing", row.example ? h("div", { class: "hm-note" }, String(row.example)) : null];
}

function vocabulary(row) {
  const chat = row.chat_template;
  const told = chat === true ? "chat template" : typeof chat === "string" && chat.length < 60 ? chat : chat ? "chat template" : null;
  const found = row.vocabulary;
  const words = typeof found === "number" ? `${grouped(found)} tokens` : found || "–";
  return [String(words), told ? h("div", { class: "hm-note" }, told) : null];
}

function line(row) {
  const traits = [["quantised", "quantised"], ["gated", "gated"], ["custom_code", "custom code"]];
  const name = h("th", { scope: "row", role: "rowheader" }, h("span", { class: "hm-name" }, String(row.name || "")), h("div", { class: "hm-tags" },
    row.role ? tag(row.role) : null,
    traits.filter(([key]) => row[key]).map(([, word]) => tag(word, "hm-tag-warn")),
    row.revision ? tag(String(row.revision).slice(0, 8)) : null));
  if (row.error) return h("tr", { role: "row" }, name, h("td", { role: "cell", colspan: COLUMNS.length - 1 }, mark("bad"), " ", String(row.error)));
  const weights = [String(row.dtype || "–"), h("div", { class: "hm-note" }, row.size ? size(row.size) : "")];
  const cells = [row.architecture ? camel(row.architecture) : "–", tensors(row), differences(row), weights, vocabulary(row), String(row.licence || "not stated")];
  return h("tr", { role: "row" }, name, cells.map((cell, i) => h("td", { role: "cell", "data-label": COLUMNS[i + 1] }, h("div", {}, cell))));
}

follow((value) => {
  const rows = value.rows || [];
  if (!rows.length) return draw();
  // On a phone each row is a card; the roles say that it is a table all the same.
  draw(scroller(CAPTION, h("table", { class: "hm-table hm-cards-on-phone", role: "table" },
    h("caption", {}, CAPTION),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, COLUMNS.map((one) => h("th", { scope: "col", role: "columnheader" }, one)))),
    h("tbody", { role: "rowgroup" }, rows.map(line)))));
});
