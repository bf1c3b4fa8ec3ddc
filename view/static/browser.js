// What the browser does for the page as a whole: its address, and names for those who use a screen reader.
//
// `query` comes from Python, and goes back when the reader steps back or forward. Another rollout or view is a step of
// the history; anything else replaces the last one.

const STEPS = ["store", "view", "rollout"];
const NAMING_MS = 700;

function isStep(query) {
  const wanted = new URLSearchParams(query);
  const now = new URLSearchParams(location.search);
  return STEPS.some((name) => now.has(name) && wanted.getAll(name).join() !== now.getAll(name).join());
}

// Bokeh's and Tabulator's elements that have no name, or a role that their parents do not allow.
function nameParts(root) {
  for (const box of root.querySelectorAll("input[type=checkbox]:not([aria-label])")) {
    box.setAttribute("aria-label", (box.nextElementSibling ?? box.parentElement).textContent.trim());
  }
  for (const [kind, name] of [["up", "more"], ["down", "less"]]) {
    for (const button of root.querySelectorAll(`.bk-spin-btn-${kind}:not([aria-label])`)) button.setAttribute("aria-label", name);
  }
  for (const grid of root.querySelectorAll(".tabulator[role=grid]")) {
    nameGrid(grid);
    openRows(grid);
  }
}

// The rows of a table that can be clicked are one stop of the Tab key; the arrows move, Enter chooses.
function openRows(grid) {
  // Tabulator's cells take the focus and let it go at once where nothing is edited: Tab would never get beyond them.
  for (const cell of grid.querySelectorAll(".tabulator-cell[tabindex]")) cell.removeAttribute("tabindex");
  if (!grid.getRootNode().host?.classList.contains("clickable")) return;
  const rows = [...grid.querySelectorAll(".tabulator-row")];
  const stop = rows.find((row) => row.matches(":focus")) ?? rows[0];
  for (const row of rows) row.tabIndex = row === stop ? 0 : -1;
  if (grid.dataset.keys) return;
  grid.dataset.keys = "listening";
  grid.addEventListener("keydown", (event) => {
    const row = event.target;
    if (!row.matches(".tabulator-row")) return;
    if (event.key === "Enter") row.querySelector(".tabulator-cell:not([tabulator-field=_index])")?.click();
    const next = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling }[event.key];
    if (!next) return;
    event.preventDefault();
    next.tabIndex = 0;
    next.focus();
  });
}

function nameGrid(grid) {
  const roles = [[".tabulator-tableholder", "rowgroup"], [".tabulator-table", "none"], [".tabulator-footer", "rowgroup"]];
  roles.push([".tabulator-footer-contents", "row"], [".tabulator-paginator", "gridcell"]);
  for (const [part, role] of roles) {
    for (const one of grid.querySelectorAll(part)) if (one.getAttribute("role") !== role) one.setAttribute("role", role);
  }
  for (const column of grid.querySelectorAll(".tabulator-col")) {
    const title = column.querySelector(".tabulator-col-title")?.textContent.trim();
    for (const input of column.querySelectorAll("input:not([aria-label])")) input.setAttribute("aria-label", `Filter ${title}`);
  }
  grid.removeAttribute("aria-owns");
}

function nameAll(root) {
  nameParts(root);
  if (root.querySelector(".transcript")) return; // it names its own parts, and has thousands
  for (const one of root.querySelectorAll("*")) if (one.shadowRoot) nameAll(one.shadowRoot);
}

// Panel hands a table its new columns at once, also while Tabulator still builds it, which then fails and keeps the old
// ones: they wait until it is built. (Its number of pages needs no such help: Panel gives it again.)
function mendTables() {
  const kind = window.Tabulator?.prototype;
  if (!kind || kind.columnsWait) return;
  kind.columnsWait = true;
  const setColumns = kind.setColumns;
  kind.setColumns = function (...given) {
    if (this.initialized) return setColumns.apply(this, given);
    this.on("tableBuilt", () => setColumns.apply(this, given));
  };
}

export function render({ model }) {
  mendTables();
  const write = () => {
    if (model.address && model.query && model.query !== location.search) {
      const how = isStep(model.query) ? "pushState" : "replaceState";
      history[how](null, "", location.pathname + model.query + location.hash);
    }
  };
  const back = () => {
    if (model.address) model.query = location.search;
  };
  write();
  model.on("query", write);
  window.addEventListener("popstate", back);
  const naming = setInterval(() => {
    mendTables(); // in a notebook they may come later
    requestAnimationFrame(() => nameAll(document));
  }, NAMING_MS);
  model.on("remove", () => {
    window.removeEventListener("popstate", back);
    clearInterval(naming);
  });
  const nothing = document.createElement("div");
  nothing.hidden = true;
  return nothing;
}
