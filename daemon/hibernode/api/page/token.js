// The bearer token: of this tab only. One that came in the address leaves it before anything else happens.

const KEY = "hibernode.token";
let kept = null;

try { kept = sessionStorage.getItem(KEY); } catch { /* then only until the page is left */ }

export const token = () => kept;

export function setToken(value) {
  kept = value || null;
  try {
    if (kept) sessionStorage.setItem(KEY, kept);
    else sessionStorage.removeItem(KEY);
  } catch { /* as above */ }
}

/** Take `#token=...` over; true if there was one. */
export function takeToken() {
  const found = /^#token=(.*)$/s.exec(location.hash);
  if (!found) return false;
  history.replaceState(null, "", location.pathname + location.search);
  let value = found[1];
  try { value = decodeURIComponent(value); } catch { /* not encoded: as it is */ }
  if (value) setToken(value.trim());
  return true;
}

takeToken();
