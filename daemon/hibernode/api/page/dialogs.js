// What people ask for: each question is a native dialog, which keeps what was typed until the API has said yes.

import { Away, cancel, checkpoint, leave, Refused, restore } from "./api.js";
import { lock, unlock } from "./connection.js";
import { announce, el, list, say, set } from "./dom.js";
import { many, moment, NONE, pod, size, words } from "./format.js";
import { failure, PLAIN } from "./parts.js";
import { actionLink, go } from "./route.js";
import { setToken, token } from "./token.js";

const KINDS = ["simple", "rootfs", "rootfsonly"];
const AS_CONFIGURED = "as the node is configured";

let count = 0;

/** Opens it. `send()` asks the API; its answer goes to `done(answer, close)`. */
function dialog({ title, parts, label, send, done, danger = false, dismiss = "Close" }) {
  const id = `dialog-${count += 1}`;
  const wrong = failure();
  const submit = el("button", { type: "submit", class: danger ? "danger" : "primary" }, label);
  // What is dangerous waits for more than Enter: the way out has the focus.
  const way = { type: "button", autofocus: danger, onclick: () => node.close() };
  const close = dismiss === null ? null : el("button", way, dismiss);
  const form = el("form", {}, el("h2", { id }, title), parts, wrong.node, el("div", { class: "buttons" }, close, submit));
  const node = el("dialog", { "aria-labelledby": id, onclose: () => node.remove() }, form);
  let sending = false;

  async function sent(event) {
    event.preventDefault(); // nothing is posted by the form itself
    if (sending) return;
    sending = true;
    set(submit, "aria-busy", "true");
    try {
      const answer = await send(form.elements);
      wrong.update(null);
      done(answer, { node, form, close, submit });
    } catch (error) {
      if (error instanceof Refused) {
        wrong.update(error.details);
        if (error.status === 401) lock(error);
      } else if (error instanceof Away) {
        wrong.update({
          code: "no answer",
          message: `The API did not answer (${error.message}).`,
          hint: "The request may have arrived: look at the actions before you send it again.",
        });
      } else {
        throw error;
      }
      wrong.node.scrollIntoView({ block: "nearest" });
    } finally {
      sending = false;
      set(submit, "aria-busy", null);
    }
  }

  form.addEventListener("submit", sent);
  document.body.append(node);
  node.showModal();
  return node;
}

const help = (text) => el("p", { class: "help" }, text);
const field = (label, control, more = null) =>
  el("div", { class: "field" }, el("label", {}, el("span", {}, label), control), more && help(more));
const tickbox = (input, label, more) =>
  el("div", { class: "field" }, el("label", { class: "tickbox" }, el("input", input), label), help(more));
const given = (label, value) => el("div", { class: "field" }, el("span", {}, label), el("span", { class: "num" }, value));

/** To the new action; one who has closed the dialog meanwhile stays where he is. */
function follow(what) {
  return ({ value }, { node }) => {
    announce(`${what} filed`);
    const open = node.open;
    node.close();
    if (open) go(actionLink(value));
  };
}

export function checkpointDialog(workload, node) {
  const name = `${workload.namespace ? `${workload.namespace}/` : ""}${workload.name}`;
  const bare = workload.kind === "job" || workload.kind === "process"; // no container, no root file system of its own
  dialog({
    title: `Checkpoint ${name}`,
    label: "Checkpoint",
    parts: [
      given("Node", node.name),
      given("Reason", "manual"),
      field("Kind", el("select", { name: "kind" }, KINDS.map((kind) => el("option", { value: kind, disabled: bare && kind !== "simple" }, kind))),
        bare ? "Only containers have a root file system of their own." : null),
      field("Compression", el("input", { name: "compression", list: "compressions", placeholder: AS_CONFIGURED, maxlength: "32", ...PLAIN }),
        "zstd, zstd:<level>, lz4 or none"),
      el("datalist", { id: "compressions" }, ["zstd", "zstd:1", "zstd:9", "lz4", "none"].map((value) => el("option", { value }))),
      field("Streams", el("input", { name: "streams", type: "number", min: "0", max: "64", step: "1", value: "0", required: true }),
        `1 to 64; 0: ${AS_CONFIGURED}`),
      tickbox({ type: "checkbox", name: "asynchronous" }, "asynchronous", "Free the slot of this action once all is captured."),
      tickbox({ type: "checkbox", name: "kill" }, "kill after ready", "The workload is held, and ended when the checkpoint is ready."),
    ],
    send: ({ kind, compression, streams, asynchronous, kill }) => checkpoint({
      pod_id: workload.uid || null, namespace: workload.namespace, pod_name: workload.name, kind: kind.value, reason: "manual",
      overrides: {
        asynchronous: asynchronous.checked,
        compression: compression.value.trim() || null,
        criu_opts: kill.checked ? '{"leave_running": false}' : null,
        directory: null,
        streams: streams.valueAsNumber,
      },
    }),
    done: follow(`Checkpoint of ${name}`),
  });
}

/** Of a ready checkpoint: an action of type checkpoint, or a row of the checkpoints. */
export function restoreDialog(of) {
  dialog({
    title: `Restore ${pod(of)}`,
    label: "Restore",
    parts: [
      given("Checkpoint", of.checkpoint_id ?? NONE),
      given("Taken", `${moment(of.checkpoint_completed_timestamp)} on ${of.node_name ?? NONE}`),
      given("Size", `${size(of.raw_bytes)}, ${size(of.stored_bytes)} stored`),
      given("Reason", "manual"),
      field("Pod name", el("input", { name: "pod_name", maxlength: "253", placeholder: of.pod_name ?? "", ...PLAIN }),
        "Empty: the name that it had."),
    ],
    send: ({ pod_name: name }) => restore({
      action_id: of.action_id, reason: "manual", overrides: { criu_opts: null, pod_name: name.value.trim() || null },
    }),
    done: follow(`Restore of ${pod(of)}`),
  });
}

export function cancelDialog(action, look) {
  const left = action.type === "checkpoint" ? "The workload runs on." : "Nothing of it stays.";
  dialog({
    title: `Cancel this ${action.type}?`,
    label: `Cancel the ${action.type}`,
    dismiss: "Let it go on",
    danger: true,
    parts: [el("p", {}, `The ${action.type} of ${pod(action)} is undone. ${left}`)],
    send: () => cancel(action.action_id),
    done: (_, { node }) => { announce("Cancel filed"); node.close(); look(); },
  });
}

function outcome() {
  const who = el("td"), state = el("td"), links = el("td"), message = el("td");
  return {
    node: el("tr", {}, who, state, links, message),
    update(of) {
      say(who, pod(of));
      say(state, words(of.state));
      say(message, of.message ?? "");
      const ids = [["checkpoint", of.checkpoint_action_id], ["restore", of.restore_action_id]].filter(([, id]) => id);
      links.replaceChildren(...ids.flatMap(([name, id]) => [el("a", { href: actionLink(id) }, name), " "]));
    },
  };
}

const REASONS = [
  ["nodeTermination", "The node goes away."],
  ["nodeUnschedulable", "The node stays, but shall carry nothing."],
];

export function leaveDialog(of) {
  const workloads = of.workloads ?? [];
  const node = dialog({
    title: `Node ${of.name} leaves?`,
    label: `${of.name} leaves`,
    danger: true,
    parts: [
      el("p", {}, workloads.length
        ? `Checkpoints of ${many(workloads.length, "workload")} are taken here, and restored elsewhere.`
        : "No workloads are known there."),
      el("fieldset", {}, el("legend", {}, "Reason"), REASONS.map(([value, more], at) =>
        tickbox({ type: "radio", name: "reason", value, checked: at === 0 }, value, more))),
    ],
    send: ({ reason }) => leave(of.name, reason.value),
    done: ({ value }, { form, close, submit }) => {
      const body = el("tbody");
      list(body, (each) => each.pod_id || pod(each), outcome)(value);
      const head = ["Workload", "State", "Actions", "Message"].map((name) => el("th", { scope: "col" }, name));
      const table = el("table", { class: "outcome", "aria-label": "What becomes of its workloads" },
        el("thead", {}, el("tr", {}, head)), body);
      const answer = value.length ? table : el("p", {}, "No workload had to go.");
      form.querySelectorAll("fieldset, p").forEach((part) => part.remove());
      submit.remove();
      form.insertBefore(answer, form.querySelector(".failure"));
      say(form.querySelector("h2"), `Node ${of.name} leaves`);
      close.focus();
    },
  });
  node.addEventListener("click", (event) => { if (event.target.closest("a")) node.close(); });
}

let door = null;

export function tokenDialog(refused) {
  if (door?.open) return;
  const had = token() !== null;
  const before = refused && had
    ? el("p", { class: "bad" }, `The API does not take this token: ${refused.message}`)
    : el("p", {}, "The API wants a token.");
  door = dialog({
    title: "Token",
    label: "Go on",
    parts: [before, field("Token", el("input", { name: "token", type: "password", required: true, ...PLAIN }),
      "It stays in this tab, and is gone with it.")],
    send: async ({ token: typed }) => setToken(typed.value.trim()),
    done: (_, { node }) => { node.close(); unlock(); },
  });
}

const KEYS = [
  ["g a", "actions"], ["g c", "checkpoints"], ["g n", "nodes"], ["/", "to the filter"], ["↑ ↓ Home End", "along the rows"],
  ["Enter", "open the row"], ["Esc", "close a dialog"], ["?", "this list"],
];

export function helpDialog() {
  dialog({
    title: "Keyboard",
    label: "Close",
    dismiss: null,
    parts: [el("dl", { class: "keys" }, KEYS.map(([key, what]) =>
      el("div", {}, el("dt", {}, key.split(" ").flatMap((part) => [el("kbd", {}, part), " "])), el("dd", {}, what))))],
    send: async () => null,
    done: (_, { node }) => node.close(),
  });
}
