const status = h("p", { class: "hm-hidden", role: "status", "aria-live": "polite" });
const body = h("div", {});
const KINDS = { adapter: "adapter", folder: "folder" };
const mine = edited(render, ["models", "proposed_base"]);
const taken = {};  // by id: models that left the list when they became the base
host.append(body, status);

/** Tell the server, and those who listen. */
function change(changes, told) {
  mine.change({ ...mine.value, ...changes });
  render();
  status.textContent = told;
}

function move(from, to, key) {
  const models = [...mine.value.models];
  models.splice(to, 0, ...models.splice(from, 1));
  change({ models }, `${models[to].label} is now number ${to + 1} of ${models.length}`);
  const wanted = body.querySelector(`[data-key="${CSS.escape(key)}"]`);
  const other = wanted && wanted.disabled ? wanted.parentNode.querySelector("button:not([disabled])") : wanted;
  if (other) other.focus({ preventScroll: true });
}

function remove(place) {
  const models = mine.value.models.filter((_, i) => i !== place);
  const { id, label } = mine.value.models[place];
  change({ models, base: mine.value.base === id ? null : mine.value.base }, `${label} is removed; ${models.length} left`);
  const next = body.querySelectorAll(".hm-remove")[Math.min(place, models.length - 1)];
  if (next) next.focus({ preventScroll: true });
}

/** Take a base, or none: a model that becomes the base leaves the list, and comes back to it when it is the base no more. */
function base(id) {
  const before = mine.value.base, chosen = mine.value.models.find((one) => one.id === id);
  const models = mine.value.models.filter((one) => one.id !== id);
  if (before && taken[before] && !models.some((one) => one.id === before)) models.push(taken[before]);
  if (chosen) taken[id] = chosen;
  change({ models, base: id }, id ? `${chosen ? chosen.label : id} is the base now` : "There is no base now");
}

/** Drag a row by its handle, with a mouse, a pen or a finger; it drops where it is let go. */
function drag(event, place) {
  const rows = [...body.querySelectorAll(".hm-model-row")], row = rows[place], handle = event.currentTarget;
  event.preventDefault();
  handle.setPointerCapture(event.pointerId);
  row.classList.add("hm-dragged");
  const start = event.clientY;
  let to = place;
  const tops = rows.map((one) => { const box = one.getBoundingClientRect(); return box.top + box.height / 2; });
  const follow = (at) => {
    row.style.transform = `translateY(${at.clientY - start}px)`;
    to = tops.filter((top, i) => i !== place && top < at.clientY).length;
    rows.forEach((one, i) => one.classList.toggle("hm-target", i === to && to !== place));
  };
  const end = (last) => {
    handle.removeEventListener("pointermove", follow);
    row.classList.remove("hm-dragged");
    row.style.transform = "";
    rows.forEach((one) => one.classList.remove("hm-target"));
    if (last.type === "pointerup" && to !== place) move(place, to, `up-${mine.value.models[place].id}`);
  };
  handle.addEventListener("pointermove", follow);
  handle.addEventListener("pointerup", end, { once: true });
  handle.addEventListener("pointercancel", end, { once: true });
}

function order(one, place, last) {
  return [
    h("span", { class: "hm-handle", "aria-hidden": "true", title: "Drag to another place", onpointerdown: (event) => drag(event, place) }, "⠿"),
    h("span", { class: "hm-place" }, hidden("Place "), String(place + 1)),
    h("span", { class: "hm-arrows" },
      h("button", { type: "button", class: "hm-icon", "data-key": `up-${one.id}`, disabled: place === 0, "aria-label": `Move ${one.label} up`,
        onclick: () => move(place, place - 1, `up-${one.id}`) }, "↑"),
      h("button", { type: "button", class: "hm-icon", "data-key": `down-${one.id}`, disabled: place === last, "aria-label": `Move ${one.label} down`,
        onclick: () => move(place, place + 1, `down-${one.id}`) }, "↓")),
  ];
}

function details(one) {
  return h("div", { class: "hm-model-text" },
    h("div", { class: "hm-model-name" }, h("span", { class: "hm-name" }, one.label),
      KINDS[one.kind] ? h("span", { class: "hm-tag" }, KINDS[one.kind]) : null,
      one.id === mine.value.base ? h("span", { class: "hm-tag hm-tag-accent" }, "base") : null),
    one.id !== one.label ? h("div", { class: "hm-note hm-id" }, one.id) : null,
    one.note ? h("div", { class: "hm-note" }, one.note) : null,
    one.problem ? h("div", { class: "hm-problem" }, mark("bad"), " ", one.problem) : null);
}

function row(one, place, models) {
  const isBase = one.id === mine.value.base;
  return h("li", { class: `hm-model-row ${isBase ? "hm-is-base" : ""}` },
    mine.value.ordered ? order(one, place, models.length - 1) : null, details(one),
    h("div", { class: "hm-actions" },
      h("button", { type: "button", class: "hm-button", "data-key": `base-${one.id}`, "aria-pressed": String(isBase),
        "aria-label": isBase ? `${one.label} is the base: choose none` : `Use ${one.label} as the base`,
        onclick: () => base(isBase ? null : one.id) },
        isBase ? "Is the base" : "Make base"),
      h("button", { type: "button", class: "hm-icon hm-remove", "data-key": `remove-${one.id}`, "aria-label": `Remove ${one.label}`,
        onclick: () => remove(place) }, "✕")));
}

/** A base that is none of the models. */
function apart(id) {
  const label = taken[id] ? taken[id].label : id.split("/").pop();
  return h("div", { class: "hm-model-row hm-is-base" },
    h("div", { class: "hm-model-text" },
      h("div", { class: "hm-model-name" }, h("span", { class: "hm-name" }, label), h("span", { class: "hm-tag hm-tag-accent" }, "base")),
      id !== label ? h("div", { class: "hm-note hm-id" }, id) : null,
      h("div", { class: "hm-note" }, "What the models were made from: their changes are counted from it.")),
    h("div", { class: "hm-actions" },
      h("button", { type: "button", class: "hm-icon", "data-key": "remove-base", "aria-label": `Do without the base ${label}`,
        onclick: () => base(null) }, "✕")));
}

function proposal(id) {
  return h("div", { class: "hm-message hm-info" }, mark("info"), h("div", {},
    h("p", {}, "The models name ", h("strong", {}, id), " as the model they were made from."),
    h("button", { type: "button", class: "hm-button", "data-key": "propose", onclick: () => base(id) }, "Use it as the base")));
}

function render() {
  const { models = [], base: chosen, proposed_base: proposed, ordered } = mine.value;
  const active = body.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const known = models.some((one) => one.id === chosen);
  body.replaceChildren(...[
    chosen && !known ? apart(chosen) : null,
    models.length ? h("ol", { class: "hm-models", "aria-label": ordered ? "Models, in their order" : "Models" }, models.map(row))
      : h("p", { class: "hm-empty" }, "No models yet. Add two or more above."),
    proposed && proposed !== chosen ? proposal(proposed) : null,
    models.length && !chosen && !proposed ? h("p", { class: "hm-note" }, "Many methods need a base: the model that the others were made from.") : null,
  ].filter(Boolean));
  const wanted = active && body.querySelector(`[data-key="${CSS.escape(active)}"]`);
  if (wanted && !wanted.disabled) wanted.focus({ preventScroll: true });
}

render();
