const words = h("input", { type: "search", id: `${uid}-filter`, class: "hm-input", placeholder: "for example: sign, adapters, slerp", oninput: () => render() });
const found = h("p", { class: "hm-note", role: "status", "aria-live": "polite" });
const cards = h("div", {});
host.append(
  h("div", { class: "hm-filter" }, h("label", { for: `${uid}-filter` }, "Find a method"), words), found,
  h("fieldset", { class: "hm-fieldset" }, h("legend", { class: "hm-hidden" }, "Merge method"), cards));
const mine = edited(render, ["methods"]);
let more = false;

function choose(name) {
  mine.change({ ...mine.value, chosen: name });
  for (const one of cards.querySelectorAll(".hm-method")) one.classList.toggle("hm-chosen", one.dataset.name === name);
}

function card(one, i) {
  const id = `${uid}-${i}`, chosen = one.name === mine.value.chosen;
  const needs = (one.needs || []).length ? `Needs ${one.needs.join("; ")}.` : "";
  return h("div", { class: `hm-method ${chosen ? "hm-chosen" : ""} ${one.works === false ? "hm-off" : ""}`, "data-name": one.name },
    h("input", { type: "radio", name: `${uid}-method`, id, value: one.name, checked: chosen, disabled: one.works === false && !chosen,
      "data-key": one.name, "aria-describedby": `${id}-text`, onchange: () => choose(one.name) }),
    h("label", { for: id }, h("span", { class: "hm-name" }, one.name), one.recommended ? h("span", { class: "hm-tag hm-tag-accent" }, "recommended") : null),
    h("div", { class: "hm-method-text", id: `${id}-text` },
      h("p", {}, one.summary), one.good_for ? h("p", { class: "hm-note" }, h("strong", {}, "Good for: "), one.good_for) : null,
      needs && one.works !== false ? h("p", { class: "hm-note" }, needs) : null,
      one.works === false ? h("p", { class: "hm-problem" }, mark("warn"), " ", one.why_not || "It does not work with these models.") : null));
}

const fits = (one, asked) => asked.every((word) => [one.name, one.summary, one.good_for, one.group, ...(one.needs || [])].join(" ").toLowerCase().includes(word));
const grid = (listed) => h("div", { class: "hm-methods" }, listed.map(([one, i]) => card(one, i)));

/** The methods under the heading of their group; those that work come first. */
function byGroup(listed) {
  const groups = [...new Set(listed.map(([one]) => one.group || "Others"))];
  return groups.map((group) => [h("h4", { class: "hm-group" }, group),
    grid(listed.filter(([one]) => (one.group || "Others") === group).sort(([a], [b]) => (b.works !== false) - (a.works !== false)))]);
}

function render() {
  const active = host.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const methods = (mine.value.methods || []).map((one, i) => [one, i]);
  const asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  if (asked.length) {
    const hits = methods.filter(([one]) => fits(one, asked));
    found.textContent = hits.length ? `${hits.length} of ${methods.length} methods` : `None of ${methods.length} methods has these words.`;
    cards.replaceChildren(...byGroup(hits).flat());
  } else {
    found.textContent = "";
    const common = props.common || [];
    const rank = (one) => one.recommended ? -2 : common.includes(one.name) ? common.indexOf(one.name) : common.length;
    const first = methods.filter(([one]) => one.recommended || one.name === mine.value.chosen || (common.includes(one.name) && one.works !== false))
      .sort(([a], [b]) => rank(a) - rank(b));
    const rest = methods.filter((one) => !first.includes(one));
    cards.replaceChildren(grid(first), ...(rest.length ? [h("details", { class: "hm-more", open: more, ontoggle: (event) => { more = event.target.open; } },
      h("summary", { "data-key": "more" }, `All methods (${rest.length} more)`), ...byGroup(rest).flat())] : []));
  }
  const wanted = active && [...host.querySelectorAll("[data-key]")].find((one) => one.dataset.key === active);
  if (wanted) wanted.focus({ preventScroll: true });
}

render();
