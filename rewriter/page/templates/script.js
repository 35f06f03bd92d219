"use strict";
// The strip: the arrow keys move through it, and the line below says what is pointed at.
for (const strip of document.querySelectorAll(".strip")) {
  const cells = [...strip.children], readout = strip.nextElementSibling, legend = [...readout.childNodes];
  const say = (cell) => readout.replaceChildren(cell.title);
  const legendAgain = () => readout.replaceChildren(...legend);
  cells.forEach((cell, n) => {
    cell.addEventListener("mouseenter", () => say(cell));
    cell.addEventListener("focus", () => say(cell));
    cell.addEventListener("mouseleave", legendAgain);
    cell.addEventListener("blur", legendAgain);
    cell.addEventListener("keydown", (event) => {
      const next = cells[n + ({ArrowRight: 1, ArrowLeft: -1}[event.key] ?? cells.length)];
      if (next) { cell.tabIndex = -1; next.tabIndex = 0; next.focus(); event.preventDefault(); }
    });
  });
}
// Before and after: what a step came from lights up, and what came from it.
for (const table of document.querySelectorAll("[data-sides]")) {
  const n = table.dataset.sides, at = (side, number) => document.getElementById(`${side}${n}-${number}`);
  const became = new Map();
  for (const cell of table.querySelectorAll("[data-from]"))
    for (const number of cell.dataset.from.split(" ")) {
      const from = at("l", number);
      if (from) became.set(from, [...(became.get(from) ?? []), cell]);
    }
  const related = (cell) => [cell, ...(became.get(cell) ?? []),
    ...(cell.dataset.from ?? "").split(" ").filter(Boolean).map((number) => at("l", number))].filter(Boolean);
  const light = (on) => (event) => {
    const cell = event.target.closest(".call[id]");
    if (cell) for (const each of related(cell)) each.classList.toggle("lit", on);
  };
  table.addEventListener("mouseover", light(true));
  table.addEventListener("mouseout", light(false));
  table.addEventListener("focusin", light(true));
  table.addEventListener("focusout", light(false));
  // Long runs of steps that stayed the same are folded.
  let run = [];
  const fold = () => {
    const rows = run;
    run = [];
    if (rows.length < 4) return;
    const button = Object.assign(document.createElement("button"), {type: "button", textContent: `… ${rows.length} steps that stayed`});
    const row = document.createElement("tr"), cell = row.appendChild(document.createElement("td"));
    row.className = "fold";
    cell.colSpan = 2;
    cell.append(button);
    rows[0].before(row);
    for (const each of rows) each.hidden = true;
    button.addEventListener("click", () => { for (const each of rows) each.hidden = false; row.remove(); });
  };
  for (const row of table.tBodies[0].rows) {
    if (row.classList.contains("kept")) run.push(row);
    else fold();
  }
  fold();
}
// The bug report: the clipboard of the page where there is one, else by selection.
document.getElementById("copy").addEventListener("click", async () => {
  const text = document.getElementById("bug").textContent, status = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.body.appendChild(Object.assign(document.createElement("textarea"), {value: text}));
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  status.textContent = "copied";
});
