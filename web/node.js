// What is done to a node of the graph editor's, of either renderer: no side effects beyond it, nothing of ComfyUI.

export function addDom(node, name, element, height) {
  const widget = node.addDOMWidget(name, name.toUpperCase(), element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: height,
  });
  widget.serialize = false; // neither in the workflow file ...
  widget.options.serialize = false; // ... nor in the prompt, whose cache key it would change
  return widget;
}

/** least: of its width, which is left alone where nothing but the content's height has changed. */
export function fit(node, least = 380) {
  // Vue lays a node out by what is in it; a height of ours, of widgets that it hides, would only stretch it.
  if (window.LiteGraph?.vueNodesMode) return;
  const wanted = node.computeSize();
  node.setSize([least ? Math.max(node.size[0], wanted[0], least) : node.size[0], Math.max(node.size[1], wanted[1])]);
  node.setDirtyCanvas?.(true, true);
}

/** Back to a height that it had, as far as its content allows. */
export function shrink(node, height) {
  if (window.LiteGraph?.vueNodesMode) return;
  node.setSize([node.size[0], Math.max(node.computeSize()[1], height)]);
}

export function setWidget(node, name, value) {
  const widget = node.widgets?.find((w) => w.name === name);
  if (widget) widget.value = value;
}

export function chain(node, name, after) {
  const before = node[name];
  node[name] = function (...given) {
    const result = before?.apply(this, given);
    after(...given);
    return result;
  };
}
