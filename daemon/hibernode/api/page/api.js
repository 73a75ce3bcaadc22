// One request to the API: its answer, its refusal, or nobody there.

import { heard } from "./clock.js";
import { token } from "./token.js";

const READ_LIMIT = 10_000; // milliseconds
const WRITE_LIMIT = 30_000; // node leaves looks at every workload
const NOBODY = new Set([502, 503, 504]); // a proxy's word for it

/** The API understood and says no: `details` has code, hint, and of a refusal property, found, wanted. */
export class Refused extends Error {
  constructor(status, text) {
    let body = null;
    try { body = JSON.parse(text); } catch { /* not the API's own: a proxy, or another server */ }
    const details = body?.details && typeof body.details === "object" ? body.details : {};
    super(typeof body?.message === "string" ? body.message : text.trim().slice(0, 500) || `HTTP status ${status}`);
    this.status = status;
    this.details = { ...details, code: details.code ?? `HTTP ${status}`, message: this.message };
  }
}

/** No answer, or none that means anything. */
export class Away extends Error {}

async function answer(method, path, body, signal) {
  const headers = { Accept: "application/json, text/plain" };
  if (token()) headers.Authorization = `Bearer ${token()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const limit = AbortSignal.timeout(method === "GET" ? READ_LIMIT : WRITE_LIMIT);
  const response = await fetch(path, {
    method,
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal: signal ? AbortSignal.any([signal, limit]) : limit,
    cache: "no-store",
    redirect: "error",
  });
  return [response, await response.text()];
}

/** {value, older}: JSON or text, and what `Link: <...>; rel="next"` says of the page after it (its `before`). */
export async function ask(method, path, { body, signal } = {}) {
  let response, text;
  try {
    [response, text] = await answer(method, path, body, signal);
  } catch (error) {
    throw new Away(error.name === "TimeoutError" ? "no answer in time" : error.message);
  }
  if (NOBODY.has(response.status) && !text.startsWith("{")) throw new Away(`HTTP status ${response.status}`);
  heard(response.headers.get("Date"));
  if (!response.ok) throw new Refused(response.status, text);
  const json = response.headers.get("Content-Type")?.startsWith("application/json");
  try {
    return { value: json ? JSON.parse(text) : text.trim(), older: older(response.headers.get("Link")) };
  } catch {
    throw new Away("the answer is no JSON");
  }
}

function older(link) {
  const found = /<([^>]*)>\s*;[^,]*\brel="?next"?/i.exec(link ?? "");
  return found ? new URL(found[1], location.href).searchParams.get("before") : null;
}

const segment = encodeURIComponent;

export const cancel = (action) => ask("POST", `/v2/actions/${segment(action)}/cancel`);
export const leave = (node, reason) => ask("POST", `/v2/nodes/${segment(node)}/leave`, { body: { reason } });
export const checkpoint = (body) => ask("POST", "/v2/checkpoint/pod", { body });
export const restore = (body) => ask("POST", "/v2/restore/pod", { body });

/** A path with those parameters that say something. */
export function query(path, parameters) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}
