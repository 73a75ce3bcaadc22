// Whether the API answers, and the banner that says so when it does not.

import { now } from "./clock.js";
import { announce, el, say, set } from "./dom.js";
import { clock, elapsed } from "./format.js";

const BACKOFF = [2, 4, 8, 15, 30]; // seconds

/** Says `again` when it is worth asking now: somebody wants it, a token is there, the network is back. */
export const connection = new EventTarget();

let since = null; // of the silence, in the server's time
let heardAt = null;
let why = "";
let tries = 0;
let nextAt = 0;
let locked = false; // the API wants a token first

export const wantsToken = () => locked;

export function answered() {
  if (since !== null) announce("The API answers again.");
  heardAt = now();
  since = null;
  tries = 0;
  show();
}

/** Nobody answered: milliseconds until the next try. */
export function lost(error) {
  since ??= heardAt ?? now();
  why = error.message;
  const wait = 1000 * BACKOFF[Math.min(tries, BACKOFF.length - 1)];
  tries += 1;
  nextAt = Date.now() + wait;
  show();
  return wait;
}

export function lock(refused) {
  locked = true;
  show();
  want(refused);
}

const want = (refused) => connection.dispatchEvent(new CustomEvent("locked", { detail: refused }));

export function unlock() {
  locked = false;
  again();
}

function again() {
  tries = 0;
  show();
  connection.dispatchEvent(new Event("again"));
}

const silence = el("p");
const next = el("span", { "aria-hidden": "true", class: "num" }); // counts down each second: nobody wants to hear that
const line = el("div", { class: "banner bad", hidden: true },
  silence, next, el("button", { type: "button", onclick: again }, "Try now"));
const door = el("div", { class: "banner", hidden: true },
  el("p", {}, "The API wants a token."),
  el("button", { type: "button", onclick: () => want(null) }, "Enter a token"));

function show() {
  set(line, "hidden", since === null);
  set(door, "hidden", !locked);
  if (since === null) return;
  say(silence, `The API does not answer since ${clock(since)} (${why}). ${heardAt === null ? "" : "What you see is from then."}`);
  const left = Math.max(0, (nextAt - Date.now()) / 1000);
  const when = left < 0.5 ? "now" : `in ${elapsed(Math.max(1, left))}`;
  say(next, `${elapsed((now() - since) / 1000)} by now; next try ${when}`);
}

export function bindBanner(place) {
  place.append(line, door);
  setInterval(show, 1000);
  addEventListener("online", again);
}
