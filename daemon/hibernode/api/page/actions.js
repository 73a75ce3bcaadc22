// All actions, newest first, as they go.

import { query } from "./api.js";
import { still, tick } from "./clock.js";
import { announce, el, say, set } from "./dom.js";
import { duration, NONE, pause, pod, size, words } from "./format.js";
import { ago, anchor, empty, ended, failure, heading, mark, paging, PLAIN, progress, table, text } from "./parts.js";
import { poll } from "./poll.js";
import { actionLink, go, link, replace } from "./route.js";

const PAGE = 50;
const STATUSES = ["initialized", "processing", "checkpoint_created", "ready", "error"];
const TYPES = ["checkpoint", "restore"];
const FILTERS = ["status", "type", "pod", "node"];
const SPOKEN = 3; // changes at once that are read out; more would be noise

let opened = null; // who comes back finds the row that he left

function status() {
  const made = mark();
  return { node: made.node, update: (action) => made.update(action.status, action.provisional) };
}

function took() {
  const node = el("time");
  return {
    node,
    update(action) {
      if (ended(action)) still(node, action.total_duration === null ? NONE : duration(action.total_duration / 1e9));
      else tick(node, action.action_timestamp, "elapsed");
    },
  };
}

function state() {
  const running = progress(), code = el("code", { class: "bad" });
  const node = el("div", {}, running.node, code);
  return {
    node,
    update(action) {
      const moving = !ended(action) && action.progress;
      set(running.node, "hidden", !moving);
      if (moving) running.update(action.progress);
      say(code, action.status === "error" ? action.details?.code ?? "error" : "");
    },
  };
}

const sizes = (action) => action.raw_bytes === null ? NONE : `${size(action.raw_bytes)} → ${size(action.stored_bytes)}`;

const COLUMNS = [
  { label: "Status", cell: status, tight: true },
  { label: "Type", cell: text((action) => action.type), tight: true },
  { label: "Pod", cell: anchor(pod, (action) => actionLink(action.action_id)), name: true },
  { label: "Node", cell: text((action) => action.node_name) },
  { label: "Reason", cell: text((action) => action.reason), tight: true },
  { label: "Age", cell: ago((action) => action.action_timestamp), num: true },
  { label: "Duration", cell: took, num: true },
  { label: "Pause", cell: text((action) => pause(action.pause_ns)), num: true },
  { label: "Size", cell: text(sizes), num: true },
  { label: "Progress", cell: state },
];

/** Names are exact: `name`, `namespace/name`, or `namespace/` for all of one. */
function podParameters(wanted) {
  const slash = wanted.indexOf("/");
  return slash < 0 ? { pod_name: wanted } : { namespace: wanted.slice(0, slash), pod_name: wanted.slice(slash + 1) };
}

function filters(change) {
  const choice = (name, label, values) => el("label", {}, label, el("select", { name },
    el("option", { value: "" }, "all"), values.map((value) => el("option", { value }, value.replaceAll("_", " ")))));
  const typed = (name, label, hint) => el("label", {}, label,
    el("input", { name, list: `known-${name}`, placeholder: hint, ...PLAIN, "data-filter": name === "pod" }),
    el("datalist", { id: `known-${name}` }));
  const clear = el("button", { type: "button", hidden: true, onclick: () => change({}) }, "Clear");
  const form = el("form", { class: "filters", role: "search", "aria-label": "Filter actions" },
    typed("pod", "Pod", "namespace/name"), typed("node", "Node", "name"),
    choice("status", "Status", STATUSES), choice("type", "Type", TYPES), clear);
  const read = () => Object.fromEntries(FILTERS.map((name) => [name, form.elements[name].value.trim()]));
  form.addEventListener("submit", (event) => { event.preventDefault(); change(read()); });
  form.addEventListener("change", () => change(read()));
  return {
    node: form,
    write(query_) {
      for (const name of FILTERS) {
        const wanted = query_.get(name) ?? "";
        if (form.elements[name].value !== wanted) form.elements[name].value = wanted;
      }
      set(clear, "hidden", !FILTERS.some((name) => query_.get(name)));
    },
    suggest(name, values) {
      const place = form.querySelector(`#known-${name}`);
      const fresh = [...new Set(values)].sort();
      if (fresh.join("\n") !== [...place.children].map((option) => option.value).join("\n")) {
        place.replaceChildren(...fresh.map((value) => el("option", { value })));
      }
    },
  };
}

export function actionsView(root, at) {
  let polling = null, path = "", known = null;
  const wanted = filters((query_) => replace(link("actions", query_)));
  const rows = table({
    label: "Actions", columns: COLUMNS, key: (action) => action.action_id,
    open: (action) => { opened = action.action_id; go(actionLink(action.action_id)); },
    row: (row, action) => { set(row, "data-id", action.action_id); set(row, "data-status", action.status); },
  });
  const none = empty(
    el("p", {}, "No actions yet."),
    el("p", {}, "Take a checkpoint: open ", el("a", { href: link("nodes") }, "Nodes"), " and choose a workload, or on a node: ",
      el("code", {}, "hibernode checkpoint NAME")));
  const nothing = empty(
    el("p", {}, "No action fits these filters. Names are exact: "),
    el("p", {}, el("code", {}, "name"), ", ", el("code", {}, "namespace/name"), ", or ", el("code", {}, "namespace/"), " for all of one."));
  const wrong = failure();
  const pages = paging("actions");
  root.append(heading("Actions"), wanted.node, wrong.node, rows.node, none, nothing, pages.node);

  function spoken(actions) {
    const changed = actions.filter(({ action_id: id, status: is }) => known?.has(id) && known.get(id) !== is);
    const sentences = changed.slice(0, SPOKEN).map((action) => `${action.type} of ${pod(action)}: ${words(action.status)}`);
    if (sentences.length) announce(sentences.join(". "));
    known = new Map(actions.map((action) => [action.action_id, action.status]));
  }

  function show({ value: actions, older }, query_) {
    wrong.update(null);
    rows.update(actions);
    spoken(actions);
    const filtered = FILTERS.some((name) => query_.get(name));
    set(rows.node, "hidden", actions.length === 0);
    set(none, "hidden", actions.length > 0 || filtered);
    set(nothing, "hidden", actions.length > 0 || !filtered);
    wanted.suggest("pod", actions.filter((action) => action.pod_name).map(pod));
    wanted.suggest("node", actions.map((action) => action.node_name).filter(Boolean));
    const { before, ...rest } = Object.fromEntries(query_);
    pages.update({
      shown: actions.length,
      first: before ? link("actions", rest) : null,
      next: older ? link("actions", { ...rest, before: older }) : null,
    });
  }

  function turn({ query: query_ }) {
    wanted.write(query_);
    const { pod: who = "", before, status: is, type, node } = Object.fromEntries(query_);
    const next = query("/v2/actions", { type, status: is, node, ...podParameters(who), limit: PAGE, before });
    if (next === path) return;
    path = next;
    known = null;
    polling?.stop();
    polling = poll(path, (answer) => show(answer, query_), { refused });
  }

  function refused(error) { // of a filter that means nothing: what another one has found would be a lie below it
    wrong.update(error.details);
    for (const part of [rows.node, none, nothing]) set(part, "hidden", true);
  }

  turn(at);
  return {
    title: "Actions",
    turn,
    stop: () => polling.stop(),
    focus: () => (opened && rows.body.querySelector(`[data-id="${CSS.escape(opened)}"]`)) || root.querySelector("h1"),
  };
}
