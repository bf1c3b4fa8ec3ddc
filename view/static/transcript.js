// The text of one rollout. Every token is one span, built once; a change of trait only changes their background colours.
//
// What comes from Python: `text` (tokens and what stands above them), `numbers` (a row of float32 for each direction),
// `column` (which row shades the text), `pinned` (a position or -1), `folded` (thinking), `compact`. What goes back:
// `pinned`, and `search` as it was typed.

const POSITIVE = [230, 97, 1];
const NEGATIVE = [43, 131, 226];
const CHUNK = 128; // tokens that are coloured together
const STRONGEST = 0.62; // of the colour's opacity, so that the text stays readable on it

function made(tag, name, text) {
  const one = document.createElement(tag);
  if (name) one.className = name;
  if (text !== undefined) one.textContent = text;
  return one;
}

function shade(value, scale) {
  if (!Number.isFinite(value) || !(scale > 0)) return "";
  const share = Math.min(1, Math.abs(value) / scale) * STRONGEST;
  const [r, g, b] = value > 0 ? POSITIVE : NEGATIVE;
  return share < 0.004 ? "" : `rgba(${r}, ${g}, ${b}, ${share.toFixed(3)})`;
}

function shown(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : value.toPrecision(4);
}

// One row of a matrix. Not `subarray`: what Bokeh hands over makes that anew as a whole, whatever part was asked for.
function part(values, row, length) {
  return new Float32Array(values.buffer, values.byteOffset + 4 * row * length, length);
}

// Share of all tokens that are below a value, from quantiles at equal steps.
function percentile(quantiles, value) {
  if (!quantiles || !Number.isFinite(value)) return null;
  let low = 0;
  let high = quantiles.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (quantiles[middle] < value) low = middle + 1;
    else high = middle;
  }
  return Math.min(100, (100 * low) / (quantiles.length - 1));
}

class Transcript {
  constructor(model) {
    this.model = model;
    this.spans = [];
    this.hits = [];
    this.hit = -1;
    this.root = made("div", "transcript");
    this.bar = this.root.appendChild(made("div", "bar"));
    this.body = this.root.appendChild(made("div", "body"));
    this.words = this.body.appendChild(made("div", "words"));
    this.words.tabIndex = 0;
    this.words.setAttribute("role", "region");
    this.words.setAttribute("aria-label", "Text of the rollout");
    this.card = this.body.appendChild(made("div", "card"));
    this.card.tabIndex = 0;
    this.card.setAttribute("role", "region");
    this.card.setAttribute("aria-label", "The token that is pointed at");
    this.buildBar();
    this.words.addEventListener("mouseover", (event) => this.point(event));
    this.words.addEventListener("mouseleave", () => this.describe(this.model.pinned));
    this.words.addEventListener("click", (event) => {
      const at = this.at(event);
      if (at !== null) this.model.pinned = at;
    });
    this.watcher = new IntersectionObserver((seen) => this.seen(seen), { root: this.words, rootMargin: "400px" });
    this.keys = (event) => this.pressed(event);
    document.addEventListener("keydown", this.keys);
  }

  buildBar() {
    this.find = made("input", "find");
    this.find.type = "search";
    this.find.placeholder = "Search the text";
    this.find.setAttribute("aria-label", "Search the text");
    this.find.addEventListener("input", () => this.search(this.find.value));
    this.find.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.next(event.shiftKey ? -1 : 1);
    });
    this.count = made("span", "count");
    this.count.setAttribute("role", "status");
    const before = made("button", "step", "‹");
    before.setAttribute("aria-label", "Match before");
    before.addEventListener("click", () => this.next(-1));
    const after = made("button", "step", "›");
    after.setAttribute("aria-label", "Next match");
    after.addEventListener("click", () => this.next(1));
    this.legend = made("div", "legend");
    this.bar.append(this.find, before, after, this.count, this.legend);
  }

  // -- text -------------------------------------------------------------------------------------------------------

  write() {
    const text = this.model.text;
    this.spans = [];
    this.chunks = [];
    this.watcher.disconnect();
    const blocks = [];
    for (const block of text.blocks || []) blocks.push(this.block(block, text));
    this.words.replaceChildren(...blocks);
    this.underline(text.annotations || []);
    this.words.scrollTop = 0;
    this.pinnedSpan = null;
    this.search(this.find.value);
  }

  block(block, text) {
    const thinking = block.thinking;
    const section = made(thinking ? "details" : "section", `block ${block.role}${thinking ? " thinking" : ""}`);
    section.append(made(thinking ? "summary" : "div", "title", block.title));
    if (thinking) section.open = !this.model.folded;
    const line = made("div", "line");
    let run = null;
    for (let i = block.start; i < block.stop; i++) {
      if (run === null || i - run.start >= CHUNK) {
        run = { element: line.appendChild(made("span")), start: i, stop: i, visible: false, stale: true };
        run.element.chunk = run;
        this.chunks.push(run);
        this.watcher.observe(run.element);
      }
      run.stop = i + 1;
      const word = text.texts[i];
      const span = made("span", word === null ? "t id" : "t", word === null ? `⟨${text.ids[i]}⟩` : word);
      span.dataset.i = i;
      run.element.append(span);
      this.spans.push(span);
    }
    section.append(line);
    return section;
  }

  underline(annotations) {
    for (const one of annotations) {
      for (let i = one.start; i < Math.min(one.stop, this.spans.length); i++) {
        const span = this.spans[i];
        span.classList.add("marked");
        span.style.textDecorationColor = one.colour;
        span.dataset.label = span.dataset.label ? `${span.dataset.label}, ${one.label}` : one.label;
        if (i === one.start) {
          const tag = made("span", "tag", one.label);
          tag.style.borderColor = one.colour;
          span.before(tag);
        }
      }
    }
  }

  // -- numbers ----------------------------------------------------------------------------------------------------

  row() {
    const { values, tokens } = this.model.numbers;
    const column = this.model.column;
    if (!values || !tokens || column < 0) return null;
    return part(values, column, tokens);
  }

  paint() {
    const row = this.row();
    const { scales, centres } = this.model.numbers;
    const column = this.model.column;
    this.shading = row ? { row, scale: scales[column], centre: centres[column] } : null;
    for (const run of this.chunks) {
      run.stale = true;
      if (run.visible) this.paintRun(run);
    }
    this.drawLegend(row, row ? centres[column] : 0, row ? scales[column] : 0);
    this.describe(this.model.pinned);
  }

  // Only what is in sight is coloured: a long text would keep the browser busy with thousands of spans.
  paintRun(run) {
    run.stale = false;
    const shading = this.shading;
    for (let i = run.start; i < run.stop; i++) {
      const colour = shading ? shade(shading.row[i] - shading.centre, shading.scale) : "";
      if (this.spans[i].colour !== colour) {
        this.spans[i].colour = colour;
        this.spans[i].style.backgroundColor = colour;
      }
    }
  }

  seen(changes) {
    for (const { target, isIntersecting } of changes) {
      target.chunk.visible = isIntersecting;
      if (isIntersecting && target.chunk.stale) this.paintRun(target.chunk);
    }
  }

  drawLegend(row, centre, scale) {
    this.legend.replaceChildren();
    if (!row) return;
    const { labels, unit } = this.model.numbers;
    const scaleBar = made("span", "scale");
    scaleBar.title = `uncoloured: the median, ${shown(centre)}`;
    this.legend.append(
      made("span", "name", labels[this.model.column]),
      made("span", "end", shown(centre - scale)),
      scaleBar,
      made("span", "end", shown(centre + scale)),
      made("span", "unit", unit),
    );
  }

  // -- one token --------------------------------------------------------------------------------------------------

  at(event) {
    const span = event.target.closest ? event.target.closest(".t") : null;
    return span ? Number(span.dataset.i) : null;
  }

  point(event) {
    const at = this.at(event);
    if (at !== null) this.describe(at);
  }

  describe(at) {
    const { text, numbers } = this.model;
    if (at === null || at < 0 || at >= this.spans.length) {
      this.card.replaceChildren(made("p", "hint", "Point at a token; click to pin it; ← → step."));
      this.card.dataset.at = -1;
      return;
    }
    this.card.dataset.at = at;
    const list = made("dl");
    const fact = (name, value) => list.append(made("dt", "", name), made("dd", "", value));
    fact("token", JSON.stringify(text.texts[at] ?? null));
    fact("id", String(text.ids[at]));
    fact("position", String(at));
    fact("role", text.facts[text.fact[at]]);
    if (this.spans[at].dataset.label) fact("annotation", this.spans[at].dataset.label);
    for (const [name, norms] of Object.entries(text.norms || {})) fact(`norm ${name}`, shown(norms[at]));
    this.card.replaceChildren(list);
    if (numbers.tokens) this.card.append(this.table(at));
  }

  table(at) {
    const { values, tokens, labels, centres, scales, quantiles, steps, sampled } = this.model.numbers;
    const table = made("table");
    const head = table.createTHead().insertRow();
    for (const name of ["trait", "score", "percentile"]) {
      const cell = made("th", "", name);
      cell.scope = "col";
      head.append(cell);
    }
    if (sampled) head.lastChild.title = `among ${sampled} tokens of this store`;
    const body = table.createTBody();
    labels.forEach((label, j) => {
      const value = values[j * tokens + at];
      const row = body.insertRow();
      if (j === this.model.column) row.className = "chosen";
      const parts = label.split(/(?<=\/)/); // a long one is broken after its category
      row.insertCell().append(...parts.flatMap((part, i) => (i ? [made("wbr"), part] : [part])));
      const cell = row.insertCell();
      cell.textContent = shown(value);
      cell.style.backgroundColor = shade(value - centres[j], scales[j]);
      const share = percentile(quantiles ? part(quantiles, j, steps) : null, value);
      row.insertCell().textContent = share === null ? "" : share.toFixed(0);
    });
    return table;
  }

  pin() {
    if (this.pinnedSpan) this.pinnedSpan.classList.remove("pinned");
    this.pinnedSpan = this.spans[this.model.pinned] ?? null;
    if (this.pinnedSpan) {
      this.pinnedSpan.classList.add("pinned");
      const folded = this.pinnedSpan.closest("details");
      if (folded) folded.open = true;
      this.reveal(this.pinnedSpan);
    }
    this.describe(this.model.pinned);
  }

  // Scroll to a token; again while the text is not laid out yet, or blocks on the way turn out to be of another height.
  reveal(span, frames = 60) {
    if (span !== this.pinnedSpan || !frames) return;
    const box = this.words.getBoundingClientRect();
    const mine = span.getBoundingClientRect();
    if (box.height && mine.height && mine.top >= box.top && mine.bottom <= box.bottom) return;
    if (box.height) this.words.scrollTop += mine.top - box.top - box.height / 2;
    requestAnimationFrame(() => this.reveal(span, frames - 1));
  }

  pressed(event) {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const path = event.composedPath();
    const busy = path.some(
      (one) => one.matches && one.matches("input, select, textarea, [role=slider], [role=grid], [contenteditable]"),
    );
    if (busy || !this.spans.length || !this.root.isConnected) return;
    event.preventDefault();
    const by = event.key === "ArrowRight" ? 1 : -1;
    const from = this.model.pinned < 0 ? (by > 0 ? -1 : 1) : this.model.pinned;
    this.model.pinned = Math.max(0, Math.min(this.spans.length - 1, from + by));
  }

  // -- search -----------------------------------------------------------------------------------------------------

  search(wanted) {
    for (const at of this.hits) this.mark(at, false);
    this.hits = [];
    this.hit = -1;
    const needle = wanted.toLowerCase();
    const texts = this.model.text.texts || [];
    if (needle) {
      const starts = [];
      let whole = "";
      for (const word of texts) {
        starts.push(whole.length);
        whole += (word ?? "").toLowerCase();
      }
      let token = 0;
      for (let found = whole.indexOf(needle); found >= 0; found = whole.indexOf(needle, found + needle.length)) {
        while (token + 1 < starts.length && starts[token + 1] <= found) token++;
        let stop = token;
        while (stop + 1 < starts.length && starts[stop + 1] < found + needle.length) stop++;
        this.hits.push([token, stop]);
      }
      for (const at of this.hits) this.mark(at, true);
    }
    this.count.textContent = needle ? `${this.hits.length} found` : "";
  }

  mark([start, stop], on) {
    for (let i = start; i <= stop; i++) if (this.spans[i]) this.spans[i].classList.toggle("found", on);
  }

  next(by) {
    if (!this.hits.length) return;
    this.hit = (this.hit + by + this.hits.length + (this.hit < 0 && by < 0 ? 1 : 0)) % this.hits.length;
    this.model.pinned = this.hits[this.hit][0];
    this.count.textContent = `${this.hit + 1} of ${this.hits.length}`;
  }

  fold() {
    for (const one of this.words.querySelectorAll("details")) one.open = !this.model.folded;
  }

  size() {
    this.root.classList.toggle("compact", this.model.compact);
    this.root.classList.toggle("dark", this.model.dark);
  }
}

export function render({ model, el }) {
  const view = new Transcript(model);
  view.size();
  view.write();
  view.paint();
  view.pin();
  model.on("text", () => {
    view.write();
    view.paint();
    view.pin();
  });
  model.on("numbers", () => view.paint());
  model.on("column", () => view.paint());
  model.on("pinned", () => view.pin());
  model.on("folded", () => view.fold());
  model.on("compact", () => {
    view.size();
    view.pin();
  });
  model.on("remove", () => document.removeEventListener("keydown", view.keys));
  return view.root;
}
