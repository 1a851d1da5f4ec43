const KINDS = { "fits": "good", "warns": "warn", "does not fit": "bad" };
const HEADINGS = { "fits": "These models fit", "warns": "They fit, with warnings", "does not fit": "They do not fit", "empty": "No models yet", "checking": "Looking at the models" };

const live = h("div", { role: "status", "aria-live": "polite" });
host.append(live);
const told = (one) => typeof one === "string" ? one : [one.message || one.problem || "", one.fix ? ` ${one.fix}` : ""].join("");

follow((value) => {
  if (!value.verdict) return live.replaceChildren();
  const kind = KINDS[value.verdict] || "info";
  const problems = (value.problems || []).map(told).filter((one) => one && one !== value.sentence);
  live.replaceChildren(h("div", { class: `hm-message hm-${kind}` }, mark(kind), h("div", {},
    h("strong", {}, HEADINGS[value.verdict] || String(value.verdict)),
    value.sentence ? h("p", {}, value.sentence) : null,
    problems.length ? h("ul", {}, problems.map((one) => h("li", {}, one))) : null,
    value.licence ? h("p", { class: "hm-note" }, value.licence) : null)));
});
