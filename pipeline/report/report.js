"use strict";
const $ = (selector) => document.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const data = JSON.parse($("#data").textContent);

// Light and dark: what the system prefers until the button is pressed.
const dark = () => (document.documentElement.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
$("#theme").addEventListener("click", () => { document.documentElement.style.colorScheme = dark() ? "light" : "dark"; });

// Thresholds. A row passes as many of a slider's stops as its byte says; 255 is a missing value, which passes none.
const MISSING = 255, KEPT = 1, AGREES = 2, FINAL = 4;
const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const columns = data.columns;
const flags = bytes(columns.flags);
const label = new Uint32Array(bytes(columns.label).buffer);
const timestep = new Uint16Array(bytes(columns.timestep).buffer);
const sliders = columns.sliders.map((slider, number) => {
  const input = $(`#slider-${number}`), bars = Math.ceil((slider.stops.length - 1) / slider.bar);
  const svg = $(`#histogram-${number}`);
  const draw = (kind) => Array.from({ length: bars }, (_, bar) => {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    rect.setAttribute("class", kind);
    rect.setAttribute("x", (200 * slider.bar * bar) / (slider.stops.length - 1) + .5);
    rect.setAttribute("width", (200 * Math.min(slider.bar, slider.stops.length - 1 - slider.bar * bar)) / (slider.stops.length - 1) - .5);
    return svg.appendChild(rect);
  });
  return { ...slider, input, value: $(`#value-${number}`), off: Number(input.dataset.off), passed: bytes(slider.passed), bars, all: draw("all"), stays: draw("stays") };
});
const checked = (id) => Boolean($(id)?.checked);
const chosen = (id) => Number($(id)?.value ?? -1);
const inside = (slider, passed, at) => passed !== MISSING && (slider.operator === ">=" ? passed > at : passed <= at);

function height(rects, counts, most) {
  counts.forEach((count, bar) => {
    const tall = count ? Math.max(1, (60 * count) / most) : 0;
    rects[bar].setAttribute("y", 60 - tall);
    rects[bar].setAttribute("height", tall);
  });
}

function recount() {
  const at = sliders.map((slider) => Number(slider.input.value)), active = at.flatMap((stop, k) => (stop === sliders[k].off ? [] : [k]));
  const rejected = checked("#rejected"), needed = (rejected ? 0 : KEPT) | (checked("#agrees") ? AGREES : 0) | (checked("#final") ? FINAL : 0);
  const base = rejected ? 0 : KEPT, ofClass = chosen("#of-class"), ofTimestep = chosen("#of-timestep");
  const perClass = new Map(), all = sliders.map((s) => new Array(s.bars).fill(0)), left = sliders.map((s) => new Array(s.bars).fill(0));
  let stays = 0, among = 0;
  const passes = (flag, passed) => (flag & needed) === needed && active.every((k) => inside(sliders[k], passed(k), at[k]));
  for (let row = 0; row < columns.rows; row++) {
    if ((flags[row] & base) !== base) continue;
    among++;
    const stay = passes(flags[row], (k) => sliders[k].passed[row]);
    if (stay) { stays++; perClass.set(label[row], (perClass.get(label[row]) ?? 0) + 1); }
    if ((ofClass >= 0 && label[row] !== ofClass) || (ofTimestep >= 0 && timestep[row] !== ofTimestep)) continue;
    for (let k = 0; k < sliders.length; k++) {
      const passed = sliders[k].passed[row];
      if (passed === MISSING) continue;
      const bar = Math.min(sliders[k].bars - 1, Math.floor(Math.max(0, passed - 1) / sliders[k].bar));
      all[k][bar]++;
      if (stay) left[k][bar]++;
    }
  }
  const clauses = [];
  sliders.forEach((slider, k) => {
    const most = Math.max(1, ...all[k]), stop = slider.stops[at[k]], on = at[k] !== slider.off;
    height(slider.all, all[k], most);
    height(slider.stays, left[k], most);
    slider.value.textContent = on ? stop : "off";
    slider.input.setAttribute("aria-valuetext", on ? `${stop}` : "off");
    if (on) clauses.push(`${slider.name} ${slider.operator} ${stop}`);
  });
  if (checked("#agrees")) clauses.push("teacher_label == label");
  if (checked("#final")) clauses.push("timestep == 0");
  const parts = [];
  if (clauses.length) parts.push(`--where "${clauses.join(" and ")}"`);
  if (rejected) parts.push("--set include_rejected=true");
  $("#where").value = parts.join(" ");
  $("#where").placeholder = "every kept image: no threshold is set";
  $("#copy-where").disabled = !parts.length;
  $("#stays").textContent = stays.toLocaleString("en");
  $("#among").textContent = among.toLocaleString("en");
  const fewest = perClass.size < columns.classes ? 0 : [...perClass.values()].reduce((a, b) => Math.min(a, b));
  $$("[data-stays]").forEach((cell) => {
    cell.textContent = (perClass.get(Number(cell.dataset.stays)) ?? 0).toLocaleString("en");
  });
  $$("[data-bar]").forEach((bar) => bar.setAttribute("width", (perClass.get(Number(bar.dataset.bar)) ?? 0) * bar.dataset.scale));
  $("#fewest").textContent = `, ${fewest.toLocaleString("en")} or more of each class`;
  $$(".shot").forEach((shot) => {
    const entry = data.pictures[shot.dataset.entry];
    const here = entry.flags | (entry.flags & KEPT ? 0 : KEPT); // a rejected picture is marked as such already
    shot.classList.toggle("gone", !passes(here, (k) => entry.passed[k]));
  });
}
sliders.forEach((slider) => slider.input.addEventListener("input", recount));
["#agrees", "#final", "#rejected", "#of-class", "#of-timestep"].forEach((id) => $(id)?.addEventListener("change", recount));
recount();

// Copying: without permission for the clipboard the text is selected instead.
async function copy(button, text) {
  try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
  catch { button.textContent = "Press Ctrl+C"; getSelection().selectAllChildren(button.previousElementSibling); if (button.id) $("#where").select(); }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}
$$("[data-copy]").forEach((button) => button.addEventListener("click", () => copy(button, button.dataset.copy)));
$("#copy-where").addEventListener("click", (event) => copy(event.target, $("#where").value));

// The card of a picture: on hover or focus, kept open by a click, tap or Enter until Escape or another click.
const card = $("#card");
let pinned = null;
function show(shot) {
  const entry = data.pictures[shot.dataset.entry];
  const own = shot.querySelector("img"), large = card.querySelector("img");
  large.src = own.src;
  large.className = own.className;
  $("#card-key").textContent = entry.key;
  $("#card-facts").replaceChildren(...entry.facts.map(([name, value]) => {
    const row = document.createElement("div"), term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name; text.textContent = value; row.append(term, text);
    return row;
  }));
  card.hidden = false;
  const box = shot.getBoundingClientRect(), width = card.offsetWidth, tall = card.offsetHeight;
  card.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  card.style.top = `${box.bottom + tall + 16 < innerHeight ? box.bottom + 8 : Math.max(8, box.top - tall - 8)}px`;
}
function hide() { card.hidden = true; pinned?.setAttribute("aria-expanded", "false"); pinned = null; }
document.addEventListener("pointerover", (event) => {
  const shot = event.target.closest(".shot");
  if (event.pointerType === "mouse" && !pinned) shot ? show(shot) : (card.hidden = true);
});
document.addEventListener("focusin", (event) => {
  const shot = event.target.closest(".shot");
  if (shot?.matches(":focus-visible")) { if (pinned && pinned !== shot) hide(); show(shot); } else if (!shot && !pinned) card.hidden = true;
});
document.addEventListener("click", (event) => {
  const shot = event.target.closest(".shot"), same = shot && shot === pinned;
  hide();
  if (shot && !same) { show(shot); pinned = shot; shot.setAttribute("aria-expanded", "true"); }
});

// Arrow keys move through the pictures of a section, which is one stop of the Tab key.
$$("[data-rove]").forEach((section) => {
  const shots = $$(".shot", section), grids = $$(".grid", section);
  if (shots.length) shots[0].tabIndex = 0;
  section.addEventListener("focusin", (event) => {
    if (event.target.matches(".shot")) shots.forEach((shot) => { shot.tabIndex = shot === event.target ? 0 : -1; });
  });
  section.addEventListener("keydown", (event) => {
    const at = shots.indexOf(document.activeElement);
    if (at < 0) return;
    const grid = document.activeElement.closest(".grid"), row = $$(".shot", grid), place = row.indexOf(document.activeElement);
    const beside = (step) => $$(".shot", grids[grids.indexOf(grid) + step] ?? grid);
    const vertical = (step) => { const other = beside(step); return other[Math.min(place, other.length - 1)]; };
    const target = { ArrowRight: shots[at + 1], ArrowLeft: shots[at - 1], ArrowDown: vertical(1), ArrowUp: vertical(-1), Home: row[0], End: row.at(-1) }[event.key];
    if (target) { event.preventDefault(); target.focus({ focusVisible: true }); }
  });
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
