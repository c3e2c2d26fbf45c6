// Elements for a node's text: no side effects beyond them, nothing of ComfyUI.

/** The canvas does not zoom while this element scrolls. */
export function keepScrolling(element) {
  element.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && element.scrollHeight > element.clientHeight) event.stopPropagation();
  }, { passive: true });
}

/** An element to hand to `addDOMWidget`; its inner div is what may be measured. */
export function textElement(document, first) {
  const outer = document.createElement("div");
  const inner = document.createElement("div");
  inner.setAttribute("role", "status");
  inner.setAttribute("aria-label", "Result");
  Object.assign(inner.style, {
    font: "12px/1.4 monospace",
    whiteSpace: "pre-wrap",
    overflow: "auto",
    maxHeight: "240px",
    padding: "6px 8px",
    boxSizing: "border-box",
    borderRadius: "4px",
    color: "var(--fg-color, #ddd)",
    background: "var(--comfy-input-bg, #222)",
    border: "1px solid var(--border-color, #444)",
  });
  inner.textContent = first;
  keepScrolling(inner);
  outer.append(inner);
  return { outer, inner };
}

/** The text of a node's output, or null where it has none. */
export function textOf(output) {
  const text = output?.mira_text;
  return Array.isArray(text) && typeof text[0] === "string" ? text[0] : null;
}
