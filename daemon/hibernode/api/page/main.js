// Which view is shown. token.js comes first: a token leaves the address before anything else runs.

import { takeToken } from "./token.js";
import { actionView } from "./action.js";
import { actionsView } from "./actions.js";
import { checkpointsView } from "./checkpoints.js";
import { bindBanner, connection, unlock } from "./connection.js";
import { helpDialog, tokenDialog } from "./dialogs.js";
import { set } from "./dom.js";
import { bindKeys } from "./keys.js";
import { nodesView } from "./nodes.js";
import { route } from "./route.js";
import { bindTheme } from "./theme.js";

const main = document.getElementById("main");
const VIEWS = { actions: actionsView, checkpoints: checkpointsView, nodes: nodesView };
let view = null;
let shown = "";

function turn({ moved = true } = {}) {
  const at = route();
  const name = `${at.view}/${at.id}`;
  for (const link of document.querySelectorAll("[data-view]")) {
    set(link, "aria-current", link.dataset.view === at.view ? "page" : null);
  }
  if (name === shown) return view.turn?.(at);
  shown = name;
  view?.stop();
  main.replaceChildren();
  scrollTo(0, 0);
  view = at.id ? actionView(main, at) : VIEWS[at.view](main, at);
  document.title = `${view.title} – hibernode`; // one action says more, once it is known
  if (moved) view.focus()?.focus();
}

addEventListener("hashchange", () => {
  if (takeToken()) unlock();
  turn();
});
connection.addEventListener("locked", ({ detail }) => tokenDialog(detail));
document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
document.getElementById("help").addEventListener("click", helpDialog);
bindTheme(document.getElementById("theme"));
bindBanner(document.getElementById("banner"));
bindKeys();
turn({ moved: false });
