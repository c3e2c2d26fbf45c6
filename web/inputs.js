// The inputs of the optimising nodes: which are shown, what a preset does to them, where older values go.
import { promoted } from "./graph.js";
import { migrated, presetAfter, presetValues, readBySome, unread, widgetsOf } from "./layout.js";
import { chain, fit, setWidget } from "./node.js";

const PRESETS = new Map(); // by a node's class: { presets, dials, widgets: today's }
const READ_BY = new Map(); // by a node's class: { combo: { input: [values of the combo that read it] } }

/** What the server tells of a class of nodes. */
export function learn(nodeData) {
  const [, told] = nodeData.input?.required?.preset ?? [];
  PRESETS.set(nodeData.name, { presets: told?.mira_presets, dials: told?.mira_dials, widgets: widgetsOf(nodeData) });
  const specs = Object.entries({ ...nodeData.input?.required, ...nodeData.input?.optional });
  const choosing = specs.filter(([, spec]) => spec[1]?.mira_read_by);
  READ_BY.set(nodeData.name, Object.fromEntries(choosing.map(([name, spec]) => [name, spec[1].mira_read_by])));
}

/**
 * The canvas hides an advanced widget by a flag of its own, which the oldest frontends set for Vue only, and leaves its
 * place empty: it takes none while it is hidden. Nor does one that the chosen method does not read.
 */
export function fold(node) {
  const told = READ_BY.get(node.comfyClass);
  const some = readBySome(told);
  for (const widget of node.widgets ?? []) {
    if (widget.options?.advanced) widget.advanced = true;
    if (!widget.advanced && !some.has(widget.name)) continue;
    widget.computeSize = (width) => {
      const shown = !widget.hidden && (node.showAdvanced || !widget.advanced);
      return shown ? [width ?? 0, window.LiteGraph.NODE_WIDGET_HEIGHT] : [0, -4];
    };
  }
  for (const widget of node.widgets ?? []) {
    if (widget.name in told) chain(widget, "callback", () => hideUnread(node));
  }
  chain(node, "onConfigure", () => {
    hideUnread(node, true);
    if (node.size[1] === 0) fit(node);
  });
  chain(node, "onConnectionsChange", () => hideUnread(node));
  hideUnread(node);
  node.setSize([node.size[0], node.computeSize()[1]]);
}

/**
 * What the chosen method does not read is not shown. A widget with a link stays, and one that is chosen by a link hides
 * nothing. The first Vue renderers do not see a widget come back: they show all, as they do of the advanced ones.
 * opened: with a size that was saved, which is of what was shown then.
 */
function hideUnread(node, opened = false) {
  const widgets = node.widgets ?? [];
  const linked = new Set(node.inputs?.filter((i) => i.widget && i.link != null).map((i) => i.widget.name));
  const values = Object.fromEntries(widgets.filter((w) => !linked.has(w.name)).map((w) => [w.name, w.value]));
  const told = READ_BY.get(node.comfyClass);
  const hidden = unread(told, values);
  const some = readBySome(told); // others may be hidden by somebody else
  const seen = (widget) => !window.LiteGraph?.vueNodesMode || "hidden" in Object.getPrototypeOf(widget);
  const turned = widgets.filter((w) => some.has(w.name) && Boolean(w.hidden) !== (hidden.has(w.name) && !linked.has(w.name) && seen(w)));
  if (!turned.length) return;
  const before = node.computeSize()[1];
  for (const widget of turned) widget.hidden = widget.options.hidden = !widget.hidden; // the canvas' word for it, and Vue's
  if (!window.LiteGraph?.vueNodesMode) {
    const wanted = node.computeSize()[1];
    node.setSize([node.size[0], Math.max(wanted, node.size[1] + (opened ? 0 : wanted - before))]);
  }
  node.setDirtyCanvas?.(true, true);
}

const LINKED = Symbol("a value that no preset has");

/** A preset writes its values into the widgets, where they are seen; a change of one of them makes it `custom`. isOpening:
 * whether a graph is being opened just now.
 */
export function addPresets(node, isOpening) {
  const told = PRESETS.get(node.comfyClass);
  const preset = node.widgets?.find((w) => w.name === "preset");
  if (!told || !preset) return;
  chain(preset, "callback", (value) => {
    for (const [name, wanted] of Object.entries(presetValues(told, value))) setWidget(node, name, wanted);
    node.setDirtyCanvas?.(true, true);
  });
  for (const widget of node.widgets) {
    if (widget === preset) continue;
    chain(widget, "callback", (value) => {
      preset.value = presetAfter(told, preset.value, widget.name, value);
    });
  }
  // What is linked to an input that the preset sets is somebody's own, too. A graph that is being opened stays as it is.
  chain(node, "onConnectionsChange", (type, slot, connected) => {
    const name = type === window.LiteGraph.INPUT && connected && node.inputs?.[slot]?.widget?.name;
    if (name && !isOpening()) preset.value = presetAfter(told, preset.value, name, LINKED);
  });
}

const outside = new WeakSet(); // widgets of subgraph nodes that were seen

/** A preset that is chosen outside of a subgraph sets the dials that are outside with it; an input out there that departs
 * from the preset makes it `custom`, wherever that is.
 */
export function addPromotedPresets(holder) {
  for (const node of holder.subgraph?.nodes ?? []) {
    const told = PRESETS.get(node.comfyClass);
    const preset = told && (promoted(holder, node, "preset") ?? node.widgets?.find((w) => w.name === "preset"));
    for (const name of preset ? node.inputs.map((input) => input.widget?.name) : []) {
      const widget = promoted(holder, node, name);
      if (!widget || widget === preset || outside.has(widget)) continue;
      outside.add(widget);
      chain(widget, "callback", (value) => {
        preset.value = presetAfter(told, preset.value, name, value);
      });
    }
    if (!preset || outside.has(preset) || !promoted(holder, node, "preset")) continue;
    outside.add(preset);
    chain(preset, "callback", (value) => {
      for (const [name, wanted] of Object.entries(presetValues(told, value))) {
        const widget = promoted(holder, node, name);
        if (widget) widget.value = wanted;
      }
      holder.setDirtyCanvas?.(true, true);
    });
  }
}

/** Values of a workflow from before presets go where they belong today. */
export function migrate(graph) {
  for (const node of graph?.nodes ?? []) {
    const defaults = PRESETS.get(node.type)?.widgets;
    const values = defaults && migrated(node.type, node.widgets_values, defaults);
    if (!values) continue;
    node.widgets_values = values;
    if (node.size) node.size[1] = 0; // of widgets that are folded away now: as high as it needs to be
  }
  for (const inner of graph?.definitions?.subgraphs ?? []) migrate(inner);
}
