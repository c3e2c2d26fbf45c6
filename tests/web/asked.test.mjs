// Of what an iterate can be taken.
import assert from "node:assert/strict";
import { test } from "node:test";
import * as asked from "../../web/asked.js";

test("an iterate is not taken of a graph that has changed, and what has is named", () => {
  const was = { 1: ["KSampler", { steps: 20, seed: 5, model: ["2", 0] }], 2: ["Loader", { name: "a" }], 3: ["Text", { text: "a fox" }] };
  const now = {
    1: { class_type: "KSampler", inputs: { steps: 20, seed: 9, model: ["2", 0], iterate: 4 } },
    2: { class_type: "Loader", inputs: { name: "a" } }, 3: { class_type: "Text", inputs: { text: "a fox" } },
  };
  const free = new Set(["1 seed", "1 iterate"]);
  const why = (prompt) => asked.whyNotTaken(asked.differences(was, prompt, free), (id) => ({ 1: "Sampler", 2: "Loader", 3: "Prompt" })[id]);
  assert.equal(why(now), null);
  assert.match(why({ ...now, 3: { class_type: "Text", inputs: { text: "a red fox" } } }), /Prompt: text was "a fox", is "a red fox"\)/);
  assert.match(why({ 1: { class_type: "KSampler", inputs: { steps: 21, model: ["4", 0] } } }), /Sampler: steps was 20, is 21; Sampler: model is linked elsewhere; Loader is gone; and 1 more/);
  const three = { ...now, 1: { class_type: "KSampler", inputs: { steps: 21, seed: 5, model: 7 } }, 3: { class_type: "Text", inputs: { text: "x".repeat(50) } } };
  assert.match(why(three), /model was a link, is 7; Prompt: text was "a fox", is "x{39}\.\.\.\)/);
});
