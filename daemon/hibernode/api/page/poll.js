// Ask for the same thing again and again while somebody looks at it.

import { Away, ask, Refused } from "./api.js";
import { answered, connection, lock, lost, wantsToken } from "./connection.js";

const EVERY = 2000; // milliseconds
const KEPT = 40;
const kept = new Map(); // path -> last answer: going back shows at once what was there

/** `take(answer)` for each answer, `refused(error)` when the API says that there is no such thing. */
export function poll(path, take, { every = () => EVERY, refused = null } = {}) {
  const ended = new AbortController();
  let timer = 0, asking = false, missed = false;

  async function once() {
    clearTimeout(timer);
    if (asking) { missed = true; return; }
    if (ended.signal.aborted || document.hidden || wantsToken()) return;
    asking = true;
    missed = false;
    let wait = null;
    let answer = null;
    try {
      answer = await ask("GET", path, { signal: ended.signal });
    } catch (error) {
      if (ended.signal.aborted) return;
      if (!(error instanceof Refused || error instanceof Away)) throw error;
      if (error.status === 401) lock(error);
      else if (refused && error.status >= 400 && error.status < 500) { answered(); refused(error); }
      else wait = lost(error);
    } finally {
      asking = false;
    }
    if (ended.signal.aborted) return;
    timer = setTimeout(once, missed ? 0 : wait ?? every());
    if (answer) {
      answered();
      kept.delete(path);
      kept.set(path, answer);
      if (kept.size > KEPT) kept.delete(kept.keys().next().value);
      take(answer);
    }
  }

  document.addEventListener("visibilitychange", once, { signal: ended.signal });
  connection.addEventListener("again", once, { signal: ended.signal });
  if (kept.has(path)) take(kept.get(path));
  once();
  return { now: once, stop: () => { ended.abort(); clearTimeout(timer); } };
}
