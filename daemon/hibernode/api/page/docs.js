// The document of the API, for people: every operation with what it takes and what it answers.
import { el } from "./dom.js";
import { bindTheme } from "./theme.js";

bindTheme(document.querySelector("#theme"));

const named = (schema) => {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.oneOf || schema.anyOf) return (schema.oneOf ?? schema.anyOf).map(named).join(" or ");
  if (schema.type === "array") return `list of ${named(schema.items)}`;
  const type = [schema.type ?? "anything"].flat().join(" or ");
  return schema.enum ? schema.enum.join(" | ") : type;
};

const content = (holder) => Object.entries(holder?.content ?? {})
  .map(([media, { schema }]) => media === "application/json" ? named(schema) : media).join(", ");

const table = (label, heads, rows) => el("table", { class: "rows", "aria-label": label },
  el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
  el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell) => el("td", { class: "name" }, cell))))));

function operation(method, path, found) {
  const body = content(found.requestBody);
  const parameters = (found.parameters ?? []).map((each) => [
    `${each.name}${each.required ? "" : " (optional)"}`, each.in, named(each.schema), each.description ?? "",
  ]);
  return el("section", { id: found.operationId },
    el("h2", {}, el("code", {}, `${method.toUpperCase()} ${path}`), ` ${found.summary ?? ""}`),
    el("p", {}, found.description ?? ""),
    body ? el("p", {}, "Body: ", el("a", { href: `#schema-${body}` }, body)) : null,
    parameters.length ? table(`parameters of ${found.operationId}`, ["Parameter", "In", "Type", "Meaning"], parameters) : null,
    table(`answers of ${found.operationId}`, ["Status", "Answer", "When"],
      Object.entries(found.responses).map(([status, answer]) => [status, content(answer), answer.description])));
}

function shape(name, schema) {
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([key, value]) => [
    `${key}${required.has(key) ? "" : " (optional)"}`, named(value), value.description ?? "",
  ]);
  return el("section", { id: `schema-${name}` }, el("h2", {}, el("code", {}, name)), el("p", {}, schema.description ?? ""),
    rows.length ? table(name, ["Property", "Type", "Meaning"], rows) : el("p", {}, named(schema)));
}

const state = document.querySelector("#state");
try {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
  const found = await answer.json();
  const operations = Object.entries(found.paths)
    .flatMap(([path, methods]) => Object.entries(methods).map(([method, each]) => operation(method, path, each)));
  const shapes = Object.entries(found.components.schemas).map(([name, schema]) => shape(name, schema));
  document.querySelector("#operations").append(...operations, el("h1", {}, "Shapes"), ...shapes);
  state.textContent = `Version ${found.info.version}: ${operations.length} operations.`;
  document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
} catch (error) {
  state.textContent = `The document cannot be had: ${error.message}.`;
}
