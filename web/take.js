// Taking an iterate of a run: what is written into the widgets, and when it is forgotten. The page is handed in.
import { differences, whyNotTaken, whyShared } from "./asked.js";
import { CONTROL, giverOf, signature } from "./graph.js";
import { chain } from "./node.js";

const PAINTED = 0.65; // the share of the noise that an iterate is painted anew from, where none is set
const USUAL = "mira_final_restart"; // a node's property: what `final_restart` was before an iterate was taken
const TAKEN = "mira_taken"; // a node's property: the signature of what an iterate was taken of
const [ITERATE, RESTART] = ["iterate", "final_restart"];
const SEEDS = ["seed", "noise_seed", "value"]; // the widgets that a seed is in
const SEEDED = ["seed", "noise"]; // the inputs that it may come by

/**
 * rootGraph(), nodeOf(id), placeOf(node): its execution id in parts. askedOf(run): what the server knows that the run was
 * made from, or null. prompt(): what would be queued now. queue().
 * Returns { take, watch }.
 */
export function createTaker({ rootGraph, nodeOf, placeOf, askedOf, prompt, queue }) {
  const busy = new WeakSet(); // nodes of which one is being taken
  const known = new WeakMap(); // of a node: its widgets' values at the last run

  /** The widget that gives an input its value, wherever it is. names: what it is called there. */
  function giver(path, inputs, names = [...inputs, "value"]) {
    const { node, name, path: at } = giverOf(rootGraph(), path, inputs);
    return { node, at, widget: node?.widgets?.find((w) => (name ? w.name === name : names.includes(w.name))) };
  }

  /** Return iterate k, or that painted anew: the run's own seeds again, fixed, and `iterate`; all else is as it was. */
  async function take(node, chart, iterate, anew) {
    const run = chart.run();
    if (!run.done || busy.has(node)) return;
    const tell = (refused) => chart.run().id === run.id && chart.set({ ...run, refused }); // else another has begun
    busy.add(node);
    try {
      const asked = await askedOf(run);
      const isOver = () => chart.run().id !== run.id;
      if (isOver()) return;
      const refused = await write(node, run, asked, iterate, anew, isOver);
      if (refused !== null) return tell(refused);
      chart.set({ ...chart.run(), refused, unknown: !asked });
      queue();
    } catch (problem) {
      tell(`Not taken: ${problem.message}`);
    } finally {
      busy.delete(node);
    }
  }

  /** The seeds of other nodes that have moved on since: [[widget, its value then], ...]. */
  function moved(asked, own) {
    const changes = [];
    for (const [id, [, inputs]] of Object.entries(asked ?? {})) {
      const widgets = (id !== own && nodeOf(id)?.widgets) || [];
      for (const [i, control] of widgets.entries()) {
        const seed = control.name === CONTROL && control.value !== "fixed" && widgets[i - 1];
        if (seed && Number.isSafeInteger(inputs[seed.name])) changes.push([seed, inputs[seed.name]], [control, "fixed"]);
      }
    }
    return changes;
  }

  /** Whether what a node gives goes to nothing but the iterate of another. */
  function readsAlone(asked, by, to) {
    return Object.entries(asked ?? {}).every(([id, [, inputs]]) => Object.entries(inputs).every(([name, value]) => {
      const linked = Array.isArray(value) && String(value[0]) === by;
      return !linked || (id === to && (name === ITERATE || name === RESTART));
    }));
  }

  /** Writes it into the widgets; null: done, else why not. The widgets are as they were then. isOver: another run has begun. */
  async function write(node, run, asked, iterate, anew, isOver) {
    const path = placeOf(node);
    const seed = giver(path, SEEDED, SEEDS);
    const [iterates, restart] = [giver(path, [ITERATE]), giver(path, [RESTART])];
    const usual = node.properties[USUAL] ?? restart.widget?.value ?? 0;
    // A linked seed is in the node's own widget too, once it was queued.
    const seeded = [seed.widget, ...SEEDS.map((name) => node.widgets?.find((w) => w.name === name))];
    const fixed = [seed.node, node].map((one) => one?.widgets?.find((w) => w.name === CONTROL));
    const changes = [
      ...moved(asked, path.join(":")),
      ...(Number.isSafeInteger(run.settings.seed) ? seeded.map((widget) => [widget, run.settings.seed]) : []),
      ...fixed.map((widget) => [widget, "fixed"]),
      [iterates.widget, iterate],
      [restart.widget, anew ? usual || PAINTED : 0],
    ].filter(([widget]) => widget);
    const before = changes.map(([widget]) => [widget, widget.value]);
    const free = new Set([ITERATE, RESTART].map((name) => `${path.join(":")} ${name}`));
    for (const [name, { node: by, at, widget }] of [[ITERATE, iterates], [RESTART, restart]]) {
      if (!widget) continue;
      const wanted = changes.find(([one]) => one === widget)[1];
      if (readsAlone(asked, at.join(":"), path.join(":"))) free.add(`${at.join(":")} ${widget.name}`);
      else if (widget.value !== wanted) return whyShared(name, by.title);
    }
    let done = false;
    try {
      for (const [widget, value] of changes) widget.value = value;
      const found = asked ? differences(asked, (await prompt()).output, free) : [];
      if (found.length || isOver()) return whyNotTaken(found, (id) => nodeOf(id)?.title ?? asked[id][0]) ?? "";
      done = true;
    } finally {
      if (!done) for (const [widget, value] of before.reverse()) widget.value = value;
    }
    Object.assign(node.properties, { [USUAL]: usual, [TAKEN]: signature(rootGraph(), path, [ITERATE, RESTART]) });
    remember(node);
    node.setDirtyCanvas?.(true, true);
    return null;
  }

  /** No iterate is taken any more. What gives its value to others as well is left alone where nothing was taken by it. */
  function untake(node) {
    const path = placeOf(node);
    const taken = node.properties[TAKEN] !== undefined;
    for (const [name, value] of [[ITERATE, -1], [RESTART, node.properties[USUAL]]]) {
      if (!path || value === undefined) continue;
      const { node: by, widget } = giver(path, [name]);
      if (widget && (taken || by === node)) widget.value = value;
    }
    delete node.properties[USUAL];
    delete node.properties[TAKEN];
  }

  /** The values that the last run, or the workflow as it was opened, has. */
  function remember(node) {
    known.set(node, new Map((node.widgets ?? []).map((w) => [w.name, w.value])));
  }

  /**
   * Another seed or setting is another run: of that, the iterate that was taken from the last one means nothing. At once
   * where it is the node's own, else when it is queued.
   */
  function watch(node) {
    const iterate = node.widgets?.find((w) => w.name === ITERATE);
    if (iterate) {
      chain(iterate, "beforeQueued", () => {
        const taken = node.properties?.[TAKEN];
        const path = taken && placeOf(node);
        if (path && signature(rootGraph(), path, [ITERATE, RESTART]) !== taken) untake(node);
      });
    }
    for (const widget of node.widgets ?? []) {
      const { name } = widget;
      if (name === "mira_chart") continue;
      chain(widget, "callback", (value) => {
        if (known.get(node)?.get(name) === value) return; // some frontends call after every run
        remember(node);
        if (name === RESTART) delete node.properties[USUAL]; // set by hand
        else if (name !== ITERATE || value === -1) untake(node);
      });
    }
    chain(node, "onConfigure", () => remember(node));
  }

  return { take, watch };
}
