const KINDS = { done: "good", failed: "bad", cancelled: "warn", lost: "warn" };
const HEADINGS = { queued: "Waiting", running: "Running", cancelling: "Stopping", done: "Done", failed: "It failed", cancelled: "Stopped", lost: "It was lost" };

const shown = h("div", { class: "hm-run" });
const live = h("p", { class: "hm-hidden", role: "status", "aria-live": "polite" });
host.append(shown, live);

function heading(value) {
  if (value.state === "queued" && value.place) return `Waiting: place ${value.place} in the queue`;
  if (value.state === "running" && value.stage) return value.stage[0].toUpperCase() + value.stage.slice(1);
  return HEADINGS[value.state] || String(value.state);
}

function share(value) {
  for (const [part, whole] of [["bytes", "all_bytes"], ["tensors", "all_tensors"]])
    if (value[whole]) return Math.min(1, Math.max(0, (value[part] || 0) / value[whole]));
  return null;
}

function bar(value) {
  const at = share(value);
  const facts = [
    ["Tensors", value.all_tensors ? `${grouped(value.tensors || 0)} of ${grouped(value.all_tensors)}` : null],
    ["Data", value.all_bytes ? `${size(value.bytes || 0)} of ${size(value.all_bytes)}` : null],
    ["Speed", value.rate ? `${size(value.rate)}/s` : null],
    ["Left", value.eta !== null && value.eta !== undefined ? `about ${duration(value.eta)}` : null],
  ];
  return [
    h("div", { class: "hm-bar" }, h("progress", { max: "1", value: at, "aria-label": "Progress of the merge" }),
      at === null ? null : h("span", { "aria-hidden": "true" }, `${Math.round(100 * at)} %`)),
    h("dl", { class: "hm-facts" }, facts.filter(([, fact]) => fact).map(([name, fact]) => h("div", {}, h("dt", {}, name), h("dd", {}, fact)))),
    value.tensor ? h("p", { class: "hm-tensor" }, value.tensor) : null,
  ];
}

follow((value) => {
  if (!value.state || value.state === "idle") {
    shown.replaceChildren();
    live.textContent = "";
    return;
  }
  const busy = ["queued", "running", "cancelling"].includes(value.state);
  const sign = busy ? h("span", { class: "hm-pulse", "aria-hidden": "true" }) : mark(KINDS[value.state] || "info");
  const took = value.state === "done" && value.seconds ? ` in ${duration(value.seconds)}` : "";
  shown.replaceChildren(...[
    h("div", { class: "hm-run-head" }, sign, h("strong", {}, heading(value) + took)),
    value.message ? h("p", {}, String(value.message)) : null,
    ...(busy && value.state !== "queued" ? bar(value) : []),
    busy ? h("p", { class: "hm-note" }, "It goes on if you close this page.") : null,
  ].filter(Boolean));
  const at = value.state === "running" ? share(value) : null;
  const told = heading(value) + took + (at === null ? "" : `, ${Math.floor(10 * at) * 10} percent`);
  if (live.textContent !== told) live.textContent = told;
});
