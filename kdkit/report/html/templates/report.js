
"use strict";
// Search and filter of the samples. Everything is readable without this script.
const samples = [...document.querySelectorAll(".sample")];
if (samples.length) {
  const texts = samples.map((sample) => sample.textContent.toLowerCase());
  const query = document.getElementById("query");
  const group = document.getElementById("group");
  const count = document.getElementById("count");
  const apply = () => {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    samples.forEach((sample, index) => {
      const fits = words.every((word) => texts[index].includes(word));
      sample.hidden = !fits || (group.value !== "" && sample.dataset.group !== group.value);
      shown += sample.hidden ? 0 : 1;
    });
    count.textContent = `${shown} of ${samples.length}`;
  };
  query.addEventListener("input", apply);
  group.addEventListener("change", apply);
  document.querySelector(".search").hidden = false;
  apply();
}

// Tables of several rows sort by the column whose heading is pressed.
for (const table of document.querySelectorAll(".sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "descending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "ascending" : "descending");
      const value = (row) => {
        const cell = row.cells[column];
        return cell.dataset.sort === undefined ? null : Number(cell.dataset.sort);
      };
      const numeric = [...body.rows].some((row) => value(row) !== null);
      const compare = (a, b) => {
        if (!numeric) return a.cells[column].textContent.localeCompare(b.cells[column].textContent);
        // What has no number stays last in both directions.
        if (value(a) === null || value(b) === null) return (value(a) === null) - (value(b) === null);
        return value(a) - value(b);
      };
      const missing = (row) => numeric && value(row) === null;
      const rows = [...body.rows].sort((a, b) => (down || missing(a) || missing(b) ? 1 : -1) * compare(a, b));
      body.append(...rows);
    });
  });
}
