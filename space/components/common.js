// What all components share. Text from other people goes through `h`, which makes text nodes of it, never HTML.
const host = element.querySelector(".hm");
const uid = "hm" + Math.random().toString(36).slice(2, 8);
const SVG = "http://www.w3.org/2000/svg";

/** Make an element: h("p", {class: "note", onclick: f}, "text", child, null). */
function h(tag, attributes, ...children) {
  const made = ["svg", "polyline", "line", "path", "circle"].includes(tag)
    ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (name === "style") made.style.cssText = value;
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.flat(9).filter((one) => one !== null && one !== undefined && one !== false));
  return made;
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
const copy = (value) => JSON.parse(JSON.stringify(value === undefined ? null : value));
const given = () => copy(props.value) || {};

/** Draw anew, and give the focus back to what has the same `data-key`. */
function draw(...children) {
  const active = document.activeElement;
  const key = host.contains(active) ? active.dataset.key : null;
  const open = new Set([...host.querySelectorAll("details[open]")].map((one) => one.dataset.key));
  host.replaceChildren(...children.flat(9).filter(Boolean));
  for (const one of host.querySelectorAll("details")) if (open.has(one.dataset.key)) one.open = true;
  if (key) {
    const found = [...host.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key);
    if (found) found.focus({ preventScroll: true });
  }
}

/** Let `show` draw the value, now and whenever the server sends another. */
function follow(show) {
  let last;
  const update = () => {
    const value = given();
    if (same(value, last)) return;
    last = value;
    show(value);
  };
  watch("value", update);
  update();
}

/** A value that a person changes. `change` tells the server; an answer that is late does not undo it. */
function edited(show, keep = []) {
  const mine = { value: given(), timer: null, sent: 0 };
  mine.value.seq = mine.value.seq || 0;
  const send = () => {
    mine.timer = null;
    mine.sent = Date.now();
    props.value = copy(mine.value);
    trigger("input");
  };
  mine.change = (value) => {
    mine.value = { ...value, seq: mine.value.seq + 1 };
    const wait = Math.max(0, 120 - (Date.now() - mine.sent));
    if (!mine.timer) mine.timer = setTimeout(send, wait);
  };
  watch("value", () => {
    const value = given();
    if (value.seq !== undefined && value.seq < mine.value.seq) {
      const kept = Object.fromEntries(keep.filter((name) => name in value).map((name) => [name, value[name]]));
      mine.value = { ...mine.value, ...kept };
      props.value = copy(mine.value);
    } else {
      if (mine.timer) { clearTimeout(mine.timer); mine.timer = null; }
      mine.value = { ...value, seq: Math.max(value.seq || 0, mine.value.seq) };
    }
    show();
  });
  return mine;
}

const MARKS = { good: ["✓", "Good"], warn: ["!", "Warning"], bad: ["✕", "Problem"], info: ["i", "Note"] };

/** A shape with a word beside each colour, so that colour is never alone. */
function mark(kind) {
  const [shape, word] = MARKS[kind] || MARKS.info;
  return h("span", { class: `hm-mark hm-${MARKS[kind] ? kind : "info"}`, role: "img", "aria-label": word }, shape);
}

/** Bytes in words. */
function size(count) {
  if (count === null || count === undefined || !isFinite(count)) return "unknown";
  let unit = "B";
  for (const larger of ["kB", "MB", "GB", "TB"]) {
    if (Math.abs(count) < 999.5) break;
    [count, unit] = [count / 1000, larger];
  }
  return `${unit === "B" || count >= 99.95 ? Math.round(count) : count.toFixed(1)} ${unit}`;
}

/** Seconds in words. */
function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** A number, short: three significant digits. */
function short(value) {
  if (typeof value !== "number" || !isFinite(value)) return "–";
  return String(Number(value.toPrecision(3)));
}

const hidden = (...children) => h("span", { class: "hm-hidden" }, ...children);
const count = (value) => Array.isArray(value) ? value.length : value;
const grouped = (value) => typeof value === "number" ? value.toLocaleString("en-US") : String(value);

/** A frame in which a wide table scrolls, by keyboard too. */
const scroller = (label, child) => h("div", { class: "hm-scroll", tabindex: "0", role: "region", "aria-label": label }, child);
