// The only file that touches ComfyUI's app.
import { app } from "../../scripts/app.js";
import { textElement, textOf } from "./text.js";

const SCORES = "MiraScoreImages";

function addScores(node) {
  const { outer, inner } = textElement(document);
  const widget = node.addDOMWidget("mira_text", "MIRA_TEXT", outer, {
    serialize: false,
    getMinHeight: () => Math.min(Math.max(inner.scrollHeight + 8, 48), 248),
  });
  widget.serialize = false;
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.apply(this, arguments);
    const text = textOf(output);
    if (text !== null) {
      inner.textContent = text;
      this.setDirtyCanvas?.(true, true);
    }
  };
}

app.registerExtension({
  name: "MIRA",
  nodeCreated(node) {
    if (node.comfyClass === SCORES) addScores(node);
  },
});
