// Save a plot as PNG or SVG, or its numbers as CSV: `kind`, `stem`, `figure` and `saved`, its columns, are given by Python.
function save(blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${stem}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function cell(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  const text = String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

if (kind === "csv") {
  const names = Object.keys(saved.data);
  if (names.length) {
    const rows = [names.map(cell).join(",")];
    const count = saved.data[names[0]].length;
    for (let i = 0; i < count; i++) rows.push(names.map((name) => cell(saved.data[name][i])).join(","));
    save(new Blob([`${rows.join("\r\n")}\r\n`], { type: "text/csv" }));
  }
} else {
  Bokeh.index.find_one(figure).export(kind).to_blob().then(save);
}
