const KINDS = { "fits": "good", "warns": "warn", "does not fit": "bad" };
const WORDS = { "fits": "Fits", "warns": "Fits, with warnings", "does not fit": "Does not fit" };
const card = (label, value, note) => h("div", { class: "hm-card" }, h("dt", {}, label), h("dd", {}, value), note ? h("dd", { class: "hm-note" }, note) : null);

function command(text) {
  const button = h("button", { type: "button", class: "hm-button", onclick: async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(shown); button.textContent = "Selected: copy it"; }
  } }, "Copy");
  const shown = h("code", { tabindex: "0" }, text);
  return h("div", { class: "hm-command" }, h("p", { class: "hm-note" }, "Run it elsewhere:"), shown, button);
}

follow((value) => {
  if (!value.models) return draw();
  const known = value.verdict in KINDS;
  const cards = [
    card("Models", value.models.length ? value.models.join(", ") : "none yet", value.method ? `by ${value.method}` : null),
    known ? card("Verdict", [mark(KINDS[value.verdict]), ` ${WORDS[value.verdict]}`]) : null,
  ];
  if (value.ready) cards.push(
    card("Result", size(value.write), value.download ? `${size(value.download)} to download` : "nothing to download"),
    card("Time", value.seconds ? `about ${duration(value.seconds)}` : "under a second", value.memory ? `${size(value.memory)} of memory` : null),
    card("Disk", [mark(value.fits ? "good" : "bad"), ` ${size(value.disk)} of ${size(value.free)} free`], value.fits ? null : "It does not fit here."));
  if (value.licence) cards.push(card("Licence", value.licence));
  draw(h("dl", { class: "hm-cards" }, cards), value.command ? command(value.command) : null);
});
