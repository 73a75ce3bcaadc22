// One action: how it goes, where its time went, and why it failed.

import { still, tick } from "./clock.js";
import { curl, request } from "./curl.js";
import { cancelDialog, restoreDialog } from "./dialogs.js";
import { announce, clean, el, list, say, set } from "./dom.js";
import { clock, duration, moment, NONE, offset, pause, pod, rate, ratio, size, words } from "./format.js";
import { bar, empty, ended, facts, failure, heading, mark, progress } from "./parts.js";
import { poll } from "./poll.js";
import { actionLink, link } from "./route.js";

const QUIET = 10_000; // milliseconds between two looks at what has ended
const REST = "unaccounted";

const head = (label, how = null) => el("th", { scope: "col", role: "columnheader", class: how }, label);

function phaseRow() {
  const cell = (how) => el("td", { class: how, role: "cell" });
  const name = el("th", { scope: "row", role: "rowheader" }), picture = bar();
  const seconds = cell("num"), bytes = cell("num"), speed = cell("num");
  const node = el("tr", { role: "row" }, name, el("td", { class: "chart", role: "cell" }, picture.node), seconds, bytes, speed);
  return {
    node,
    update(phase) {
      say(name, phase.name);
      set(node, "class", phase.name === REST ? "muted" : null);
      picture.update(phase.share);
      say(seconds, duration(phase.seconds));
      say(bytes, phase.bytes ? size(phase.bytes) : NONE);
      say(speed, phase.bytes ? rate(phase.bytes, phase.seconds) : NONE);
    },
  };
}

function phases() {
  const body = el("tbody", { role: "rowgroup" });
  const node = el("section", { "aria-labelledby": "phases" }, el("h2", { id: "phases" }, "Phases"),
    el("table", { role: "table", "aria-labelledby": "phases", class: "phases" },
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" },
        head("Phase"), head("Share", "chart"), head("Time", "num"), head("Bytes", "num"), head("Rate", "num"))),
      body));
  const rows = list(body, (phase) => phase.name, phaseRow);
  return {
    node,
    update(action) {
      const all = [...action.phases ?? []];
      if (action.unaccounted) all.push({ name: REST, seconds: action.unaccounted, bytes: 0 });
      const longest = Math.max(...all.map((phase) => phase.seconds));
      rows(all.map((phase) => ({ ...phase, share: phase.seconds / longest })));
      set(node, "hidden", all.length === 0);
    },
  };
}

function eventRow() {
  const state = mark(), time = el("time"), since = el("td", { class: "num" }), what = el("td");
  const node = el("tr", {}, el("td", {}, state.node), el("td", { class: "num" }, time), since, what);
  return {
    node,
    update(event) {
      state.update(event.status);
      set(time, "datetime", event.timestamp);
      say(time, clock(Date.parse(event.timestamp)));
      set(time, "title", moment(event.timestamp));
      say(since, event.offset);
      say(what, event.code && event.code !== "ok" ? [event.code, event.message].filter(Boolean).join(": ") : event.message || "");
    },
  };
}

function timeline() {
  const body = el("tbody");
  const node = el("section", { "aria-labelledby": "timeline" }, el("h2", { id: "timeline" }, "Timeline"),
    el("table", { "aria-labelledby": "timeline", class: "timeline" },
      el("thead", {}, el("tr", {}, head("Status"), head("Time", "num"), head("Offset", "num"), head("Message"))), body));
  const rows = list(body, (event) => event.seq, eventRow);
  return {
    node,
    update(action) {
      const events = action.events ?? [];
      const first = Date.parse(events[0]?.timestamp);
      rows(events.map((event) => ({ ...event, offset: offset((Date.parse(event.timestamp) - first) / 1000) })));
      set(node, "hidden", events.length === 0);
    },
  };
}

function command() {
  const line = el("pre", { tabindex: "0", "aria-label": "curl command" });
  const said = el("span", { class: "muted", role: "status" });
  const copy = el("button", {
    type: "button",
    async onclick() {
      try {
        await navigator.clipboard.writeText(text);
        say(said, "copied");
      } catch { // only https and localhost have a clipboard
        getSelection().selectAllChildren(line);
        say(said, "selected: copy it with Ctrl-C");
      }
    },
  }, "Copy as curl");
  let text = "";
  return {
    button: copy,
    node: el("section", { "aria-labelledby": "curl" },
      el("h2", { id: "curl" }, "The same again"), line, el("p", { class: "row" }, copy, said)),
    update(action) {
      text = curl(...request(action));
      say(line, text);
    },
  };
}

function told(action) {
  return [
    ["Action", action.action_id],
    ["Checkpoint", action.checkpoint_id ?? NONE],
    action.source_action_id && ["Restores", { text: action.source_action_id, href: actionLink(action.source_action_id) }],
    ["Node", action.node_name ?? NONE],
    ["Pod", action.pod_name ? { text: pod(action), href: link("actions", { pod: pod(action) }) } : NONE],
    ["Pod id", action.pod_id ?? NONE],
    ["Kind, reason", `${action.kind ?? NONE}, ${action.reason ?? NONE}`],
    ["Platform, GPU", `${action.platform ?? NONE}, ${action.gpu ?? "no GPU"}`],
    ["Location", action.location ?? NONE],
    ["Filed", moment(action.action_timestamp)],
    ["Updated", moment(action.updated_timestamp)],
    action.checkpoint_completed_timestamp && ["Checkpoint completed", moment(action.checkpoint_completed_timestamp)],
  ];
}

function measured(action) {
  const seconds = action.total_duration === null ? null : action.total_duration / 1e9;
  return [
    ["Pause", pause(action.pause_ns)],
    ["Raw", size(action.raw_bytes)],
    ["Zero pages", size(action.zero_bytes)],
    ["Stored", size(action.stored_bytes)],
    ["Ratio", ratio(action.raw_bytes, action.stored_bytes)],
    ["Rate", rate(action.raw_bytes, seconds)],
    ["Store traffic", size(action.total_io)],
    ["Streams", action.streams ? String(action.streams) : NONE],
  ].filter(([, value]) => value !== NONE);
}

export function actionView(root, { id }) {
  const title = el("h1", { tabindex: "-1" }, "Action");
  const state = mark(), took = el("time", { class: "num" });
  const ask = () => cancelDialog(now, polling.now);
  const stop = el("button", { type: "button", class: "danger", hidden: true, onclick: ask }, "Cancel");
  const back = el("button", { type: "button", class: "primary", hidden: true, onclick: () => restoreDialog(now) }, "Restore");
  const wrong = failure(), moving = progress({ long: true });
  const provisional = el("p", { class: "note", hidden: true },
    "Provisional: this is the control plane's own word. The node has not said otherwise yet.");
  const identity = facts("What it is"), numbers = facts("What it took"), parts = phases(), events = timeline(), again = command();
  const whole = el("div", { hidden: true },
    el("div", { class: "state" }, state.node, took, stop, back), provisional, wrong.node, moving.node,
    el("div", { class: "columns" }, numbers.node, identity.node), parts.node, events.node, again.node);
  const gone = empty(
    el("p", {}, "No such action, or it is not kept any more."),
    el("p", {}, el("a", { href: link("actions") }, "All actions")));
  const crumbs = el("p", { class: "crumbs" }, el("a", { href: link("actions") }, "Actions"), " / ", id);
  root.append(crumbs, el("div", { class: "heading" }, title), gone, whole);

  let now = null;
  const polling = poll(`/v2/actions/${encodeURIComponent(id)}`, ({ value }) => {
    const name = `${words(value.type)} of ${pod(value)}`;
    if (now && now.status !== value.status) announce(`${name}: ${words(value.status)}`);
    now = value;
    const over = ended(value);
    say(title, name[0].toUpperCase() + name.slice(1));
    document.title = clean(`${words(value.status)}: ${name} – hibernode`);
    state.update(value.status, value.provisional);
    if (over) still(took, value.total_duration === null ? "" : duration(value.total_duration / 1e9));
    else tick(took, value.action_timestamp, "elapsed");
    set(stop, "hidden", over);
    set(back, "hidden", !(value.type === "checkpoint" && value.status === "ready"));
    set(provisional, "hidden", !value.provisional);
    wrong.update(value.status === "error" ? value.details ?? { code: "error", message: "no details were given" } : null);
    set(moving.node, "hidden", over || !value.progress);
    if (value.progress) moving.update(value.progress);
    identity.update(told(value));
    const known = measured(value);
    numbers.update(known);
    set(numbers.node, "hidden", known.length === 0);
    parts.update(value);
    events.update(value);
    again.update(value);
    set(whole, "hidden", false);
    set(gone, "hidden", true);
  }, {
    every: () => now && ended(now) && !now.provisional ? QUIET : 2000,
    refused: (error) => {
      if (error.status !== 404) return wrong.update(error.details), set(whole, "hidden", false);
      set(whole, "hidden", true);
      set(gone, "hidden", false);
    },
  });
  return { title: "Action", stop: polling.stop, focus: () => title };
}
