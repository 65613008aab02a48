"use strict";
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const SVG = document.querySelector("svg")?.namespaceURI;
document.documentElement.classList.add("scripted");

// What is sorted, filtered, chosen, picked and unfolded stands behind the first & of the address: #place&t1.s=2d&c1=3
const [place, ...rest] = location.hash.slice(1).split("&");
const state = new URLSearchParams(rest.join("&"));
let anchor = place;
function remember(key, value) {
  if (value === "") state.delete(key);
  else state.set(key, value);
  write();
}
function write() {
  const text = state.toString();
  history.replaceState(null, "", `#${anchor}${text && "&"}${text}`);
}
function make(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Tables sort by a click on a header; a second click turns the order. Gaps stay last either way.
function sort(table, column, rising) {
  const heads = [...table.tHead.rows[0].cells];
  const numeric = heads[column].hasAttribute("data-numeric");
  const key = (row) => row.cells[column].dataset.key;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
    return rising ? order : -order;
  });
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", rising ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
}
// Every word of a filter has to stand in the row.
function filter(figure, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...figure.querySelector("tbody").rows];
  for (const row of rows) {
    const said = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => said.includes(word));
  }
  const shown = rows.filter((row) => !row.hidden).length;
  figure.querySelector(".count").textContent = words.length ? `${shown} of ${rows.length} rows` : "";
}
function csv(table) {
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
  const ranged = heads.map((_, i) => rows.some((row) => row.cells[i].dataset.low !== undefined));
  const quote = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = [heads.flatMap((head, i) => {
    const name = head.textContent.trim();
    return ranged[i] ? [name, `${name} low`, `${name} high`] : [name];
  })];
  for (const row of rows) {
    lines.push([...row.cells].flatMap((cell, i) => {
      const value = cell.classList.contains("number") ? cell.dataset.key : cell.textContent.trim();
      return ranged[i] ? [value, cell.dataset.low ?? "", cell.dataset.high ?? ""] : [value];
    }));
  }
  return lines.map((line) => line.map(quote).join(",")).join("\n") + "\n";
}
async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}
for (const figure of all("figure.table")) {
  const table = figure.querySelector("table");
  const field = figure.querySelector("input");
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      // What one wants first of numbers is the largest, of texts the first.
      const rising = before ? before === "descending" : !head.hasAttribute("data-numeric");
      sort(table, column, rising);
      remember(`${figure.id}.s`, `${column}${rising ? "a" : "d"}`);
    });
  });
  field?.addEventListener("input", () => {
    filter(figure, field.value);
    remember(`${figure.id}.q`, field.value);
  });
}
for (const button of all("button.copy")) {
  button.addEventListener("click", () => copy(button, csv(button.closest(".tabular").querySelector("table"))));
}

// Views to choose from.
function choose(choice, index) {
  const views = all(":scope > .view", choice);
  if (!views[index]) return;
  choice.querySelector("select").selectedIndex = index;
  views.forEach((view, i) => { view.hidden = i !== index; });
  overflowing();
}
for (const choice of all(".choice")) {
  const select = choice.querySelector("select");
  choose(choice, 0);
  select.addEventListener("change", () => {
    choose(choice, select.selectedIndex);
    remember(choice.id, select.selectedIndex ? String(select.selectedIndex) : "");
  });
}

// A cell of a map shows the rows of the tables that belong to it. Arrow keys go from cell to cell.
function pick(figure, key) {
  const cells = all(".pick", figure).filter((cell) => cell.dataset.key === key);
  all(".chosen", figure).forEach((cell) => cell.classList.remove("chosen"));
  const panel = figure.querySelector(".picked");
  panel.replaceChildren();
  if (!cells.length) return;
  cells.forEach((cell) => cell.classList.add("chosen"));
  panel.append(make("p", {}, make("strong", { textContent: cells[0].querySelector("title").textContent })));
  const found = all("figure.table tbody tr[data-cells]").filter((row) => row.dataset.cells.split(" ").includes(key));
  if (!found.length) panel.append(make("p", { textContent: "None of the rows in the tables of this page is of this cell." }));
  for (const source of new Set(found.map((row) => row.closest("table")))) {
    const heads = [...source.tHead.rows[0].cells].map((head) => make("th", { className: head.className, textContent: head.textContent }));
    const rows = found.filter((row) => row.closest("table") === source).map((row) => row.cloneNode(true));
    rows.forEach((row) => { row.hidden = false; });
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
    panel.append(make("div", { className: "scroll" }, table));
  }
  overflowing();
}
for (const figure of all("figure.chart")) {
  const first = all("svg", figure).map((svg) => svg.querySelector(".pick")).filter(Boolean);
  first.forEach((cell) => cell.setAttribute("tabindex", "0"));
  const act = (cell) => {
    pick(figure, cell.dataset.key);
    remember("pick", `${figure.id} ${cell.dataset.key}`);
  };
  figure.addEventListener("click", (event) => {
    const cell = event.target.closest(".pick");
    if (cell) act(cell);
  });
  figure.addEventListener("keydown", (event) => {
    const cell = event.target.closest(".pick");
    if (!cell) return;
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (event.key === "Enter" || event.key === " ") act(cell);
    else if (step) move(cell, step);
    else return;
    event.preventDefault();
  });
}
function move(cell, [down, right]) {
  const cells = all(".pick", cell.closest("svg"));
  let [r, c] = [Number(cell.dataset.r), Number(cell.dataset.c)];
  for (let tries = 0; tries < 200; tries += 1) { // over the gaps
    [r, c] = [r + down, c + right];
    const next = cells.find((other) => Number(other.dataset.r) === r && Number(other.dataset.c) === c);
    if (!next) continue;
    cells.forEach((other) => other.setAttribute("tabindex", "-1"));
    next.setAttribute("tabindex", "0");
    next.focus();
    return;
  }
}

// A graph: a node under the pointer or with the focus stands out with its edges; Enter keeps it, and lists them.
for (const figure of all("figure.chart")) {
  const svg = figure.querySelector(".graph svg");
  if (!svg) continue;
  const nodes = all(".node", svg);
  const edges = all(".edge", svg).map((path) => ({ path, up: Number(path.dataset.up), down: Number(path.dataset.down), weight: Number(path.dataset.weight) }));
  const around = nodes.map(() => []);
  edges.forEach((edge) => { around[edge.up].push(edge); around[edge.down].push(edge); });
  const largest = Math.max(0, ...edges.map((edge) => Math.abs(edge.weight)));
  const panel = figure.querySelector(".picked");
  let [chosen, lit] = [-1, []];
  const show = (i) => {
    lit.forEach((element) => element.classList.remove("lit"));
    svg.classList.toggle("dimmed", i >= 0);
    lit = i < 0 ? [] : [nodes[i], ...around[i].flatMap((edge) => [edge.path, nodes[edge.up], nodes[edge.down]])];
    lit.forEach((element) => element.classList.add("lit"));
  };
  const listed = (title, some, end) => {
    if (!some.length) return [];
    some.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
    const items = some.map((edge) => make("li", {}, make("span", { textContent: nodes[edge[end]].dataset.name }), make("span", { textContent: edge.path.dataset.text })));
    return [make("strong", { textContent: title }), make("ul", {}, ...items)];
  };
  const choose = (i) => {
    nodes.forEach((node, j) => node.classList.toggle("chosen", j === i));
    chosen = i;
    show(i);
    panel.replaceChildren();
    if (i < 0) return;
    panel.append(make("p", {}, make("strong", { textContent: nodes[i].querySelector("title").textContent })));
    if (nodes[i].dataset.anchor) panel.append(make("p", {}, make("a", { href: `#${nodes[i].dataset.anchor}`, textContent: "Its card" })));
    panel.append(...listed("Edges into it", around[i].filter((edge) => edge.down === i), "up"));
    panel.append(...listed("Edges out of it", around[i].filter((edge) => edge.up === i), "down"));
  };
  const of = (event) => nodes.indexOf(event.target.closest(".node"));
  svg.addEventListener("pointerover", (event) => { if (of(event) >= 0) show(of(event)); });
  svg.addEventListener("pointerleave", () => show(chosen));
  svg.addEventListener("focusin", (event) => show(of(event)));
  svg.addEventListener("focusout", () => show(chosen));
  svg.addEventListener("click", (event) => choose(of(event) === chosen ? -1 : of(event)));
  const place = (node) => [Number(node.dataset.x), Number(node.dataset.y)];
  const next = (i, [right, down]) => {
    const [x, y] = place(nodes[i]);
    const score = (node) => {
      const [dx, dy] = [place(node)[0] - x, place(node)[1] - y];
      const [ahead, aside] = right ? [dx * right, Math.abs(dy)] : [dy * down, Math.abs(dx)];
      return ahead > 0 ? ahead + 3 * aside : Infinity;
    };
    const best = nodes.reduce((a, b) => (score(b) < score(a) ? b : a));
    return score(best) < Infinity ? best : nodes[i];
  };
  svg.addEventListener("keydown", (event) => {
    const i = of(event);
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (event.key === "Enter" || event.key === " ") choose(i === chosen ? -1 : i);
    else if (event.key === "Escape") choose(-1);
    else if (step) {
      const target = next(i, step);
      nodes.forEach((node) => node.setAttribute("tabindex", node === target ? "0" : "-1"));
      target.focus();
    } else return;
    event.preventDefault();
  });
  nodes[0]?.setAttribute("tabindex", "0");
  const slider = figure.querySelector("input.least");
  const cut = () => {
    const least = largest * (Number(slider.value) / 100) ** 2; // weights are many and small, few and large
    let shown = 0;
    for (const edge of edges) {
      const hidden = Math.abs(edge.weight) < least;
      edge.path.classList.toggle("hidden", hidden);
      shown += hidden ? 0 : 1;
    }
    figure.querySelector("output").textContent = `${least ? least.toPrecision(2) : 0}: ${shown} of ${edges.length} edges`;
  };
  slider.addEventListener("input", () => { cut(); remember(`${figure.id}.w`, slider.value === "0" ? "" : slider.value); });
  const kept = state.get(`${figure.id}.w`);
  if (kept !== null) slider.value = kept;
  cut();
}

// A figure as a file: the drawing with its title, its legend and a style of its own.
function drawn(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}
function standalone(figure) {
  const shown = all(".drawing svg", figure).find((svg) => svg.getClientRects().length);
  const box = shown.viewBox.baseVal;
  const body = drawn("g", { class: "chart", transform: "translate(20 20)" });
  let top = 0;
  const title = figure.querySelector("h3, h4")?.textContent;
  if (title) {
    body.append(drawn("text", { y: 14, class: "title" }, title));
    top = 34;
  }
  for (const entry of all(".legend li", figure)) {
    const key = drawn("g", { class: entry.className, transform: `translate(0 ${top})` });
    const sign = entry.querySelector("svg").firstElementChild.cloneNode(true);
    sign.classList.replace("swatch", "bar");
    key.append(sign, drawn("text", { x: 32, y: 9, class: "name" }, entry.textContent.trim()));
    body.append(key);
    top += 20;
  }
  const inner = drawn("g", { transform: `translate(0 ${top + (top ? 6 : 0)})` });
  inner.append(...[...shown.childNodes].map((node) => node.cloneNode(true)));
  body.append(inner);
  const [width, height] = [box.width + 40, box.height + top + 46];
  const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  svg.append(drawn("style", {}, document.querySelector("#figure-style").content.textContent),
    drawn("rect", { width: "100%", height: "100%", class: "paper" }), body);
  return new XMLSerializer().serializeToString(svg);
}
for (const button of all("button.save")) {
  button.addEventListener("click", () => {
    const figure = button.closest("figure");
    const address = URL.createObjectURL(new Blob([standalone(figure)], { type: "image/svg+xml" }));
    const name = (figure.querySelector("h3, h4")?.textContent ?? "figure").replace(/[^\w.-]+/g, "-").slice(0, 60);
    make("a", { href: address, download: `${name}.svg` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
}

// What is wider than the page says so.
function overflowing() {
  for (const box of all(".scroll")) {
    box.classList.toggle("wider", box.scrollWidth > box.clientWidth + 1);
    box.classList.toggle("taller", box.scrollHeight > box.clientHeight + 1);
    if (box.matches(".drawing.wider:not(.graph)")) ashore(box);
    box.tabIndex = box.matches(".wider, .taller") ? 0 : -1; // the keyboard stops at what it can scroll
  }
}
window.addEventListener("resize", overflowing);
// A map that scrolls keeps the names of its rows in sight, and begins where its first number stands.
function ashore(box) {
  const svg = box.querySelector("svg");
  const labels = all("text.name", svg);
  const shown = all(".mark", svg).filter((cell) => cell.querySelector("rect:not(.plate, .none)") ?? cell.matches(".pick"));
  if (box.querySelector(".names") || !labels.length) return;
  const width = Math.max(...labels.map((text) => Number(text.getAttribute("x")))) + 8;
  const height = svg.viewBox.baseVal.height;
  const names = drawn("svg", { class: "names", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const first = Math.min(...all("rect.plate", svg).map((plate) => Number(plate.getAttribute("y"))));
  names.append(drawn("rect", { y: first - 3, width, height: height - first + 3, class: "paper" }));
  for (const text of labels) {
    const name = (text.closest("a") ?? text).cloneNode(true);
    name.setAttribute("tabindex", "-1");
    names.append(name);
  }
  svg.after(names);
  const left = Math.min(...shown.map((cell) => Number(cell.querySelector(".plate").getAttribute("x"))));
  if (Number.isFinite(left) && left > box.clientWidth - 40) box.scrollLeft = left - width - 4;
}

// Cards: a link to one unfolds it.
for (const card of all("details.card")) {
  card.addEventListener("toggle", () => {
    overflowing();
    remember("open", all("details.card[open]").map((one) => one.id).join(" "));
  });
}
// Four or more are searched, in all that they say, and sorted: by name, or by how often they fire as their line says.
for (const section of all("section")) {
  const cards = all(":scope > details.card", section);
  if (cards.length < 4) continue;
  const name = (card) => card.querySelector("h3").textContent;
  const rate = (card) => Number(card.querySelector("summary span")?.textContent.match(/fires at ([\d.]+)/)?.[1] ?? -1);
  const orders = [
    ["as listed", () => 0],
    ["name", (a, b) => name(a).localeCompare(name(b), "en", { numeric: true })],
    ["how often they fire", (a, b) => rate(b) - rate(a)],
  ];
  const query = make("input", { type: "search", autocomplete: "off", spellcheck: false });
  const order = make("select", { autocomplete: "off" }, ...orders.map(([label]) => make("option", { textContent: label })));
  const count = make("span", { className: "count" });
  count.setAttribute("aria-live", "polite");
  const tools = make("div", { className: "tools" }, make("label", {}, "Search cards ", query), make("label", {}, "Sort by ", order), count);
  const end = document.createComment("");
  cards[0].before(tools);
  cards.at(-1).after(end);
  const show = () => {
    const wanted = query.value.trim().toLowerCase();
    for (const card of [...cards].sort(orders[order.selectedIndex][1])) {
      card.hidden = !card.textContent.toLowerCase().includes(wanted);
      section.insertBefore(card, end);
    }
    count.textContent = wanted ? `${cards.filter((card) => !card.hidden).length} of ${cards.length}` : "";
  };
  query.value = state.get(`${section.id}.cq`) ?? "";
  order.selectedIndex = Math.min(Number(state.get(`${section.id}.cs`)) || 0, orders.length - 1);
  query.addEventListener("input", () => { show(); remember(`${section.id}.cq`, query.value); });
  order.addEventListener("change", () => { show(); remember(`${section.id}.cs`, order.selectedIndex ? String(order.selectedIndex) : ""); });
  show();
}
function go(name) {
  const target = name && document.getElementById(name);
  if (!target) return;
  const card = target.closest("details.card");
  if (card) { card.open = true; card.hidden = false; }
  target.scrollIntoView();
  (card?.querySelector("summary") ?? target).focus({ preventScroll: true });
}
window.addEventListener("hashchange", () => { // a link of this page: its place, and all the rest as it was
  anchor = location.hash.slice(1).split("&")[0];
  write();
  go(anchor);
});

// The view that the address describes.
for (const [key, value] of [...state]) {
  const [id, part] = key.split(".");
  const found = document.getElementById(id);
  if (part === "s" && found?.querySelector("thead")) {
    const column = parseInt(value, 10);
    if (found.querySelector("thead").rows[0].cells[column]) sort(found.querySelector("table"), column, value.endsWith("a"));
  } else if (part === "q" && found?.querySelector("input")) {
    found.querySelector("input").value = value;
    filter(found, value);
  } else if (key === "open") {
    value.split(" ").forEach((name) => { if (document.getElementById(name)?.matches("details.card")) document.getElementById(name).open = true; });
  } else if (key === "pick") {
    const figure = document.getElementById(value.split(" ")[0]);
    if (figure?.querySelector(".picked")) pick(figure, value.split(" ")[1]);
  } else if (found?.matches(".choice")) {
    choose(found, Number(value));
  }
}
go(anchor);
overflowing();

// The contents show where one is.
const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "0px 0px -75% 0px" });
all("main section").forEach((section) => seen.observe(section));

// Paper has nothing to unfold: of cards there are those that are open, and the line of each; the numbers behind figures
// stay away, and of long tables there is the top.
const PAPER = 20; // rows
let folded = [];
function toPaper() {
  folded = all("details.about:not([open])");
  folded.forEach((part) => { part.open = true; });
  for (const figure of all("figure.table")) {
    const rows = [...figure.querySelector("tbody").rows].filter((row) => !row.hidden);
    rows.slice(PAPER).forEach((row) => row.classList.add("offpaper"));
    if (rows.length > PAPER) {
      const said = `The first ${PAPER} of ${rows.length} rows; the others are in the page itself.`;
      figure.querySelector(".scroll").after(make("p", { className: "onpaper", textContent: said }));
    }
  }
}
function fromPaper() {
  folded.forEach((part) => { part.open = false; });
  all("tr.offpaper").forEach((row) => row.classList.remove("offpaper"));
  all("p.onpaper").forEach((note) => note.remove());
}
window.addEventListener("beforeprint", toPaper);
window.addEventListener("afterprint", fromPaper);
