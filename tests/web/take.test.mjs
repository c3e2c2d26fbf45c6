// What taking an iterate writes, and when nothing is taken.
import assert from "node:assert/strict";
import { test } from "node:test";
import { begun } from "../../web/series.js";
import { createTaker } from "../../web/take.js";

/** Nodes as the frontends have them: { id: [widgets, { input: [origin, slot] }] }. */
function graphOf(nodes) {
  const links = [];
  const graph = { nodes: [], getNodeById: (id) => graph.nodes.find((n) => n.id === Number(id)) ?? null, getLink: (id) => links[id] };
  for (const [id, [widgets, inputs = {}]] of Object.entries(nodes)) {
    graph.nodes.push({
      id: Number(id), graph, comfyClass: `kind ${id}`, title: `node ${id}`, properties: {},
      widgets: Object.entries(widgets).map(([name, value]) => ({ name, value })),
      inputs: Object.entries(inputs).map(([name, [origin_id, origin_slot]]) => ({ name, widget: { name }, link: links.push({ origin_id, origin_slot }) - 1 })),
    });
  }
  return graph;
}

const valueOf = (graph, id, name) => graph.getNodeById(id).widgets.find((w) => w.name === name).value;

/** An optimiser whose `iterate` comes from a primitive that something else reads too, behind a sampler with a seed of its own. */
function world({ cfg = 5, asked = true, shared = false } = {}) {
  const graph = graphOf({
    1: [{ seed: 9, control_after_generate: "randomize", cfg, iterate: -1, final_restart: 0.3 }, { iterate: [2, 0], latent: [3, 0] }],
    2: [{ value: -1 }],
    3: [{ seed: 77, control_after_generate: "randomize", steps: 8 }, shared ? { steps: [2, 0] } : {}],
  });
  const prompt = () => Object.fromEntries(graph.nodes.map((node) => {
    const linked = Object.fromEntries(node.inputs.map((i) => [i.name, [String(graph.getLink(i.link).origin_id), 0]]));
    const own = Object.fromEntries(node.widgets.filter((w) => w.name !== "control_after_generate").map((w) => [w.name, w.value]));
    return [String(node.id), { class_type: node.comfyClass, inputs: { ...own, ...linked } }];
  }));
  const was = structuredClone(Object.fromEntries(Object.entries(prompt()).map(([id, of]) => [id, [of.class_type, of.inputs]])));
  [was[1][1].cfg, was[1][1].seed, was[3][1].seed] = [5, 5, 44];
  let run = { id: "r", done: true, settings: { seed: 5 }, refused: null };
  const queued = [];
  const taker = createTaker({
    rootGraph: () => graph, nodeOf: (id) => graph.getNodeById(id), placeOf: (node) => [node.id],
    askedOf: async () => (asked ? was : null), prompt: async () => ({ output: prompt() }), queue: () => queued.push(prompt()),
  });
  const chart = { run: () => run, set: (next) => (run = next) };
  return { graph, node: graph.getNodeById(1), taker, chart, queued };
}

test("an iterate that comes by a link is taken, with every seed as it was", async () => {
  const { graph, node, taker, chart, queued } = world();
  await taker.take(node, chart, 3, false);
  assert.equal(chart.run().refused, null);
  assert.equal(queued.length, 1);
  assert.deepEqual([valueOf(graph, 2, "value"), valueOf(graph, 1, "seed"), valueOf(graph, 3, "seed"), valueOf(graph, 1, "final_restart")], [3, 5, 44, 0]);
  assert.deepEqual([1, 3].map((id) => valueOf(graph, id, "control_after_generate")), ["fixed", "fixed"]);
});

test("of a graph that has changed nothing is taken, and every widget is as it was", async () => {
  const { graph, node, taker, chart, queued } = world({ cfg: 6 });
  const before = structuredClone(graph.nodes.map((n) => n.widgets));
  await taker.take(node, chart, 3, true);
  assert.match(chart.run().refused, /node 1: cfg was 5, is 6/);
  assert.deepEqual(graph.nodes.map((n) => n.widgets), before);
  assert.equal(queued.length, 0);
});

test("where something else reads the same primitive it would be another run", async () => {
  const { graph, node, taker, chart, queued } = world({ shared: true });
  const before = structuredClone(graph.nodes.map((n) => n.widgets));
  await taker.take(node, chart, 3, false);
  assert.match(chart.run().refused, /iterate comes from node 2, which gives its value to other inputs too.*of its own/);
  assert.deepEqual(graph.nodes.map((n) => n.widgets), before);
  assert.equal(queued.length, 0);
});

test("a run that the server does not know is run again, and that is said", async () => {
  const { node, taker, chart, queued } = world({ asked: false });
  await taker.take(node, chart, 2, true);
  assert.deepEqual([queued.length, queued[0][1].inputs.final_restart, chart.run().refused], [1, 0.3, null]);
  const next = begun(chart.run(), { run: "s", seeds: 2 });
  assert.equal(next.waiting, "The server kept nothing of that run: it is run again. Trying 2 seeds ...");
  const tried = begun(next, { run: "s", seeds: 2, count: 1 });
  assert.equal(tried.waiting, "The server kept nothing of that run: it is run again. Trying 2 seeds: 1 of them done");
  assert.equal(begun(tried, { run: "t", seeds: 1 }).waiting, "Sampling the first image ..."); // of that run alone
});

test("another setting forgets what was taken, and resets nothing that others read where nothing was", async () => {
  const { graph, node, taker, chart } = world();
  taker.watch(node);
  const set = (name, value) => {
    const widget = node.widgets.find((w) => w.name === name);
    widget.value = value;
    widget.callback?.(value);
  };
  graph.getNodeById(2).widgets[0].value = 4; // by hand
  set("cfg", 7);
  assert.equal(valueOf(graph, 2, "value"), 4);
  set("cfg", 5);
  await taker.take(node, chart, 3, true);
  assert.equal(valueOf(graph, 2, "value"), 3);
  set("cfg", 8);
  assert.deepEqual([valueOf(graph, 2, "value"), valueOf(graph, 1, "final_restart")], [-1, 0.3]);
});
