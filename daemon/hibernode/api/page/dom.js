// The only way into the document. What comes from elsewhere becomes text nodes and attributes, never HTML; characters that are no
// text (controls, overrides of the writing direction) become a visible replacement.

const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\p{Zl}\p{Zp}]/gu;

export const clean = (text) => String(text).replace(UNPRINTABLE, (found) => found === "\n" || found === "\t" ? found : "\ufffd");

const SVG = new Set(["svg", "use", "rect"]);

export function el(tag, attributes = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else set(node, name, value);
  }
  node.append(...children.flat().filter((child) => child !== null).map((child) => child instanceof Node ? child : clean(child)));
  return node;
}

/** An attribute, touched only if it changes; null and false take it away. */
export function set(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
    return;
  }
  const wanted = value === true ? "" : clean(value);
  if (node.getAttribute(name) !== wanted) node.setAttribute(name, wanted);
}

/** The text of a node, touched only if it changes: what somebody has selected stays selected. */
export function say(node, text) {
  const wanted = clean(text);
  if (node.textContent !== wanted) node.textContent = wanted;
}

/** Children that follow `items` by key: nodes stay who they are, so focus and selection do. `create(item)` gives {node, update}. */
export function list(parent, keyOf, create) {
  const rows = new Map();
  return (items) => {
    const wanted = new Set(items.map(keyOf));
    let focused = -1;
    for (const [key, row] of rows) {
      if (wanted.has(key)) continue;
      if (row.node.contains(document.activeElement)) focused = [...parent.children].indexOf(row.node);
      row.node.remove();
      rows.delete(key);
    }
    let next = parent.firstChild;
    for (const item of items) {
      const key = keyOf(item);
      let row = rows.get(key);
      if (!row) rows.set(key, row = create(item));
      row.update(item);
      if (row.node === next) next = next.nextSibling;
      else parent.insertBefore(row.node, next);
    }
    if (focused >= 0) parent.children[Math.min(focused, parent.children.length - 1)]?.focus();
  };
}

const live = () => document.getElementById("live");

/** Say it to those who do not see it change. */
export function announce(text) {
  const node = live();
  node.replaceChildren(el("p", {}, text));
}
