// The nodes, what they have, and the workloads on them.

import { tick } from "./clock.js";
import { checkpointDialog, leaveDialog } from "./dialogs.js";
import { el, list, say, set } from "./dom.js";
import { many, NONE, size, sizes } from "./format.js";
import { ago, bar, button, empty, facts, failure, heading, mark, PLAIN, table, text } from "./parts.js";
import { poll } from "./poll.js";
import { link } from "./route.js";

const full = (workload) => `${workload.namespace ? `${workload.namespace}/` : ""}${workload.name}`;
const gpu = (found) => typeof found === "string" ? found : found?.name || JSON.stringify(found);

const told = (found) => typeof found?.memory_total === "number" && typeof found?.memory_used === "number";
const sum = (numbers) => numbers.reduce((one, other) => one + other, 0);

function gpus(found, reason) {
  if (!found?.length) return reason || "no GPU";
  const counts = new Map();
  for (const name of found.map(gpu)) counts.set(name, (counts.get(name) ?? 0) + 1);
  const names = [...counts].map(([name, count]) => count > 1 ? `${count} × ${name}` : name).join(", ");
  return reason ? `${names} (${reason})` : names;
}

function gpuMemory(found) {
  const known = (found ?? []).filter(told);
  return known.length ? `${sizes(sum(known.map((each) => each.memory_used)), sum(known.map((each) => each.memory_total)))} used` : NONE;
}

// What pods ask for by annotation: how many, and each that is wrong.
function beats(wishes) {
  const wrong = wishes.filter((wish) => wish.problem).map((wish) => [`${wish.namespace}/${wish.pod_name}`, wish.problem]);
  const well = wishes.length - wrong.length;
  return well ? [["Heartbeats", `of ${many(well, "pod")}, by annotation`], ...wrong] : wrong;
}

function card() {
  let node = null;
  const name = el("h2"), state = mark(), since = el("time"), memory = bar(), used = el("span", { class: "num" });
  const known = facts("What it has");
  const idle = empty(el("p", {}, "No workloads. ", el("code", {}, "hibernode run --name NAME -- PROGRAM"), " starts one."));
  const take = (workload) => checkpointDialog(workload, node);
  const rows = table({
    label: "Workloads", key: (workload) => workload.uid || `${full(workload)} ${workload.pid}`,
    columns: [
      { label: "Workload", cell: text(full), name: true },
      { label: "Kind", cell: text((workload) => workload.kind) },
      { label: "Memory", cell: text((workload) => size(workload.rss)), num: true },
      { label: "Processes", cell: text((workload) => String(workload.processes ?? NONE)), num: true },
      { label: "Pid", cell: text((workload) => String(workload.pid || NONE)), num: true },
      { label: "Started", cell: ago((workload) => workload.started_timestamp), num: true },
      { label: "", cell: button("Checkpoint", (workload) => `Checkpoint ${full(workload)}`, take), tight: true },
    ],
  });
  const leaves = el("button", { type: "button", onclick: () => leaveDialog(node) }, "Node leaves");
  const article = el("article", { class: "card" },
    el("div", { class: "title" }, name, state.node, el("span", { class: "muted" }, "seen ", since), leaves),
    el("div", { class: "memory" }, el("span", { class: "muted" }, "Memory"), memory.node, used), known.node, rows.node, idle);
  return {
    node: article,
    update(now) {
      node = now;
      say(name, now.name);
      set(article, "aria-label", `node ${now.name}`);
      set(article, "data-id", now.name);
      set(leaves, "aria-label", `Node ${now.name} leaves`);
      state.update(now.alive ? "alive" : "silent");
      tick(since, now.seen_timestamp);
      const total = now.memory_total, taken = total - now.memory_available;
      memory.update(total ? taken / total : 0);
      say(used, total ? `${sizes(taken, total)} used` : NONE);
      known.update([
        ["GPUs", gpus(now.gpus, now.gpu_reason)],
        ["GPU memory", gpuMemory(now.gpus)],
        ["NVIDIA driver", now.gpu_driver || NONE],
        ["CPUs", String(now.cpus ?? NONE)],
        ["Load", typeof now.load === "number" ? now.load.toFixed(2) : NONE],
        ["Actions at work", now.actions ? { text: String(now.actions), href: link("actions", { node: now.name }) } : "0"],
        ["Cluster", now.cluster ?? NONE],
        ["hibernode", now.version ?? NONE],
        ["CRIU", now.criu ?? NONE],
        ["Kernel", `${now.kernel ?? NONE} ${now.arch ?? ""}`],
        ["Store", now.store ?? NONE],
        ...beats(now.heartbeats ?? []),
      ]);
      rows.update(now.workloads ?? []);
      set(rows.node, "hidden", !now.workloads?.length);
      set(idle, "hidden", Boolean(now.workloads?.length));
    },
  };
}

export function nodesView(root) {
  let all = [];
  const cards = el("div", { class: "cards" });
  const update = list(cards, (node) => `${node.cluster}/${node.name}`, card);
  const filter = el("input", { placeholder: "node or workload", ...PLAIN, "data-filter": true, oninput: () => show() });
  const none = empty(
    el("p", {}, "No node has said a word yet."),
    el("p", {}, "Start one: ", el("code", {}, "hibernode node"), ", with ", el("code", {}, "bus.url"), " set to the broker of this API."));
  const nothing = empty(el("p", {}, "No node and no workload has that in its name."));
  const wrong = failure(), count = el("span", { class: "muted" });
  const form = el("form", { class: "filters", role: "search", "aria-label": "Filter nodes" }, el("label", {}, "Name", filter), count);
  form.addEventListener("submit", (event) => event.preventDefault());
  root.append(heading("Nodes"), form, wrong.node, none, nothing, cards);

  function show() {
    const wanted = filter.value.trim().toLowerCase();
    const names = (node) => [node.name, ...(node.workloads ?? []).map(full)];
    const shown = all.filter((node) => names(node).some((name) => name.toLowerCase().includes(wanted)));
    const alive = all.filter((node) => node.alive).length;
    update(shown);
    say(count, `${many(alive, "node")} alive, ${all.length - alive} silent`);
    set(none, "hidden", all.length > 0);
    set(nothing, "hidden", all.length === 0 || shown.length > 0);
  }

  const take = ({ value }) => {
    wrong.update(null);
    all = value;
    show();
  };
  const polling = poll("/v2/nodes", take, { refused: (error) => wrong.update(error.details) });
  return { title: "Nodes", stop: polling.stop, focus: () => root.querySelector("h1") };
}
