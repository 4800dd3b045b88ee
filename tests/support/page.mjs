// A page for the dashboard's script without a browser: as much of a document as it uses, and no more.
//
// Reads {"answers": {place: [status, body]}, "token": …} from standard input, runs the script of the first
// argument against it until it has drawn once, and prints what the page shows and what was asked for.

import { readFileSync } from "node:fs";

const { answers, token } = JSON.parse(readFileSync(0, "utf-8"));
const asked = [];

class Node {
  constructor(name) {
    this.name = name;
    this.children = [];
    this.attributes = {};
    this.hidden = false;
    this.value = "";
    this.heard = {};
  }
  set textContent(text) { this.children = [String(text)]; }
  get textContent() { return this.children.map((each) => each.textContent ?? each).join(""); }
  append(...more) { this.children.push(...more); }
  replaceChildren(...more) { this.children = more; }
  setAttribute(key, value) { this.attributes[key] = value; }
  addEventListener(kind, listener) { this.heard[kind] = listener; }
  set className(value) { this.attributes.class = value; }
  set title(value) { this.attributes.title = value; }
}

const ids = {};
globalThis.Node = Node;
globalThis.document = {
  getElementById: (id) => (ids[id] ??= new Node(id)),
  createElement: (name) => new Node(name),
  createElementNS: (_, name) => new Node(name),
};
const kept = token ? { token } : {};
globalThis.sessionStorage = {
  getItem: (key) => kept[key] ?? null,
  setItem: (key, value) => { kept[key] = value; },
  removeItem: (key) => { delete kept[key]; },
};
globalThis.fetch = async (place, { headers }) => {
  asked.push([place, headers.Authorization ?? ""]);
  const [status, body] = answers[place] ?? [404, { error: `not known: ${place}` }];
  return { ok: status === 200, status, json: async () => structuredClone(body) };
};

function plain(node) {
  if (!(node instanceof Node)) return String(node);
  return { name: node.name, attributes: node.attributes, children: node.children.map(plain) };
}

// The script waits for its next look; that is when it has drawn.
globalThis.setTimeout = () => 0;
globalThis.clearTimeout = () => {};
await import(`data:text/javascript,${encodeURIComponent(readFileSync(process.argv[2], "utf-8"))}`);
await new Promise((resolve) => {
  let turns = 20;
  const turn = () => (turns-- > 0 ? setImmediate(turn) : resolve());
  turn();
});
const shown = Object.fromEntries(Object.entries(ids).map(([id, node]) =>
  [id, { hidden: node.hidden, text: node.textContent, tree: plain(node) }]));
process.stdout.write(JSON.stringify({ shown, asked, kept }));
