// Where the values of a node's widgets belong.
import assert from "node:assert/strict";
import { test } from "node:test";
import * as layout from "../../web/layout.js";

const told = { presets: { fast: { rounds: 2, seeds: 2 } }, dials: { fast: { iterations: 6 } } };

test("a preset sets its inputs and dials, and a change of an input is the user's own", () => {
  assert.deepEqual(layout.presetValues(told, "fast"), { rounds: 2, seeds: 2, iterations: 6 });
  assert.deepEqual(layout.presetValues(told, "custom"), {});
  assert.equal(layout.presetAfter(told, "fast", "rounds", 3), "custom");
  assert.equal(layout.presetAfter(told, "fast", "rounds", 2), "fast");
  assert.equal(layout.presetAfter(told, "fast", "iterations", 50), "fast");
  assert.equal(layout.presetAfter(told, "custom", "rounds", 2), "custom");
});

test("what the chosen method does not read is left out, but not where a link chooses", () => {
  const told = { method: { rounds: ["climb"], radius: ["climb", "tilt"] }, judge: { timeout: ["person"] } };
  assert.deepEqual([...layout.unread(told, { method: "tilt", judge: "reward", rounds: 4 })], ["rounds", "timeout"]);
  assert.deepEqual([...layout.unread(told, { method: "climb", judge: "person" })], []);
  assert.deepEqual([...layout.unread(told, { judge: "reward" })], ["timeout"]);
  assert.deepEqual([...layout.unread({}, { method: "tilt" })], []);
});

test("values from before presets go where they belong, and today's stay", () => {
  const today = ["preset", "iterations", "drift_limit", "prompt", "restart_every", "learning_rate"].map((name) => ({ name, value: `its ${name}` }));
  const old = [30, 0.01, "none", 1, "last", 0.1];
  assert.deepEqual(layout.migrated("MiraOptimizeSamplerAdvanced", old, today), ["custom", 30, 0.1, "its prompt", 0, 0.01]);
  assert.equal(layout.migrated("MiraOptimizeSamplerAdvanced", ["fast", 30], today), null);
  for (const bad of [null, undefined, {}, []]) assert.equal(layout.migrated("MiraOptimizeSamplerAdvanced", bad, today), null);
  assert.equal(layout.migrated("KSampler", [1, 2], today), null);
});

test("today's widgets of a node are told by its class, with what follows a seed", () => {
  const input = {
    required: { model: ["MODEL"], seed: ["INT", { default: 3, control_after_generate: true }], kind: [["a", "b"]], way: ["COMBO", { options: ["c"] }] },
    optional: { text: ["STRING", { default: "x", forceInput: true }], note: ["STRING", { default: "n" }] },
  };
  const names = (found) => found.map(({ name, value }) => [name, value]);
  const seed = [["seed", 3], ["control_after_generate", "randomize"]];
  assert.deepEqual(names(layout.widgetsOf({ input })), [...seed, ["kind", "a"], ["way", "c"], ["note", "n"]]);
  const order = { required: ["way", "seed"], optional: [] };
  assert.deepEqual(names(layout.widgetsOf({ input, input_order: order })), [["way", "c"], ...seed]);
});
