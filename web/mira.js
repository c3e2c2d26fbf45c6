// The only file that touches ComfyUI's app and api.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { CSS as CHART_CSS, createChart } from "./chart.js";
import { CSS as CHOICE_CSS, createChooser, heightOf, tabTitle, validChoice } from "./choice.js";
import { nodeAt, nodesOf, pathTo } from "./graph.js";
import { addPresets, addPromotedPresets, fold, learn, migrate } from "./inputs.js";
import { addDom, chain, fit, shrink } from "./node.js";
import { recordsOf } from "./png.js";
import { addStep, begun, csv, fromOutput, harmless, isNews, newRun, status } from "./series.js";
import { createTaker } from "./take.js";
import { textElement, textOf } from "./text.js";

// In pixels, of the chart with its status, and of the slider and its buttons.
const [CHART_HEIGHT, SCRUB_HEIGHT] = [206, 78];
const CHOOSER_WIDTH = 520; // at least, of a node on which images are compared
const MARGIN = 10; // that the canvas leaves around an element
const TYPE_COLOURS = { MIRA_REWARD: "#e0a458", MIRA_TRACE: "#4db6ac" };
const PREFERENCE = "MiraDPOPreference";
const MONITOR = "MiraDriftMonitor";
const TEXTS = new Map([
  ["MiraScoreImages", "Scores appear here."],
  [MONITOR, "The verdict appears here."],
  ["MiraSaveNoise", "The file's name appears here."],
]);
const CHARTED = new Set([
  "MiraOptimizeKSampler", "MiraOptimizeSamplerAdvanced", "MiraSearchKSampler", "MiraTiltKSampler", PREFERENCE,
]);
/**
 * On a node, and seen through the proxies that Vue hands out: { chart, chooser, text, shows: what its outputs go to, ran:
 * the id that it last ran by, looked: the preview that is looked at }.
 */
const VIEW = Symbol("MIRA view");

const rootGraph = () => app.rootGraph ?? app.graph;
const nodeOf = (id) => nodeAt(rootGraph(), id);

/** Where a run of this node was: the id of its execution, or what its place in the graph gives. */
function ranAt(node) {
  return node[VIEW]?.ran?.split(":") ?? pathTo(rootGraph(), node);
}

/** ComfyUI's own preview on the node shows this iterate, as it showed each one while the run went on. */
async function preview(node, stored) {
  const view = node[VIEW];
  view.looked = stored;
  const reply = await fetch(imageUrl(stored));
  const blob = reply.ok && (await reply.blob());
  const path = ranAt(node);
  // Meanwhile another workflow may be open, with another node in its place.
  if (!blob || !path || view.looked !== stored || nodeOf(path.join(":"))?.[VIEW] !== view) return;
  const ids = { nodeId: path.join(":"), displayNodeId: path.join(":"), realNodeId: path.join(":"), parentNodeId: path.slice(0, -1).join(":") };
  api.dispatchEvent(new CustomEvent("b_preview_with_metadata", { detail: { blob, ...ids } }));
}

/** What a node inside a subgraph says, on the node outside, which the frontend seeks in the open graph. */
function tellOutside(node, text) {
  const path = ranAt(node);
  const open = app.canvas?.graph;
  if (!path || path.length < 2 || (open && open !== rootGraph())) return;
  api.dispatchEvent(new CustomEvent("progress_text", { detail: { nodeId: String(path[0]), text: harmless(text) } }));
}

const openWorkflow = () => rootGraph()?.id;

/** Whether a run is of a node of this kind. What the server does not know fits. */
const isKind = (node, { kind }) => Boolean(node) && (!kind || kind === node.comfyClass);

/**
 * Whether a run is of this node: another workflow may have the same ids.
 *
 * also: workflows that are a copy, as far as the run goes, and were given its result.
 */
function isOf(node, { workflow, kind, also = [] }) {
  const open = openWorkflow();
  return isKind(node, { kind }) && (!workflow || !open || workflow === open || also.includes(open));
}

/** What `isOf` compares, of a node's output. */
const sourceOf = (output) => output?.mira_of?.[0] ?? output?.mira?.[0] ?? {};

/** What a node has put out is shown, if it is this one's. */
function onOutput(node, show) {
  const shows = (output) => isOf(node, sourceOf(output)) && show(output);
  node[VIEW].shows = [...(node[VIEW].shows ?? []), shows];
  chain(node, "onExecuted", shows);
}

/** A prompt of the open workflow was given another one's result, of which that is a copy: it is this one's as well. */
async function adopt({ node: id, display_node: shown, output, prompt_id }) {
  const node = nodeOf(shown ?? id);
  const source = sourceOf(output);
  if (!node?.[VIEW]?.shows || !isKind(node, source) || isOf(node, source)) return;
  const { workflow } = await get("/mira/live", { prompt_id, runs: "no" });
  if (!workflow || workflow !== openWorkflow() || nodeOf(shown ?? id) !== node) return;
  source.also = [...(source.also ?? []), workflow]; // of what the frontend keeps, for when the workflow is opened again
  for (const show of node[VIEW].shows) show(output);
}

/** The node that an event is of, where it is here and has a chart; it remembers by which name it runs. */
function chartedBy(detail) {
  const node = nodeOf(detail?.node);
  if (!isOf(node, detail) || !node[VIEW]?.chart) return null;
  node[VIEW].ran = String(detail.node);
  return node;
}

function imageUrl({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder: subfolder ?? "", type: type ?? "temp" })}`);
}

function saveAs(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const taker = createTaker({
  rootGraph, nodeOf, placeOf: ranAt, prompt: () => app.graphToPrompt(), queue: () => app.queuePrompt(0),
  askedOf: async (run) => (await get("/mira/live", { asked: run.id ?? "", runs: "no" }).catch(() => ({}))).asked ?? null,
});

/** Styles for charts, texts and choosers, once per page. */
function addStyles() {
  if (document.getElementById("mira-styles")) return;
  const link = document.createElement("link");
  Object.assign(link, { rel: "stylesheet", href: new URL("./vendor/uPlot.min.css", import.meta.url).href });
  const style = document.createElement("style");
  Object.assign(style, { id: "mira-styles", textContent: CHART_CSS + CHOICE_CSS });
  document.head.append(link, style);
}

const charts = new Map(); // those with a record, and their nodes

function dropChart(chart) {
  chart.destroy();
  charts.delete(chart);
}

/** Some frontends do not tell a node within a subgraph that its graph was closed. views: of all nodes that are here. */
function dropGone(views) {
  const here = new Set(views.map(({ chart }) => chart));
  for (const [chart, node] of charts) if (node.graph && !here.has(chart)) dropChart(chart);
  for (const chooser of choosers) if (nodeOf(chooser.choice()?.node)?.[VIEW]?.chooser !== chooser) chooser.hide();
}

function addCharted(node) {
  addStyles();
  const onTake = node.comfyClass === MONITOR ? null : (k, anew) => taker.take(node, chart, k, anew);
  const onLook = (stored) => preview(node, stored).catch((problem) => console.warn("MIRA: no preview:", problem));
  const first = node.comfyClass === MONITOR ? "The first trace's reward and drift appear here." : null;
  const chart = createChart({ imageUrl, saveAs, onTake, onLook, first });
  const view = { ...node[VIEW], chart };
  let tall = 0; // asked for at every frame, when to measure is to lay the page out
  let lower = null; // the node's height before the first choice of a run
  let fitted = 0; // and as it was made for them: another one is somebody's own
  if (node.comfyClass === PREFERENCE) {
    view.chooser = createChooser({ imageUrl, onAnswer: answer });
    chart.inner.prepend(view.chooser.element);
    new MutationObserver(() => {
      if (view.chooser.choice()) lower ??= node.size[1];
      fit(node, view.chooser.choice() ? CHOOSER_WIDTH : undefined);
      fitted = node.size[1];
      callFor(view.chooser);
    }).observe(view.chooser.element, { attributeFilter: ["hidden"] });
    chain(node, "onRemoved", () => view.chooser.hide());
  }
  addDom(node, "mira_chart", chart.element, () => {
    const scrub = chart.run().rows.length ? SCRUB_HEIGHT : 0;
    const choice = view.chooser?.choice();
    // Notices, and a status of two lines, take what they take.
    const usual = CHART_HEIGHT + scrub + (choice ? heightOf(choice.images.length) : 0);
    return Math.max(usual, tall + 2 * MARGIN);
  });
  new ResizeObserver(() => {
    tall = chart.inner.offsetHeight;
    fit(node, 0);
  }).observe(chart.inner);
  node[VIEW] = view;
  onOutput(node, (output) => {
    const run = fromOutput(output);
    if (run) showRun(node, chart, run);
    view.chooser?.hide();
    if (lower !== null && node.size[1] === fitted) setTimeout(shrink, 100, node, lower); // once it is laid out without
    lower = null;
  });
  chain(node, "onRemoved", () => dropChart(chart));
  fit(node);
}

function showRun(node, chart, run) {
  const empty = chart.run().rows.length === 0;
  chart.set(run);
  charts.set(chart, node);
  if (run.rows.length) tellOutside(node, status(run, 0));
  if (empty && run.rows.length) fit(node);
}

function addText(node) {
  addStyles();
  const { outer, inner } = textElement(document, TEXTS.get(node.comfyClass));
  addDom(node, "mira_text", outer, () => Math.min(Math.max(inner.scrollHeight + 8, 48), 248));
  const show = (output) => {
    const text = textOf(output);
    if (text === null) return;
    inner.textContent = text;
    node.setDirtyCanvas?.(true, true);
  };
  node[VIEW] = { ...node[VIEW], text: show };
  onOutput(node, show);
}

/** Post an answer; null when it was taken, else why not. */
async function answer({ prompt_id, node, token }, choice) {
  const body = { prompt_id, node_id: node, token, choice, client_id: api.clientId };
  try {
    const reply = await api.fetchApi("/mira/choice", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    if (reply.ok) return null;
    if (reply.status === 409) restoreSoon(); // it may be over
    return (await reply.json()).error ?? `the server answered ${reply.status}`;
  } catch (problem) {
    return `the server cannot be reached (${problem.message}); the choice is still open`;
  }
}

const choosers = new Set(); // those with a choice

/** The tab calls for whoever looks elsewhere; ComfyUI writes its title anew when a run gets on. */
function callFor(chooser) {
  if (chooser.choice()) choosers.add(chooser);
  else choosers.delete(chooser);
  callInTitle();
}

function callInTitle() {
  const title = tabTitle(document.title, choosers.size > 0);
  if (title !== document.title) document.title = title;
}

function showChoice(data) {
  const choice = validChoice(data);
  const node = choice && nodeOf(choice.node);
  const { chooser, chart } = (isOf(node, choice ?? {}) && node[VIEW]) || {};
  if (!chooser) return;
  chooser.show(choice);
  if (chart.run().rows.length === 0) chart.set({ ...chart.run(), waiting: "Waiting for your choice" });
  tellOutside(node, "Waiting for your choice: open the subgraph");
}

async function get(path, more = {}) {
  const reply = await api.fetchApi(`${path}?${new URLSearchParams({ client_id: api.clientId ?? "", ...more })}`);
  return reply.ok ? reply.json() : {};
}

/**
 * After a page was loaded, a connection came back or a graph was opened: what the server knows, and history.
 *
 * cached: ids of nodes that are not run again, of the prompt promptId. missed: whether a whole run may have come and
 * gone meanwhile.
 */
async function restore(cached = [], missed = false, promptId = "") {
  const views = [...nodesOf(rootGraph())].map(({ node }) => node[VIEW]).filter(Boolean);
  dropGone(views);
  if (!views.length) return; // nothing here to be restored
  const shown = new Set([...choosers].map((chooser) => chooser.choice()?.token)); // before anything was asked
  // Without a server there is history all the same.
  const [live, waiting] = await Promise.all([get("/mira/live", { nodes: cached.join(), prompt_id: promptId }), get("/mira/choice")]).catch((problem) => (warn(problem), [{}, {}]));
  // What the server no longer waits for was answered elsewhere, or is over.
  const open = waiting.pending && new Set(waiting.pending.map((choice) => choice.token));
  for (const chooser of open ? choosers : []) {
    const token = chooser.choice()?.token;
    if (shown.has(token) && !open.has(token)) chooser.hide(token);
  }
  // One that has told of no image may be over: nothing is known of it.
  const runs = (live.runs ?? []).filter((known) => (known.output || known.rows.length) && isOf(nodeOf(known.node), known));
  const running = new Set(runs.filter((known) => !known.output).map((known) => String(known.node)));
  const asking = new Set((waiting.pending ?? []).map((choice) => String(choice.node)));
  for (const { node, path, output: name } of nodesOf(rootGraph())) {
    const view = node[VIEW];
    const output = app.nodeOutputs?.[name];
    if (!view || !output || !isOf(node, sourceOf(output))) continue;
    view.text?.(output);
    const run = view.chart && fromOutput(output);
    const empty = view.chart?.run().rows.length === 0 && !view.chart.run().id;
    const id = path.join(":");
    if (run && empty && !running.has(id) && !asking.has(id)) showRun(node, view.chart, run);
  }
  for (const known of runs) {
    const node = nodeOf(known.node);
    const chart = node[VIEW]?.chart;
    if (!chart) continue;
    if (!isNews(chart.run(), known, missed)) continue;
    showRun(node, chart, fromOutput(known.output) ?? { ...newRun(), ...known, id: known.run, done: false });
  }
  for (const choice of waiting.pending ?? []) showChoice(choice);
}

/** A picture that is dropped brings its workflow, which ComfyUI opens, and its record, which is shown then. */
let dropped = null; // { at, found: a promise of `recordsOf` }
const DROP_LASTS = 20_000; // milliseconds until its workflow is open

function noteDrop(event) {
  const file = event.dataTransfer?.files?.[0];
  if (file?.type === "image/png") dropped = { at: Date.now(), found: file.arrayBuffer().then(recordsOf).catch(() => null) };
}

async function showDropped() {
  const last = dropped; // of the first graph that is opened, or of none
  dropped = null;
  const found = last && Date.now() - last.at < DROP_LASTS ? await last.found : null;
  if (!found?.workflow || found.workflow !== openWorkflow()) return;
  for (const [id, trace] of found.records) {
    const node = nodeOf(id);
    const run = CHARTED.has(node?.comfyClass) && fromOutput({ mira: [trace] });
    if (run) showRun(node, node[VIEW].chart, run);
  }
}

const warn = (problem) => console.warn("MIRA: the server cannot be asked:", problem);

function restoreSoon(cached, missed = false, promptId = "") {
  return new Promise((done) => setTimeout(done, 50)).then(() => restore(cached, missed, promptId)).catch(warn);
}

/** Links and slots of the pack's own types, in either renderer. A palette that is loaded forgets them. */
function colourTypes() {
  const page = document.documentElement.style;
  for (const [type, colour] of Object.entries(TYPE_COLOURS)) {
    const known = window.LGraphCanvas?.link_type_colors;
    if (known) known[type] = colour;
    const slots = app.canvas?.default_connection_color_byType;
    if (slots) slots[type] = colour;
    const name = `--color-datatype-${type}`;
    if (page.getPropertyValue(name) !== colour) page.setProperty(name, colour); // a write is seen by who looks for a palette
  }
}

/** A palette is a set of variables on the page's root. */
function watchColours() {
  let frame = 0;
  const look = () => {
    frame = 0;
    colourTypes();
    for (const { node } of nodesOf(rootGraph())) node[VIEW]?.chart?.restyle();
  };
  new MutationObserver(() => {
    frame ||= requestAnimationFrame(look);
  }).observe(document.documentElement, { attributeFilter: ["style", "class"] });
}

app.registerExtension({
  name: "MIRA",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (CHARTED.has(nodeData.name)) learn(nodeData);
  },
  beforeConfigureGraph: (graph) => migrate(graph),
  setup() {
    api.addEventListener("mira.step", ({ detail }) => {
      const node = chartedBy(detail);
      if (!node) return;
      showRun(node, node[VIEW].chart, addStep(node[VIEW].chart.run(), detail));
    });
    // A run that begins shows nothing of the last one, and says what it does until its first image is there.
    api.addEventListener("mira.begin", ({ detail }) => {
      const chart = chartedBy(detail)?.[VIEW].chart;
      chart?.set(begun(chart.run(), detail));
    });
    api.addEventListener("mira.seed", ({ detail }) => {
      const chart = chartedBy(detail)?.[VIEW].chart;
      if (!chart || (chart.run().id === detail.run && chart.run().rows.length)) return;
      chart.set(begun(chart.run(), detail));
    });
    for (const [event, ended] of [["execution_error", "an error"], ["execution_interrupted", "a cancel"]]) {
      api.addEventListener(event, ({ detail }) => {
        const chart = nodeOf(detail?.node_id)?.[VIEW]?.chart;
        const run = chart?.run();
        if (!run?.id || run.done) return;
        chart.set({ ...run, ended, waiting: run.waiting && "It ended before its first image." });
      });
    }
    api.addEventListener("mira.choice", ({ detail }) => showChoice(detail));
    api.addEventListener("mira.chosen", ({ detail }) => nodeOf(detail?.node)?.[VIEW]?.chooser?.hide(detail.token));
    // A node that is not run again says nothing: its last run is asked for.
    api.addEventListener("execution_cached", ({ detail }) => {
      restoreSoon(detail?.nodes?.filter((id) => nodeOf(id)?.[VIEW]), false, detail?.prompt_id);
    });
    api.addEventListener("executed", ({ detail }) => adopt(detail ?? {}).catch(warn));
    api.addEventListener("reconnected", () => restoreSoon([], true));
    // A page that was loaded again learns who it is from the socket's first word: until then no choice is shown to it.
    let client = api.clientId;
    api.addEventListener("status", () => {
      if (api.clientId === client) return;
      client = api.clientId;
      restoreSoon();
    });
    // ComfyUI writes the title when a run gets on, new editors only at the next frame: after the choice has come.
    new MutationObserver(callInTitle).observe(document.head, { childList: true, subtree: true, characterData: true });
    watchColours();
    document.addEventListener("drop", noteDrop, true);
    document.addEventListener("visibilitychange", () => document.hidden || restoreSoon());
    restoreSoon();
  },
  nodeCreated(node) {
    if (node.comfyClass?.startsWith("Mira")) colourTypes();
    if (TEXTS.has(node.comfyClass)) addText(node);
    if (CHARTED.has(node.comfyClass)) fold(node);
    if (CHARTED.has(node.comfyClass) || node.comfyClass === MONITOR) addCharted(node);
    if (CHARTED.has(node.comfyClass)) {
      addPresets(node, () => app.configuringGraph);
      taker.watch(node);
    }
    // A subgraph's node has its widgets once it is in the graph, or once its graph is open.
    if (node.subgraph) setTimeout(() => addPromotedPresets(node));
  },
  afterConfigureGraph() {
    colourTypes();
    for (const node of rootGraph()?.nodes ?? []) addPromotedPresets(node);
    restoreSoon().then(showDropped).catch(warn);
  },
  getNodeMenuItems(node) {
    const chart = node?.[VIEW]?.chart;
    if (!chart) return [];
    const disabled = chart.run().rows.length === 0;
    return [{ content: "Save MIRA record as CSV", disabled, callback: () => saveAs("mira_trace.csv", csv(chart.run())) }];
  },
});
