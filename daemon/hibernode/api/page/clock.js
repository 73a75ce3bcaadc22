// The server's time, and the times on the screen that count up. Clocks of browsers are wrong by minutes; ages must not be.

import { say, set } from "./dom.js";
import { age, elapsed, moment, NONE } from "./format.js";

let skew = 0; // milliseconds the server is ahead

export const now = () => Date.now() + skew;

/** `Date` of an answer: it has whole seconds and was on its way, so that small differences mean nothing. */
export function heard(date) {
  const ahead = Date.parse(date ?? "") + 500 - Date.now();
  if (Number.isFinite(ahead)) skew = Math.abs(ahead) > 2000 ? ahead : 0;
}

const WORDS = { age, elapsed };

function show(node) {
  const then = Date.parse(node.dateTime);
  say(node, Number.isNaN(then) ? NONE : WORDS[node.dataset.tick]((now() - then) / 1000));
}

/** Let a <time> say how long ago `iso` is (`age`), or how long it has taken since (`elapsed`). */
export function tick(node, iso, how = "age") {
  set(node, "datetime", iso ?? "");
  set(node, "data-tick", how);
  set(node, "title", moment(iso));
  show(node);
}

/** The same <time>, which stands still now. */
export function still(node, text) {
  set(node, "data-tick", null);
  set(node, "title", null);
  say(node, text);
}

setInterval(() => {
  if (!document.hidden) document.querySelectorAll("time[data-tick]").forEach(show);
}, 1000);
