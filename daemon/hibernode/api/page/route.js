// Where we are is in the fragment, so that links can be shared and the back button works: #/view/id?filter=value

const VIEWS = new Set(["actions", "checkpoints", "nodes"]);

function decoded(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

export function route(hash = location.hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [view, id = ""] = path.split("/");
  return { view: VIEWS.has(view) ? view : "actions", id: view === "actions" ? decoded(id) : "", query: new URLSearchParams(query) };
}

export function link(view, { id = "", ...query } = {}) {
  const given = Object.entries(query).filter(([, value]) => value);
  return `#/${view}${id ? `/${encodeURIComponent(id)}` : ""}${given.length ? `?${new URLSearchParams(given)}` : ""}`;
}

export const actionLink = (id) => link("actions", { id });

export function go(hash) {
  if (location.hash === hash) dispatchEvent(new Event("hashchange"));
  else location.hash = hash;
}

/** Another filter is not another place: back leads to where one came from. */
export function replace(hash) {
  history.replaceState(null, "", hash);
  dispatchEvent(new Event("hashchange"));
}
