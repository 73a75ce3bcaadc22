// Shortcuts. None of them works while somebody types, or while a dialog is open.

import { helpDialog } from "./dialogs.js";
import { go, link } from "./route.js";

const VIEWS = { a: "actions", c: "checkpoints", n: "nodes" };
const PATIENCE = 1500; // milliseconds between g and what follows

let g = -Infinity;

function typing(node) {
  return node.closest?.("input, select, textarea, [contenteditable]");
}

export function bindKeys() {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target) || document.querySelector("dialog[open]")) return;
    const follows = event.timeStamp - g < PATIENCE;
    g = -Infinity;
    if (follows && VIEWS[event.key]) go(link(VIEWS[event.key]));
    else if (event.key === "g") g = event.timeStamp;
    else if (event.key === "?") helpDialog();
    else if (event.key === "/") document.querySelector("[data-filter]")?.focus();
    else return;
    event.preventDefault();
  });
}
