// Pieces that several views show: a status, a bar, a table, an error, a list of facts. Each is {node, update}.

import { tick } from "./clock.js";
import { el, list, say, set } from "./dom.js";
import { many, NONE, size, sizes, words } from "./format.js";

export const ended = (action) => action.status === "ready" || action.status === "error";
const SHAPES = new Set(["initialized", "processing", "checkpoint_created", "ready", "error", "alive", "silent"]);

/** Shape, word and colour: each says it alone. */
export function mark() {
  const use = el("use"), word = el("span"), own = el("small");
  const shape = el("svg", { class: "shape", "aria-hidden": "true" }, use);
  const node = el("span", { class: "mark" }, shape, el("span", {}, word, " ", own));
  return {
    node,
    update(status, provisional = false) {
      set(use, "href", `#shape-${SHAPES.has(status) ? status : "initialized"}`);
      set(node, "data-status", status);
      say(word, words(status));
      say(own, provisional ? "provisional" : "");
    },
  };
}

/** A part of a whole, as a rectangle: its width is an attribute, no style. */
export function bar() {
  const fill = el("rect", { class: "fill", height: "100%" });
  const track = el("rect", { class: "track", width: "100%", height: "100%" });
  const node = el("svg", { class: "bar", "aria-hidden": "true" }, track, fill);
  return { node, update: (share) => set(fill, "width", `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(2)}%`) };
}

/** Phase and percent of a running action; `long` also says bytes and seconds. */
export function progress({ long = false } = {}) {
  const picture = bar(), text = el("span", { class: "num" });
  const role = { role: "progressbar", "aria-label": "progress", "aria-valuemin": "0", "aria-valuemax": "100" };
  const node = el("div", { class: "progress", ...role },
    picture.node, text);
  return {
    node,
    update({ phase, bytes_done: done, bytes_total: total, stored_bytes: stored, seconds }) {
      const share = total > 0 ? Math.min(1, done / total) : null;
      const percent = share === null ? "" : ` ${Math.floor(100 * share)} %`;
      picture.update(share ?? 0);
      set(node, "aria-valuenow", share === null ? null : Math.floor(100 * share));
      set(node, "aria-valuetext", `${phase}${percent}`);
      const more = [`${phase}${percent}`];
      if (long) {
        if (total > 0) more.push(sizes(done ?? 0, total));
        if (stored > 0) more.push(`${size(stored)} stored`);
        if (seconds > 0) more.push(`${seconds.toFixed(1)} s`);
      }
      say(text, more.join(" · "));
    },
  };
}

// Cells of a table: a function that makes one, for a row.

export const text = (of) => () => {
  const node = document.createTextNode("");
  return { node, update: (item) => say(node, of(item) ?? NONE) };
};

export const ago = (of) => () => {
  const node = el("time");
  return { node, update: (item) => tick(node, of(item)) };
};

/** Where a row leads. No stop of its own: the row is one. */
export const anchor = (of, href) => () => {
  const node = el("a", { tabindex: "-1" });
  return { node, update: (item) => { say(node, of(item)); set(node, "href", href(item)); } };
};

export const button = (label, name, press) => () => {
  let now;
  const node = el("button", { type: "button", onclick: () => press(now) }, label);
  return { node, update: (item) => { now = item; set(node, "aria-label", name(item)); } };
};

const look = ({ num, tight, name }) => num ? "num" : tight ? "tight" : name ? "name" : null;

/** Columns are {label, cell}, and num, tight (never broken) or name (broken anywhere). With `open(item)`, a row is a stop for Tab,
 * Enter opens it and arrows walk. Roles are spelt out
 * because a narrow page lays rows out as cards, and then they would be lost. */
export function table({ label, columns, key, open = null, row: mine = null }) {
  const items = new WeakMap();
  const body = el("tbody", { role: "rowgroup" });
  const node = el("table", { role: "table", "aria-label": label, class: open ? "rows open" : "rows", hidden: true },
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, columns.map(({ label: name, num }) =>
      el("th", { scope: "col", role: "columnheader", class: num ? "num" : null },
        name === "" ? el("span", { class: "unseen" }, "what to do") : name)))),
    body);
  const update = list(body, key, () => {
    const cells = columns.map(({ cell }) => cell());
    const row = el("tr", { role: "row", tabindex: open ? "0" : null }, cells.map((cell, at) =>
      el("td", { role: "cell", class: look(columns[at]), "data-label": columns[at].label || null }, cell.node)));
    return {
      node: row,
      update(item) {
        items.set(row, item);
        cells.forEach((cell) => cell.update(item));
        mine?.(row, item);
      },
    };
  });
  if (open) {
    body.addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (row && !event.target.closest("a, button") && getSelection().isCollapsed) open(items.get(row));
    });
    body.addEventListener("keydown", (event) => {
      const row = event.target;
      if (!items.has(row) || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Enter") open(items.get(row));
      else if (event.key === "ArrowDown") row.nextElementSibling?.focus();
      else if (event.key === "ArrowUp") row.previousElementSibling?.focus();
      else if (event.key === "Home") body.firstElementChild.focus();
      else if (event.key === "End") body.lastElementChild.focus();
      else return;
      event.preventDefault();
    });
  }
  return { node, body, update };
}

/** Names and values; a value is a string, or {text, href}, or {since} for an age. */
export function facts(label) {
  const node = el("dl", { class: "facts", "aria-label": label });
  const key = ([name, value]) => `${name} ${typeof value === "object" ? Object.keys(value)[0] : ""}`; // another form, another element
  const update = list(node, key, ([name, value]) => {
    const inner = typeof value !== "object" ? el("span") : "since" in value ? el("time") : el("a");
    return {
      node: el("div", {}, el("dt", {}, name), el("dd", {}, inner)),
      update([, now]) {
        if (typeof now !== "object") say(inner, now);
        else if ("since" in now) tick(inner, now.since);
        else { say(inner, now.text); set(inner, "href", now.href); }
      },
    };
  });
  return { node, update: (pairs) => update(pairs.filter(Boolean)) };
}

const FIRST = ["property", "found", "wanted"];
const SAID = new Set(["code", "message", "hint", "retry", ...FIRST]);
const plain = (value) => typeof value === "string" ? value : JSON.stringify(value);

/** What went wrong, and what to do: code, message, hint, then every detail. */
export function failure() {
  const code = el("code"), message = el("p", { class: "message" }), hint = el("p", { class: "hint" });
  const retry = el("p", { hidden: true }, "The same command may succeed later.");
  const rest = el("dl", { class: "details" });
  const node = el("div", { class: "failure", role: "alert", hidden: true },
    el("p", { class: "code" }, code), message, hint, retry, rest);
  const details = list(rest, ([name]) => name, ([name]) => {
    const value = el("dd");
    return { node: el("div", {}, el("dt", {}, words(name)), value), update: ([, now]) => say(value, plain(now)) };
  });
  return {
    node,
    update(error) {
      set(node, "hidden", !error);
      if (!error) return;
      say(code, error.code ?? "error");
      say(message, error.message ?? "");
      say(hint, error.hint ?? "");
      set(hint, "hidden", !error.hint);
      set(retry, "hidden", error.retry !== true);
      const first = FIRST.filter((name) => error[name] !== undefined && error[name] !== null);
      const names = [...first, ...Object.keys(error).filter((name) => !SAID.has(name))];
      details(names.map((name) => [name, error[name]]));
      set(rest, "hidden", names.length === 0);
    },
  };
}

export const PLAIN = { autocomplete: "off", spellcheck: "false" }; // of a field for names
export const empty = (...children) => el("div", { class: "empty", hidden: true }, ...children);
export const heading = (words_, ...more) => el("div", { class: "heading" }, el("h1", { tabindex: "-1" }, words_), ...more);

/** Links to the page after this one and back to the newest. */
export function paging(what) {
  const newest = el("a", { class: "button", hidden: true }, "Newest"), older = el("a", { class: "button", hidden: true }, "Older");
  const count = el("span", { class: "muted" });
  const node = el("nav", { class: "paging", "aria-label": `Pages of ${what}` }, newest, older, count);
  return {
    node,
    update({ shown, first, next }) {
      set(newest, "href", first);
      set(newest, "hidden", !first);
      set(older, "href", next);
      set(older, "hidden", !next);
      say(count, many(shown, what.slice(0, -1)));
    },
  };
}
