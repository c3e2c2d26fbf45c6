// Pure: where a node stands in a graph of subgraphs, and what its values come from. Nothing of the page.

const SUBGRAPH_INPUT = "-10"; // the id of a subgraph's inputs, where a link begins

/** The node of an execution id, "12" or "12:5" within subgraphs, or null. */
export function nodeAt(root, id) {
  let graph = root;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(part) ?? graph?.getNodeById?.(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/** The execution id of a node: [...the subgraph nodes around it, its own], or null for one that is in no graph. */
export function pathTo(root, node) {
  for (const other of root?.nodes ?? []) {
    if (other === node || (other.id === node.id && other.graph === node.graph)) return [other.id];
    const inner = other.subgraph && pathTo(other.subgraph, node);
    if (inner) return [other.id, ...inner];
  }
  return null;
}

/**
 * Every node, with those within subgraphs: { node, path, output }, its execution id in parts, and by which name the
 * frontend keeps its output. holders: the ids of the subgraph nodes around the graph.
 */
export function* nodesOf(graph, holders = []) {
  for (const node of graph?.nodes ?? []) {
    const path = [...holders, node.id];
    yield { node, path, output: holders.length ? `${graph.id}:${node.id}` : String(node.id) };
    if (node.subgraph) yield* nodesOf(node.subgraph, path);
  }
}

function linkOf(node, input) {
  return input?.link == null ? null : (node.graph?.getLink?.(input.link) ?? node.graph?.links?.[input.link] ?? null);
}

/** The slot of the subgraph around a node by which a link comes in, or null. */
function slotOf(holder, link) {
  return String(link?.origin_id) === SUBGRAPH_INPUT ? (holder?.subgraph?.inputs[link.origin_slot] ?? null) : null;
}

/** The widget on a subgraph's node that gives its value to one inside, or undefined. */
export function promoted(holder, node, name) {
  const input = node.inputs?.find((i) => i.widget?.name === name);
  const slot = input?.link == null ? null : slotOf(holder, holder.subgraph.getLink?.(input.link));
  return slot && holder.widgets?.find((w) => w.name === slot.name);
}

/**
 * The node whose widget gives an input (the first of `names` that has a link) its value: this one, one that is linked to
 * it, or, of a node in a subgraph, one outside. path: the execution id of the node. Returns { node, name, path }: the
 * widget's name on a subgraph's node, null on any other; its own execution id.
 */
export function giverOf(root, path, names) {
  const node = nodeAt(root, path.join(":"));
  const input = node?.inputs?.find((i) => names.includes(i.name) && i.link != null);
  const link = linkOf(node, input);
  if (!link) return { node, name: null, path };
  const holder = path.slice(0, -1);
  const slot = holder.length ? slotOf(nodeAt(root, holder.join(":")), link) : null;
  if (!slot) {
    const origin = node.graph.getNodeById(link.origin_id);
    return origin ? { node: origin, name: null, path: [...holder, link.origin_id] } : { node, name: null, path };
  }
  const further = giverOf(root, holder, [slot.name]);
  return further.node === nodeAt(root, holder.join(":")) ? { ...further, name: slot.name } : further;
}

/**
 * A string that tells whether what a node gives could be another: its widgets, and all that stands before it. but: inputs
 * of the node that do not count, wherever their values come from.
 */
export function signature(root, path, but = []) {
  const seen = new Set();
  const said = [];
  const givers = but.map((name) => ({ input: name, ...giverOf(root, path, [name]) }));
  const look = (node, holders) => {
    if (!node || seen.has(node)) return;
    seen.add(node);
    const skip = givers.filter((of) => of.node === node).flatMap((of) => (of.name ? [of.name] : [of.input, "value"]));
    said.push([node.id, node.comfyClass ?? node.type, node.mode, ...values(node, skip)]);
    for (const input of node.inputs ?? []) {
      const link = linkOf(node, input);
      if (!link) continue;
      const holder = holders.at(-1);
      said.push([node.id, input.name, link.origin_id, link.origin_slot]);
      if (slotOf(holder, link)) look(holder, holders.slice(0, -1));
      else look(node.graph.getNodeById(link.origin_id), holders);
    }
    for (const inner of node.subgraph?.nodes ?? []) look(inner, [...holders, node]);
  };
  const holders = path.slice(0, -1).map((_, n) => nodeAt(root, path.slice(0, n + 1).join(":")));
  look(nodeAt(root, path.join(":")), holders);
  return digest(JSON.stringify(said));
}

export const CONTROL = "control_after_generate"; // says what becomes of a seed afterwards

/** Of what is set on the node itself: what a link gives is its origin's. */
function values(node, skip) {
  const linked = new Set(node.inputs?.filter((i) => i.widget && i.link != null).map((i) => i.widget.name));
  const own = (node.widgets ?? []).filter(({ name }) => name !== CONTROL && !skip.includes(name) && !linked.has(name));
  return own.filter((w) => ["string", "number", "boolean"].includes(typeof w.value)).map((w) => [w.name, w.value]);
}

/** FNV-1a, 32 bits. */
function digest(text) {
  let hash = 0x811c9dc5;
  for (let i = 0; i < text.length; i += 1) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  return (hash >>> 0).toString(16);
}
