"use strict";
// Tables: a click on a header sorts by its column, a second click reverses the order. The field above the table of draws
// hides the rows that do not contain its text.
function compare(column, isNumber, sign) {
  return (a, b) => {
    const [left, right] = [a.cells[column], b.cells[column]];
    if (!isNumber) return sign * left.textContent.localeCompare(right.textContent);
    const [x, y] = [left, right].map((cell) => parseFloat(cell.dataset.value));
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // rows without a value come last, in either order
    return sign * (x - y);
  };
}

document.querySelectorAll("table.sortable").forEach((table) => {
  const headers = Array.from(table.tHead.rows[0].cells);
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const order = compare(column, header.dataset.kind === "number", descending ? -1 : 1);
      table.tBodies[0].append(...Array.from(table.tBodies[0].rows).sort(order));
    });
  });
});

const rows = Array.from(document.getElementById("draws").tBodies[0].rows);
const filter = document.getElementById("filter");
const shown = document.getElementById("shown");
filter.addEventListener("input", () => {
  const sought = filter.value.toLowerCase();
  rows.forEach((row) => (row.hidden = !row.textContent.toLowerCase().includes(sought)));
  shown.textContent = sought && `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
});
