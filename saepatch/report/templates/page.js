"use strict";
// Tables sort by a click on a header; a second click turns the order. Gaps stay last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const numeric = head.hasAttribute("data-numeric");
    const key = (row) => row.cells[column].dataset.key;
    head.querySelector("button").addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      // What one wants first of numbers is the largest, of texts the first.
      const rising = before ? before === "descending" : !numeric;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
        return rising ? order : -order;
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    });
  });
}

// The contents show where one is.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "0px 0px -75% 0px" });
document.querySelectorAll("main section").forEach((section) => seen.observe(section));

// Paper has no summary to open.
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details[open]").forEach((details) => { details.open = false; });
});
