// Numbers as people read them, in the same words as the command line's (cli/text.py). Pure.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
export const NONE = "–";

const three = (value) => value >= 99.95 ? value.toFixed(0) : value >= 9.995 ? value.toFixed(1) : value.toFixed(2);
const two = (value) => String(value).padStart(2, "0");
const known = (value) => typeof value === "number" && Number.isFinite(value);

export function size(count) {
  if (!known(count)) return NONE;
  let value = count, unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) { value /= 1024; unit += 1; }
  return `${unit ? three(value) : Math.round(value)} ${UNITS[unit]}`;
}

/** `1.24 of 2.00 GiB`: one unit for both. */
export function sizes(done, total) {
  const whole = size(total);
  const unit = whole.slice(whole.lastIndexOf(" ") + 1);
  return `${three(done / 1024 ** UNITS.indexOf(unit))} of ${whole}`;
}

export const rate = (bytes, seconds) => known(bytes) && known(seconds) && seconds > 0 ? `${size(bytes / seconds)}/s` : NONE;
export const ratio = (raw, stored) => known(raw) && known(stored) && raw > 0 && stored > 0 ? `${(raw / stored).toFixed(1)}x` : NONE;

/** Always in milliseconds, so that two can be compared at a glance. */
export function pause(nanoseconds) {
  if (!known(nanoseconds)) return NONE;
  const ms = nanoseconds / 1e6;
  return ms > 0 && ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms).toLocaleString("en-US")} ms`;
}

export function duration(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds < 0.9995) return `${(seconds * 1e3).toFixed(0)} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)}m ${two(whole % 60)}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h ${two(Math.floor(whole % 3600 / 60))}m`;
  return `${Math.floor(whole / 86400)}d ${two(Math.floor(whole % 86400 / 3600))}h`;
}

/** Whole seconds: for what counts up on the screen. */
export const elapsed = (seconds) => seconds < 59.5 ? `${Math.round(Math.max(0, seconds))} s` : duration(seconds);

export function age(seconds) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["m", 60]]) {
    if (seconds >= 2 * length) return `${(seconds / length).toFixed(0)}${unit} ago`;
  }
  return `${Math.max(0, seconds).toFixed(0)}s ago`;
}

export const offset = (seconds) => `${seconds < 0 ? "−" : "+"}${Math.abs(seconds).toFixed(3)} s`;

/** `2026-11-28 13:20:05Z`: logs of nodes are in UTC, so the page is. */
export function moment(iso) {
  const time = new Date(iso);
  return iso && !Number.isNaN(time.getTime()) ? `${time.toISOString().slice(0, 19).replace("T", " ")}Z` : NONE;
}


export function clock(milliseconds) {
  const time = new Date(milliseconds);
  return Number.isNaN(time.getTime()) ? NONE : `${time.toISOString().slice(11, 19)}Z`;
}

export const words = (name) => String(name ?? NONE).replaceAll("_", " ");
export const many = (count, one, more = `${one}s`) => `${count} ${count === 1 ? one : more}`;

/** namespace/name, else what there is. */
export const pod = (of) => of.pod_name ? `${of.namespace ? `${of.namespace}/` : ""}${of.pod_name}` : of.pod_id || NONE;
