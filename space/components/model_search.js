const status = h("p", { class: "hm-hidden", role: "status", "aria-live": "polite" });
const list = h("ul", { class: "hm-proposals", id: `${uid}-list`, role: "listbox", "aria-label": "Models on the Hub", hidden: true });
const input = h("input", {
  class: "hm-input", id: `${uid}-input`, type: "text", role: "combobox", autocomplete: "off", spellcheck: "false", autocapitalize: "off",
  "aria-autocomplete": "list", "aria-controls": `${uid}-list`, "aria-expanded": "false", "aria-describedby": `${uid}-info`,
  oninput: typed, onkeydown: pressed, onfocus: show, onblur: close,
});
const label = h("label", { for: `${uid}-input`, class: "hm-name" });
const info = h("p", { class: "hm-note", id: `${uid}-info` });
let active = null;  // the proposal that the arrow keys are at
let timer = null;
host.append(label, info, h("div", { class: "hm-search" }, input, list,
  h("button", { type: "button", class: "hm-button", onclick: () => add(input.value) }, "Add")), status);

/** The proposals that have all words that are typed: those that the server found last, until it has found others. */
function proposals() {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  return words.length ? (given().found || []).filter((id) => words.every((word) => id.toLowerCase().includes(word))) : [];
}

function show() {
  const found = document.activeElement === input ? proposals() : [];
  if (!found.includes(active)) active = null;
  list.replaceChildren(...found.map((id, i) => h("li", {
    id: `${uid}-${i}`, role: "option", "aria-selected": String(id === active),
    onpointerdown: (event) => event.preventDefault(),  // the field keeps the focus
    onclick: () => add(id),
  }, id)));
  list.hidden = !found.length;
  input.setAttribute("aria-expanded", String(!list.hidden));
  if (active === null) input.removeAttribute("aria-activedescendant");
  else input.setAttribute("aria-activedescendant", `${uid}-${found.indexOf(active)}`);
  const chosen = list.querySelector("[aria-selected=true]");
  if (chosen) chosen.scrollIntoView({ block: "nearest" });
  const told = found.length ? `${found.length} proposals` : "";
  if (status.textContent !== told) status.textContent = told;
}

function close() {
  list.hidden = true;
  active = null;
  input.setAttribute("aria-expanded", "false");
  input.removeAttribute("aria-activedescendant");
}

function typed() {
  show();
  clearTimeout(timer);
  timer = setTimeout(() => {
    props.value = { ...given(), query: input.value, wanted: null };
    trigger("input");
  }, 150);
}

function pressed(event) {
  if (event.isComposing) return;
  const found = list.hidden ? [] : proposals();
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (list.hidden) return show();
    const places = [null, ...found], step = event.key === "ArrowDown" ? 1 : places.length - 1;
    active = places[(places.indexOf(active) + step) % places.length];
    show();
  } else if (event.key === "Enter") {
    event.preventDefault();
    add(active || input.value);
  } else if (event.key === "Escape" && !list.hidden) {
    event.preventDefault();
    close();
  }
}

function add(wanted) {
  if (!wanted.trim()) return input.focus();
  clearTimeout(timer);
  input.value = wanted;
  close();
  props.value = { ...given(), wanted };
  trigger("submit");
}

const taken = new Set([undefined]);
follow((value) => {
  label.textContent = value.label;
  info.textContent = value.info;
  if (!taken.has(value.taken)) {  // an answer that is late may bring an earlier one again
    taken.add(value.taken);
    if (input.value === value.wanted) input.value = "";
    status.textContent = `${value.wanted} is added`;
  }
  if (document.activeElement === input && !value.wanted) show();
});
