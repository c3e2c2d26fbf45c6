// Where a node stands, and what its values come from.
import assert from "node:assert/strict";
import { test } from "node:test";
import { giverOf, nodeAt, nodesOf, pathTo, promoted, signature } from "../../web/graph.js";

/** nodes: { id: { widgets: { name: value }, inputs: { name: [origin, slot] }, subgraph: a graph } }. */
function graphOf(nodes, id = "g", slots = []) {
  const links = {};
  const graph = { id, inputs: slots.map((name) => ({ name })), getLink: (n) => links[n] };
  graph.nodes = Object.entries(nodes).map(([key, { widgets = {}, inputs = {}, subgraph }]) => {
    const names = new Set([...Object.keys(widgets), ...Object.keys(inputs)]);
    const node = { id: Number(key), graph, type: `kind ${key}`, subgraph };
    node.widgets = Object.entries(widgets).map(([name, value]) => ({ name, value }));
    node.inputs = [...names].map((name) => {
      if (!inputs[name]) return { name, widget: { name }, link: null };
      const [origin, slot] = inputs[name];
      const link = Object.keys(links).length + 1;
      links[link] = { origin_id: origin, origin_slot: slot };
      return { name, widget: name in widgets ? { name } : undefined, link };
    });
    return node;
  });
  graph.getNodeById = (wanted) => graph.nodes.find((n) => n.id === wanted) ?? null;
  return graph;
}

/** A sampler in a subgraph, whose seed is set outside and whose model and steps come from within; and one beside it. */
function whole() {
  const inner = graphOf({
    1: { widgets: { seed: 0, iterate: -1, again: 0, steps: 20 }, inputs: { seed: [-10, 1], again: [-10, 2], model: [2, 0], steps: [3, 0] } },
    2: { widgets: { name: "a" } },
    3: { widgets: { value: 30 } },
  }, "inner", ["text", "seed", "final"]);
  return graphOf({
    5: { widgets: { text: "a fox", seed: 7, final: 0 }, subgraph: inner },
    6: { widgets: { seed: 1 }, inputs: { seed: [8, 0] } },
    7: { widgets: { filename: "x" }, inputs: { images: [5, 0] } },
    8: { widgets: { value: 4 } },
  });
}

test("a node is found by its execution id, and the id by the node", () => {
  const root = whole();
  assert.deepEqual(["5:1", "6"].map((id) => nodeAt(root, id)?.type), ["kind 1", "kind 6"]);
  for (const none of ["9", "6:1", "5:9", ""]) assert.equal(nodeAt(root, none), null);
  assert.deepEqual(["5:1", "6"].map((id) => pathTo(root, nodeAt(root, id))), [[5, 1], [6]]);
  assert.equal(pathTo(root, { id: 1, graph: {} }), null);
  for (const { node, path } of nodesOf(root)) assert.deepEqual(path, pathTo(root, node));
  assert.deepEqual([...nodesOf(root)].map(({ output }) => output), ["5", "inner:1", "inner:2", "inner:3", "6", "7", "8"]);
});

test("a value is given by a widget of one's own, of a linked node, or of a node outside", () => {
  const root = whole();
  const given = (path, names) => {
    const { node, name, path: at } = giverOf(root, path, names);
    assert.equal(nodeAt(root, at.join(":")), node);
    return [node.type, name, ...at];
  };
  assert.deepEqual(given([5, 1], ["seed"]), ["kind 5", "seed", 5]);
  assert.deepEqual(given([5, 1], ["iterate"]), ["kind 1", null, 5, 1]);
  assert.deepEqual(given([5, 1], ["steps"]), ["kind 3", null, 5, 3]);
  assert.deepEqual(given([6], ["seed", "noise"]), ["kind 8", null, 8]);
  assert.equal(promoted(nodeAt(root, "5"), nodeAt(root, "5:1"), "seed").value, 7);
  assert.ok(!promoted(nodeAt(root, "5"), nodeAt(root, "5:1"), "steps"));
});

test("a signature changes with what a node is given, and with nothing else", () => {
  const of = (change = () => {}) => {
    const root = whole();
    change((id, name, value) => (nodeAt(root, id).widgets.find((w) => w.name === name).value = value));
    return signature(root, [5, 1], ["iterate", "again"]);
  };
  const same = of();
  for (const [id, name, value] of [["5:1", "iterate", 3], ["5", "final", 0.5], ["5:1", "seed", 99], ["7", "filename", "y"], ["8", "value", 5]]) {
    assert.equal(of((set) => set(id, name, value)), same, `${id} ${name}`);
  }
  for (const [id, name, value] of [["5", "seed", 8], ["5:2", "name", "b"], ["5:3", "value", 31], ["5", "text", "a cat"]]) {
    assert.notEqual(of((set) => set(id, name, value)), same, `${id} ${name}`);
  }
});
