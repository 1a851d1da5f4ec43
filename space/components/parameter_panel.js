const PARTS = { attention: "Attention", mlp: "MLP", rest: "All else" };
const sentence = h("p", { class: "hm-sentence", role: "status", "aria-live": "polite" });
const body = h("div", { class: "hm-controls" });
host.append(sentence, body);
const mine = edited(arrive, ["sentence"]);
const together = {};  // by parameter: whether the values of all models move together
let updates = {};     // by parameter: what follows a change of any of its values
let drawn = null;     // what the widgets show

const isCurve = (setting) => setting !== null && typeof setting === "object" && "curve" in setting;
const isParts = (setting) => setting !== null && typeof setting === "object" && "parts" in setting;
const kindOf = (setting) => isCurve(setting) ? "curve" : isParts(setting) ? "parts" : "plain";
const clamp = (control, value) => Math.min(control.most ?? Infinity, Math.max(control.least ?? -Infinity, value));
const tidy = (value) => Number(value.toPrecision(6));

/** One value for a setting that varies: the mean of its anchors, or what holds for the rest. */
function flat(setting, control) {
  if (isCurve(setting)) return tidy(setting.curve.reduce((sum, one) => sum + one, 0) / setting.curve.length);
  if (isParts(setting)) return flat(setting.parts.rest, control);
  return setting ?? control.default;
}

const asCurve = (setting, control) => isCurve(setting) ? setting : { curve: Array(3).fill(flat(setting, control) ?? 0) };
const asParts = (setting) => ({ parts: { attention: copy(setting), mlp: copy(setting), rest: copy(setting) } });

/** The settings of a parameter: one, or one for each model. */
function settingsOf(control) {
  const found = mine.value.values[control.name];
  if (!control.per_model) return [found === undefined ? control.default : found];
  const listed = Array.isArray(found) ? found : (mine.value.models || []).map(() => found === undefined ? control.default : found);
  return (mine.value.models || []).map((_, i) => listed[i] === undefined ? control.default : listed[i]);
}

function store(control, settings) {
  const values = { ...mine.value.values, [control.name]: control.per_model ? settings : settings[0] };
  mine.change({ ...mine.value, values });
  drawn = picture();
  for (const update of updates[control.name] || []) update(settings);
  for (const update of updates["*"] || []) update();
}

function put(control, place, path, made) {
  const settings = copy(settingsOf(control));
  if (path) settings[place].parts[path] = made; else settings[place] = made;
  if (control.per_model && together[control.name] && !path && typeof made === "number") {
    const before = flat(settingsOf(control)[place], control);
    settings.forEach((one, i) => { if (i !== place && kindOf(one) === "plain") settings[i] = tidy(clamp(control, one + made - before)); });
  }
  store(control, settings);
}

const named = (control, words, model) => words.replaceAll("{base}", mine.value.base || "the base").replaceAll("{model}", model || otherModel());
const otherModel = () => (mine.value.models || []).length === 1 ? mine.value.models[0] : "the models";
const spaced = (name) => name.replaceAll("_", " ");

/** A slider with a field for the exact number beside it, what its ends mean, and a way back. */
function slider(control, place, path, model, label) {
  const id = `${uid}-${control.name}-${place}-${path || "all"}`, key = `${control.name}-${place}-${path || "all"}`;
  const value = () => { const found = settingsOf(control)[place]; const part = path ? found.parts[path] : found; return part ?? control.default ?? control.low; };
  const [least, most] = [Math.min(control.low, value()), Math.max(control.high, value())];
  const about = label ? `${control.name}, ${label}` : control.name;
  const range = h("input", { type: "range", id, min: least, max: most, step: control.step || "any", value: value(), "data-key": key,
    "aria-label": about, "aria-describedby": `${id}-ends`, oninput: () => take(Number(range.value)) });
  const field = h("input", { type: "number", class: "hm-input hm-number-field", min: control.least, max: control.most, step: "any", value: value(), "data-key": `${key}-field`,
    "aria-label": `${about}, exact number`, onchange: () => {
      if (field.value === "" || !isFinite(Number(field.value))) field.value = value();
      else take(clamp(control, Number(field.value)));
    } });
  const reset = h("button", { type: "button", class: "hm-icon", "data-key": `${key}-reset`, "aria-label": `Reset ${about} to ${short(control.default)}`, title: `Back to ${short(control.default)}`,
    onclick: () => take(control.default) }, "↺");
  const paint = () => {
    const now = value();
    if (typeof now !== "number") return;
    range.min = Math.min(control.low, now);
    range.max = Math.max(control.high, now);
    if (document.activeElement !== range || Number(range.value) !== now) range.value = now;
    if (document.activeElement !== field || Number(field.value) !== now) field.value = now;
    range.style.setProperty("--hm-share", `${100 * (now - range.min) / (range.max - range.min || 1)}%`);
    reset.style.visibility = now === control.default ? "hidden" : "visible";
  };
  const take = (now) => put(control, place, path, now);
  (updates[control.name] ||= []).push(paint);
  paint();
  const [low, high] = control.ends[0] ? control.ends : [short(control.low), short(control.high)];
  return [
    h("div", { class: "hm-slider" }, range, field, reset),
    h("div", { class: "hm-ends", id: `${id}-ends` }, h("span", {}, hidden("Low end: "), named(control, low, model)), h("span", {}, hidden("High end: "), named(control, high, model))),
  ];
}

/** A field for a number that has no slider. */
function numberField(control, place, path, label) {
  const now = path ? settingsOf(control)[place].parts[path] : settingsOf(control)[place];
  const field = h("input", { type: "number", class: "hm-input hm-number-field hm-wide", min: control.least, max: control.most, step: control.step || "any", value: now,
    placeholder: control.optional ? "as the method chooses" : null, "data-key": `${control.name}-${place}-${path || "all"}`,
    "aria-label": label ? `${control.name}, ${label}` : control.name, onchange: () => {
      if (field.value === "") put(control, place, path, control.optional ? null : control.default);
      else put(control, place, path, clamp(control, Number(field.value)));
      const stored = settingsOf(control)[place];
      const kept = path ? stored.parts[path] : stored;
      field.value = kept === null ? "" : kept;
    } });
  return [field, control.optional ? h("span", { class: "hm-note" }, "Empty: as the method chooses.") : null];
}

function curve(control, place, path, points, label) {
  const numeric = control.kind === "slider";
  const top = control.most ?? (control.default > control.low ? control.default : control.high);
  const high = numeric ? control.high : Math.max(...points, control.default || 0) * 2 || 1;
  return curveEditor(points, {
    low: numeric ? control.low : 0, high, least: control.least, most: control.most, step: control.step || high / 100,
    top: numeric ? top : high, layers: mine.value.layers || 0, name: label ? `${control.name}, ${label}` : control.name,
    key: `${control.name}-${place}-${path || "all"}`,
  }, (made) => put(control, place, path, { curve: made }));
}

const plain = (control, place, path, model, label) => control.kind === "slider" ? slider(control, place, path, model, label) : numberField(control, place, path, label);

function varying(control, place, path, setting, model, label) {
  return isCurve(setting) ? curve(control, place, path, setting.curve, label) : plain(control, place, path, model, label);
}

/** What chooses whether a number is one for all layers, a curve, or one for each part of a layer. */
function modes(control, place, path, setting, label) {
  const options = path ? { plain: "same in all layers", curve: "curve over depth" } : { plain: "same in all layers", curve: "curve over depth", parts: "attention, MLP, rest apart" };
  const make = { plain: (one) => flat(one, control), curve: (one) => asCurve(one, control), parts: asParts };
  const select = h("select", { class: "hm-input hm-mode", "aria-label": `${label ? `${control.name}, ${label}` : control.name}: how it varies`, "data-key": `${control.name}-${place}-${path || "all"}-mode`,
    onchange: () => {
      put(control, place, path, make[select.value](setting));
      render();
    } }, Object.entries(options).map(([kind, words]) => h("option", { value: kind, selected: kind === kindOf(setting) }, words)));
  return select;
}

function part(control, place, name, setting, model, label) {
  const about = label ? `${label}, ${PARTS[name]}` : PARTS[name];
  return h("div", { class: "hm-part" }, h("div", { class: "hm-row-head" }, h("span", { class: "hm-row-name" }, PARTS[name]), modes(control, place, name, setting, about)),
    varying(control, place, name, setting, model, about));
}

/** One number: of all models together, or of one. */
function row(control, place, setting, model) {
  const label = control.per_model ? model : "";
  const share = h("span", { class: "hm-share" });
  if (control.shares && control.per_model) shareOf(control, place, share);
  const head = label || control.curve ? h("div", { class: "hm-row-head" }, h("span", { class: "hm-row-name" }, label, " ", share), control.curve ? modes(control, place, null, setting, label) : null) : null;
  const inner = isParts(setting) ? Object.keys(PARTS).map((name) => part(control, place, name, setting.parts[name], model, label)) : varying(control, place, null, setting, model, label);
  return h("div", { class: "hm-row" }, head, inner);
}

const dividing = (control) => control.shares === "always" || (control.shares && mine.value.values[control.shares] === true);

/** Show what share a weight is of all, where only their ratio counts. */
function shareOf(control, place, share) {
  const paint = () => {
    const numbers = settingsOf(control);
    const total = numbers.reduce((sum, one) => sum + (typeof one === "number" ? one : NaN), 0);
    share.textContent = dividing(control) && total > 0 && typeof numbers[place] === "number" ? `${Math.round(100 * numbers[place] / total)} % of the whole` : "";
  };
  (updates["*"] ||= []).push(paint);
  paint();
}

function ratioNote(control) {
  const note = h("p", { class: "hm-note hm-ratio" });
  const paint = () => {
    note.hidden = !dividing(control);
    note.replaceChildren(mark("info"), ` Only the ratio of these numbers counts, not their size: ${control.shares === "always" ? "this method" : `${spaced(control.shares)}, which is on,`} divides by their sum.`);
  };
  (updates["*"] ||= []).push(paint);
  paint();
  return note;
}

/** What changes the values of all models at once. */
function allAtOnce(control) {
  const each = (act) => () => {
    store(control, settingsOf(control).map((one, i, all) => typeof one === "number" ? tidy(clamp(control, act(one, all))) : one));
  };
  const numbers = (all) => all.filter((one) => typeof one === "number");
  const sum = (all) => numbers(all).reduce((total, one) => total + one, 0);
  const button = (text, name, act) => h("button", { type: "button", class: "hm-button hm-small", "aria-label": `${name}: ${control.name} of all models`, onclick: each(act) }, text);
  const id = `${uid}-${control.name}-together`;
  const link = h("input", { type: "checkbox", id, checked: Boolean(together[control.name]), "data-key": `${control.name}-together`, onchange: () => { together[control.name] = link.checked; } });
  return h("div", { class: "hm-all", role: "group", "aria-label": `${control.name} of all models at once` },
    h("span", { class: "hm-note" }, "All at once:"), h("span", { class: "hm-check" }, link, h("label", { for: id }, "move together")),
    button("equal", "Make equal", (one, all) => sum(all) / numbers(all).length), button("× ½", "Halve", (one) => one / 2), button("× 2", "Double", (one) => one * 2),
    control.shares || control.most === null ? button("sum to 1", "Scale so that they sum to 1", (one, all) => sum(all) ? one / sum(all) : 1 / numbers(all).length) : null,
    button("reset", "Reset", () => control.default));
}

function toggle(control, place, model) {
  const id = `${uid}-${control.name}-${place}`;
  const box = h("input", { type: "checkbox", id, checked: settingsOf(control)[place] === true, "data-key": `${control.name}-${place}`, onchange: () => put(control, place, null, box.checked) });
  return h("span", { class: "hm-check" }, box, h("label", { for: id }, control.per_model ? model : spaced(control.name)));
}

function choice(control, place, model) {
  const now = settingsOf(control)[place];
  const select = h("select", { class: "hm-input", "aria-label": control.per_model ? `${control.name}, ${model}` : control.name, "data-key": `${control.name}-${place}`,
    onchange: () => put(control, place, null, select.value) }, control.choices.map((one) => h("option", { value: one, selected: one === now }, one === control.default ? `${one} (default)` : one)));
  return h("div", { class: "hm-row" }, control.per_model ? h("span", { class: "hm-row-name" }, model) : null, select);
}

function text(control, place, model) {
  const field = h("input", { type: "text", class: "hm-input", value: settingsOf(control)[place], "aria-label": control.per_model ? `${control.name}, ${model}` : control.name,
    "data-key": `${control.name}-${place}`, onchange: () => put(control, place, null, field.value) });
  return field;
}

function widget(control) {
  const models = control.per_model ? mine.value.models || [] : [otherModel()];
  const make = { switch: toggle, choice, text };
  const many = control.per_model && models.length > 1 && ["slider", "number"].includes(control.kind);
  const rows = models.map((model, i) => control.kind in make ? make[control.kind](control, i, model) : row(control, i, settingsOf(control)[i], model));
  const help = control.help ? control.help[0].toUpperCase() + control.help.slice(1) : "";
  const compact = !control.per_model && control.kind !== "slider" && kindOf(settingsOf(control)[0]) === "plain";
  const named = control.kind === "switch" && !control.per_model;
  return h("fieldset", { class: `hm-fieldset hm-control ${compact ? "hm-compact" : ""}` },
    h("legend", { class: named ? "hm-hidden" : null }, spaced(control.name)), named ? rows : null, help ? h("p", { class: "hm-note" }, help) : null,
    control.shares && control.per_model ? ratioNote(control) : null, many ? allAtOnce(control) : null, named ? null : rows);
}

/** What the widgets depend on: if it is the same, they need not be drawn. */
const picture = () => JSON.stringify([mine.value.method, mine.value.models, mine.value.base, mine.value.layers, mine.value.controls, mine.value.values]);

function render() {
  const active = body.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const open = new Set([...body.querySelectorAll("details[open]")].map((one) => one.dataset.key));
  updates = {};
  const listed = mine.value.controls || [];
  body.replaceChildren(...(listed.length ? listed.map(widget) : [h("p", { class: "hm-empty" }, mine.value.method ? "This method has no numbers to set." : "Choose models and a method first.")]));
  for (const one of body.querySelectorAll("details")) if (open.has(one.dataset.key)) one.open = true;
  const wanted = active && [...body.querySelectorAll("[data-key]")].find((one) => one.dataset.key === active);
  if (wanted) wanted.focus({ preventScroll: true });
  drawn = picture();
}

function arrive() {
  const said = mine.value.sentence || "";
  if (sentence.textContent !== said) sentence.textContent = said;
  if (drawn !== picture()) render();
}

mine.value.values = mine.value.values || {};
arrive();
