// Save a plot as PNG or SVG, or its numbers as CSV, without a server. `kind`, `name`, `figure`, `source`, `columns` and
// `heat` (rows and columns of a heatmap, else null) are given by Python.
function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${name}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function cell(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  const text = String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function lines() {
  const data = source.data;
  if (heat !== null) {
    const { rows, columns: across } = heat.tags[0];
    const image = data.image[0];
    const header = ["", ...across].map(cell).join(",");
    return [header, ...rows.map((row, i) => [row, ...image.subarray(i * across.length, (i + 1) * across.length)].map(cell).join(","))];
  }
  const names = columns.tags[0];
  const count = names.length ? data[names[0][0]].length : 0;
  const rows = [names.map(([, shown]) => cell(shown)).join(",")];
  for (let i = 0; i < count; i++) rows.push(names.map(([key]) => cell(data[key][i])).join(","));
  return rows;
}

if (kind === "csv") {
  save(new Blob([`${lines().join("\r\n")}\r\n`], { type: "text/csv" }), "csv");
} else {
  const view = Bokeh.index.find_one(figure);
  view.export(kind).to_blob().then((blob) => save(blob, kind));
}
