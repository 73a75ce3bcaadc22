// What can be restored, newest first.

import { query } from "./api.js";
import { restoreDialog } from "./dialogs.js";
import { el, set } from "./dom.js";
import { pause, pod, ratio, size } from "./format.js";
import { ago, anchor, button, empty, failure, heading, paging, table, text } from "./parts.js";
import { poll } from "./poll.js";
import { actionLink, go, link } from "./route.js";

const PAGE = 50;

const COLUMNS = [
  { label: "Pod", cell: anchor(pod, (checkpoint) => actionLink(checkpoint.action_id)), name: true },
  { label: "Node", cell: text((checkpoint) => checkpoint.node_name) },
  { label: "Age", cell: ago((checkpoint) => checkpoint.checkpoint_completed_timestamp), num: true },
  { label: "Raw", cell: text((checkpoint) => size(checkpoint.raw_bytes)), num: true },
  { label: "Stored", cell: text((checkpoint) => size(checkpoint.stored_bytes)), num: true },
  { label: "Ratio", cell: text((checkpoint) => ratio(checkpoint.raw_bytes, checkpoint.stored_bytes)), num: true },
  { label: "Pause", cell: text((checkpoint) => pause(checkpoint.pause_ns)), num: true },
  { label: "Kind", cell: text((checkpoint) => checkpoint.kind), tight: true },
  { label: "Reason", cell: text((checkpoint) => checkpoint.reason), tight: true },
  { label: "Location", cell: text((checkpoint) => checkpoint.location), name: true },
  { label: "", cell: button("Restore", (checkpoint) => `Restore ${pod(checkpoint)}`, restoreDialog), tight: true },
];

export function checkpointsView(root, at) {
  let polling = null, path = "";
  const rows = table({
    label: "Checkpoints", columns: COLUMNS, key: (checkpoint) => checkpoint.checkpoint_id,
    open: (checkpoint) => go(actionLink(checkpoint.action_id)),
    row: (row, checkpoint) => set(row, "data-id", checkpoint.checkpoint_id),
  });
  const none = empty(
    el("p", {}, "No checkpoints."),
    el("p", {}, "Take one: open ", el("a", { href: link("nodes") }, "Nodes"), " and choose a workload."));
  const wrong = failure();
  const pages = paging("checkpoints");
  root.append(heading("Checkpoints"), wrong.node, rows.node, none, pages.node);

  function turn({ query: query_ }) {
    const before = query_.get("before");
    const next = query("/v2/checkpoints", { limit: PAGE, before });
    if (next === path) return;
    path = next;
    polling?.stop();
    polling = poll(path, ({ value, older }) => {
      wrong.update(null);
      rows.update(value);
      set(rows.node, "hidden", value.length === 0);
      set(none, "hidden", value.length > 0);
      pages.update({
        shown: value.length,
        first: before ? link("checkpoints") : null,
        next: older ? link("checkpoints", { before: older }) : null,
      });
    }, { refused: (error) => wrong.update(error.details) });
  }

  turn(at);
  return { title: "Checkpoints", turn, stop: () => polling.stop(), focus: () => root.querySelector("h1") };
}
