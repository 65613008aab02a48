"use strict";
// The page's state is what stands in its address, after the #; texts from the model are only ever set as text.

const $ = (id) => document.getElementById(id);
const FIELDS = ["prompt", "latent", "act", "strength", "positions", "at", "max_new_tokens", "temperature", "seed", "other", "what", "where", "site", "query"];
const NUMBERS = new Set(["strength", "at", "max_new_tokens", "temperature", "seed"]);
const WAIT = 120; // milliseconds after a change before it is asked about
let begin = {
  prompt: "", chat: false, latent: "", act: "add", strength: 1, positions: "all", at: -1, max_new_tokens: 60,
  temperature: 0, seed: 0, other: "", what: "latents", where: "last", site: "", query: "",
};
let state = {}, facts = {}, lastRead = null, listed = [], unit = [];
const asking = {}, timers = {}, places = {}, waiting = new Set();

async function ask(name, body, tell) {
  if (asking[name]) asking[name].abort();
  const control = (asking[name] = new AbortController());
  const started = performance.now();
  places[name] = 0;
  const done = () => { if (asking[name] === control) { delete asking[name]; delete places[name]; showStatus(); } };
  try {
    const answer = await fetch("ask/" + name, { method: "POST", body: JSON.stringify(body), signal: control.signal });
    if (!answer.ok) throw new Error(await answer.text());
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done: ended } = await reader.read();
      const lines = (rest + (value || "")).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const message = JSON.parse(line);
        if (control.signal.aborted) return;
        if ("place" in message) { places[name] = message.place; showStatus(); }
        else tell(message);
      }
      if (ended) break;
    }
    performance.measure(name, { start: started });
  } catch (error) {
    if (error.name === "AbortError") return;
    tell({ error: navigator.onLine && error instanceof TypeError ? "saepatch play has ended, or cannot be reached." : error.message });
  } finally { done(); }
}

function showStatus(note) {
  const most = Math.max(0, ...Object.values(places)), busy = Object.keys(asking).length + waiting.size > 0;
  document.documentElement.dataset.state = busy ? "asking" : "idle";
  $("status").textContent = note || (most ? `waiting: ${most} before you` : busy ? "…" : "");
}

function error(where, message) { $(where + "-error").textContent = message.error || ""; return Boolean(message.error); }

function make(kind, text, attributes = {}) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function round(value) {
  return value === 0 ? "0" : Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(2);
}

// State and address

function fill() {
  for (const field of FIELDS) if ($(field) && String($(field).value) !== String(state[field])) $(field).value = state[field];
  $("chat").checked = state.chat;
  $("strength").disabled = state.act === "ablate";
  $("strength-says").textContent = state.act === "ablate" ? "–" : `× ${Number(state.strength).toFixed(2)}`;
  $("temperature-says").textContent = state.temperature > 0 ? Number(state.temperature).toFixed(1) : "greedy";
  const tokens = lastRead ? lastRead.tokens : [];
  $("at").max = Math.max(0, tokens.length - 1);
  $("at-says").textContent = chosen() >= 0 && tokens.length ? `${chosen()} ${tokens[chosen()] || ""}` : "none";
}

function chosen() { return lastRead ? Math.min(state.at, lastRead.tokens.length - 1) : state.at; }

function keep() {
  const differs = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (String(value) !== String(begin[name])) differs.set(name, value);
  const text = differs.toString();
  history.replaceState(null, "", text ? "#" + text : location.pathname);
}

function fromAddress() {
  state = { ...begin };
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (!(name in begin)) continue;
    state[name] = NUMBERS.has(name) ? Number(value) || 0 : name === "chat" ? value === "true" : value;
  }
  if (!(state.site in facts.sites)) state.site = Object.keys(facts.sites)[0];
}

function set(changed) {
  Object.assign(state, changed);
  fill();
  keep();
  const has = (...names) => names.some((name) => name in changed);
  if (has("prompt", "chat", "latent", "act", "strength", "positions", "max_new_tokens", "temperature", "seed") || (has("at") && state.positions === "chosen")) later("answer", answer);
  if (has("prompt", "chat", "latent", "site")) later("read", read);
  if (has("query", "site")) later("search", search);
  if (has("latent")) later("card", card);
  if (has("prompt", "chat", "latent", "other", "what", "where", "site") || (has("at") && (state.where === "chosen" || state.what === "active"))) later("patch", patch);
  if (has("at")) { showTokens(); showList(); }
}

function later(name, work) {
  clearTimeout(timers[name]);
  waiting.add(name);
  showStatus();
  timers[name] = setTimeout(() => { waiting.delete(name); work(); showStatus(); }, WAIT);
}

// Questions

function positions(name) { return name === "chosen" ? String(Math.max(0, chosen())) : name; }

function answer() {
  const { prompt, chat, latent, act, max_new_tokens, temperature, seed } = state;
  $("edit-says").textContent = latent + (act === "ablate" ? " at 0" : act === "add" ? ` + ${round(Number(state.strength))}` : ` = ${round(Number(state.strength))}`);
  error("answer", {});
  ask("answer", { prompt, chat, latent, act, strength: Number(state.strength), positions: positions(state.positions), max_new_tokens, temperature, seed }, (message) => {
    if (error("answer", message)) return;
    if (message.texts) ["before", "after"].forEach((id, i) => showText(id, message.texts[i], message.ended[i]));
    if (message.coloured) {
      const most = Math.max(1e-9, ...message.coloured.flat().map(([, act]) => Math.abs(act)));
      ["before", "after"].forEach((id, i) => colour(id, message.coloured[i], most));
      unit = message.unit;
      showExport("answer", message);
    }
  });
}

const ENDED = { loop: " … repeats itself", length: " …", context: " … the context is full" };

function showText(id, text, ended) {
  $(id).replaceChildren(make("bdi", text));
  if (ENDED[ended]) $(id).append(make("small", ENDED[ended]));
}

function colour(id, tokens, most) {
  const end = $(id).querySelector("small");
  $(id).replaceChildren(...tokens.map(([text, act]) => {
    const token = make("span", text.replaceAll("␣", " "), { class: "token", title: `${round(act)}` });
    token.style.setProperty("--strength", `${Math.round((50 * Math.abs(act)) / most)}%`);
    return token;
  }));
  if (end) $(id).append(end);
}

function showExport(name, message) {
  $(name + "-command").textContent = message.command || "# no command: the answers are no two different tokens";
  $(name + "-python").textContent = message.python;
}

function read() {
  ask("read", { prompt: state.prompt, chat: state.chat, site: state.site, latent: state.latent }, (message) => {
    if (error("read", message)) return;
    lastRead = message;
    showTokens();
    fill();
    showList();
  });
}

function showTokens() {
  if (!lastRead) return;
  const most = Math.max(1e-9, ...lastRead.acts.map(Math.abs));
  const pressed = chosen(), had = document.activeElement && document.activeElement.dataset.at;
  $("tokens").replaceChildren(...lastRead.tokens.map((text, at) => {
    const token = make("button", text, { type: "button", class: "token", "aria-pressed": at === pressed, title: round(lastRead.acts[at]), "data-at": at });
    token.style.setProperty("--strength", `${Math.round((50 * Math.abs(lastRead.acts[at])) / most)}%`);
    token.addEventListener("click", () => set({ at: state.at === at ? -1 : at }));
    return token;
  }));
  if (had !== undefined) { const again = $("tokens").querySelector(`[data-at="${Number(had)}"]`); if (again) again.focus(); }
}

function search() {
  if (!state.query.trim()) { listed = []; showList(); return; }
  ask("search", { site: state.site, text: state.query }, (message) => {
    if (error("search", message)) return;
    if (message.note) { showStatus(message.note); return; }
    listed = message.latents;
    $("list-title").textContent = `${message.found} latents raise “${state.query.trim()}”` + (message.found > listed.length ? `, ${listed.length} shown` : "");
    rows(listed);
  });
}

function showList() {
  if (state.query.trim()) return;
  if (!lastRead) return;
  const at = chosen();
  const latents = at >= 0 ? lastRead.at[at] || [] : lastRead.latents;
  $("list-title").textContent = at >= 0 ? `Active at token ${at}, “${lastRead.tokens[at]}”` + (latents.length ? "" : ": none") : "Most active in the prompt";
  rows(latents);
}

function picked() {
  const [site, ids] = state.latent.split(":");
  return { site: (site || "").trim(), ids: (ids || "").split(",").map((id) => id.trim()).filter(Boolean) };
}

function rows(latents) {
  const now = picked();
  $("list").replaceChildren(...latents.map(({ latent, names, act }) => {
    const on = now.site === state.site && now.ids.includes(String(latent));
    const row = make("li"), pick = make("button", undefined, { type: "button", class: "pick", "aria-pressed": on });
    pick.append(make("span", String(latent)), make("bdi", names.join(" ") || "–", { class: "model" }), make("span", act === undefined ? "" : round(act), { class: "amount" }));
    pick.addEventListener("click", () => { set({ latent: `${state.site}:${latent}` }); rows(latents); });
    const also = make("button", on ? "−" : "+", { type: "button", class: "also", "aria-label": `${on ? "Leave out" : "Add"} latent ${latent}` });
    also.addEventListener("click", () => {
      const ids = now.site === state.site ? now.ids : [];
      const next = on ? ids.filter((id) => id !== String(latent)) : [...ids, String(latent)];
      if (next.length) set({ latent: `${state.site}:${next.join(",")}` });
      rows(latents);
    });
    row.append(pick, also);
    return row;
  }));
}

function card() {
  const now = picked();
  if (!(now.site in facts.sites) || !/^\d+$/.test(now.ids[0] || "")) { $("card").replaceChildren(); return; }
  const shown = (state.query.trim() ? listed : lastRead ? lastRead.latents : []).map(({ latent }) => latent);
  ask("card", { site: now.site, latent: `${now.site}:${now.ids[0]}`, beside: now.site === state.site ? shown : [], prompt: state.prompt, chat: state.chat }, (message) => {
    if (error("card", message) || !message.html) return;
    $("card").innerHTML = message.html; // made by the report's own escaping templates
    for (const wide of $("card").querySelectorAll(".scroll")) wide.tabIndex = 0;
  });
}

function patch() {
  if (!state.other.trim() || !state.prompt.trim()) { $("next").replaceChildren(); $("moved").textContent = ""; return; }
  const at = Math.max(0, chosen()), now = picked();
  const active = lastRead && lastRead.at[at] ? lastRead.at[at].map(({ latent }) => latent) : [];
  const latent = state.what === "active" && active.length ? `${state.site}:${active.join(",")}` : state.latent;
  const site = latent.split(":")[0].trim();
  ask("patch", { prompt: state.prompt, chat: state.chat, other: state.other, site, latent, positions: positions(state.where) }, (message) => {
    if (error("patch", message)) { $("next").replaceChildren(); $("moved").textContent = ""; return; }
    const [answer, counter] = message.pair;
    $("moved").textContent = message.share === null
      ? "No share: both prompts are answered alike, or not by single tokens."
      : `The patch moves the logit difference ${Math.round(100 * message.share)}\u00a0% of the way from “${counter}”, this prompt's answer, to “${answer}”, the other's.`;
    const titles = ["this prompt", "with latents of the other", "the other prompt"];
    $("next").replaceChildren(...titles.map((title, i) => {
      const column = make("div"), list = make("ol", undefined, { class: "next" });
      for (const [token, p] of message.next[i]) {
        const item = make("li"), bar = make("span", undefined, { class: "bar" });
        bar.style.setProperty("--share", `${100 * p}%`);
        item.append(make("bdi", token, { class: "model" }), bar, make("span", p < 0.0005 ? "<\u20090.1\u00a0%" : `${(100 * p).toFixed(1)}\u00a0%`, { class: "amount" }));
        list.append(item);
      }
      column.append(make("h3", title), list, make("p", message.texts[i], { class: "text" }));
      return column;
    }));
    showExport("patch", message);
  });
}

// Beginning

function listen() {
  for (const field of FIELDS) {
    const kind = $(field).tagName === "SELECT" ? "change" : "input";
    $(field).addEventListener(kind, () => set({ [field]: NUMBERS.has(field) ? Number($(field).value) : $(field).value }));
  }
  $("chat").addEventListener("change", () => set({ chat: $("chat").checked }));
  $("again").addEventListener("click", () => { state = { ...begin }; set({ ...begin }); });
  $("share").addEventListener("click", () => copy(location.href, $("share")));
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy($(button.dataset.copy).textContent, button));
  $("card").addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#latent-"]');
    if (!link) return;
    event.preventDefault();
    const [, site, latent] = link.getAttribute("href").match(/^#latent-(.+)-(\d+)$/);
    set({ latent: `${site}:${latent}` });
  });
  addEventListener("hashchange", () => { fromAddress(); set({ ...state }); });
}

async function copy(text, button) {
  const before = button.textContent;
  try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
  catch { button.textContent = "Copying is not allowed here"; }
  setTimeout(() => { button.textContent = before; }, 1500);
}

ask("about", {}, (message) => {
  if (error("read", message)) return;
  facts = message;
  const latent = message.begin.latent;
  begin = { ...begin, ...message.begin, site: latent.split(":")[0] };
  $("about").textContent = message.model + (message.unit ? ` · strength 1 is a latent's ${message.unit}` : " · strengths are plain activations");
  $("chats").hidden = !message.chats;
  $("site").replaceChildren(...Object.entries(message.sites).map(([site, count]) => make("option", `${site} (${count.toLocaleString("en")})`, { value: site })));
  fromAddress();
  listen();
  set({ ...state });
});
