// What the chart draws, from what the server tells: `node --test tests/web`, or with all tests by dev.py.
import assert from "node:assert/strict";
import { test } from "node:test";
import * as series from "../../web/series.js";
import * as asked from "../../web/asked.js";
import * as choice from "../../web/choice.js";
import * as layout from "../../web/layout.js";
import { textOf } from "../../web/text.js";

const row = (iteration, image = 0, more = {}) => ({ iteration, image, reward: iteration / 10, path_kl: 0.1, seconds: 2, ...more });
const step = (iteration, more = {}) => ({ iteration, iterations: 10, rows: [row(iteration), row(iteration, 1)], ...more });
const after = (...events) => events.reduce(series.addStep, series.newRun());

test("steps are added in order, and an iteration that is told again replaces what followed it", () => {
  const run = after(step(0), step(1), step(2), step(1));
  assert.deepEqual(run.rows.map((r) => [r.iteration, r.image]), [[0, 0], [0, 1], [1, 0], [1, 1]]);
  assert.equal(run.iterations, 10);
  assert.deepEqual(series.images(run), [0, 1]);
});

test("iteration 0 begins a new run, with previews and settings of its own", () => {
  const run = after(step(0, { settings: { drift_metric: "mira" }, preview: { filename: "a" } }), step(1, { preview: { filename: "b" } }));
  assert.deepEqual(Object.keys(run.previews), ["0", "1"]);
  assert.equal(run.settings.drift_metric, "mira");
  const again = series.addStep(run, step(0));
  assert.deepEqual([again.rows.length, again.previews, again.settings], [2, {}, {}]);
});

test("a run that goes on from its first iteration keeps that one's preview", () => {
  const run = after(step(0, { previews: { 0: { filename: "a" } }, preview: null }), step(1, { preview: { filename: "b" } }));
  assert.deepEqual(Object.keys(run.previews), ["0", "1"]);
});

test("every image of a batch has its own preview", () => {
  const run = after(step(0, { preview: { filename: "a", others: [{ filename: "b" }] } }));
  assert.deepEqual([0, 1, 2].map((b) => series.previewOf(run, 0, b)?.filename), ["a", "b", undefined]);
  assert.equal(series.previewOf(run, 1, 0), null);
});

test("a step whose preview could not be stored is drawn all the same", () => {
  const run = after(step(0), step(1, { preview: null }));
  assert.deepEqual([run.rows.length, run.previews], [4, {}]);
});

test("bad input is left out, and changes nothing", () => {
  const run = after(step(0));
  for (const bad of [null, undefined, {}, { rows: 3 }, { rows: null }]) assert.equal(series.addStep(run, bad), run);
  assert.equal(after({ ...step(0), rows: [null, 1, {}, { iteration: "0", image: 0 }, row(0)] }).rows.length, 1);
  for (const bad of [null, {}, { mira: [] }, { mira: [{ rows: 1 }] }]) assert.equal(series.fromOutput(bad), null);
});

test("a finished run keeps the previews that it saw, unless its record has its own", () => {
  const before = after(step(0, { preview: { filename: "a" } }));
  const trace = { rows: [row(0), row(3)], kept: [3], reasons: ["done"], notices: ["n"], settings: {} };
  const run = series.fromOutput({ mira: [trace] }, before);
  assert.deepEqual([run.previews, run.iterations, run.done], [before.previews, 3, true]);
  assert.deepEqual(series.fromOutput({ mira: [{ ...trace, previews: {} }] }, before).previews, {});
  assert.deepEqual(series.fromOutput({ mira: [{ rows: [row(0)], kept: 7 }] }).kept, []);
});

test("columns are the measured ones, and the drift is the one that the limit is measured in", () => {
  const run = after(step(0, { settings: { drift_metric: "score_distance" } }));
  assert.deepEqual(series.columns(run), ["reward", "path_kl"]);
  assert.equal(series.driftColumn(run), "path_kl"); // the wanted one is not there
  run.rows[0].score_distance = 1;
  assert.equal(series.driftColumn(run), "score_distance");
  assert.equal(series.driftColumn(series.newRun()), null);
});

test("what is not finite is a gap", () => {
  const run = after({ ...step(0), rows: [row(0, 0, { reward: null }), row(1, 0, { reward: NaN }), row(2)] });
  assert.deepEqual(series.table(run, 0, ["reward", "none"]), [[0, 1, 2], [null, null, 0.2], [null, null, null]]);
  assert.deepEqual([null, NaN, Infinity, "1", 0].map(series.finite), [null, null, null, null, 0]);
});

test("time left is by the median of the last iterations of the first image", () => {
  assert.equal(series.secondsLeft(series.newRun()), null);
  const run = after(...[9, 1, 1, 1, 1, 100].map((seconds, k) => step(k, { rows: [row(k, 0, { seconds })] })));
  assert.equal(series.secondsLeft(run), 5);
  assert.equal(series.secondsLeft({ ...run, done: true }), null);
});

test("numbers and clocks are short", () => {
  assert.deepEqual([0, 1.23456, -123456, 0.00001234, null, NaN].map(series.brief), ["0", "1.235", "-1.23e+5", "1.23e-5", "–", "–"]);
  assert.deepEqual([0, 61.4, 3599, 3661].map(series.clock), ["0:00", "1:01", "59:59", "1:01:01"]);
});

test("the status line says where it is, and at the end what was kept and why it ended", () => {
  assert.match(series.status(series.newRun(), 0), /appear here/);
  assert.equal(series.status(after(step(0), step(4)), 0), "iteration 4 of 10 · reward 0.4 (start 0) · drift 0.1 · 0:12 left");
  const done = series.fromOutput({ mira: [{ rows: [row(0), row(1), row(2)], kept: [1], reasons: ["all iterations done"] }] });
  assert.equal(series.status(done, 0), "kept iteration 1 · reward 0.1 (start 0) · drift 0.1 · all iterations done");
});

test("the CSV has every column that any row has, and quotes what needs it", () => {
  const run = { ...series.newRun(), rows: [row(0), row(1, 0, { "reward.a,b": 'x"y' })] };
  const lines = series.csv(run).split("\n");
  assert.equal(lines[0], 'iteration,image,reward,path_kl,seconds,"reward.a,b"');
  assert.equal(lines[1], "0,0,0,0.1,2,");
  assert.equal(lines[2], '1,0,0.1,0.1,2,"x""y"');
});

test("no more rows than a browser bears", () => {
  const many = Array.from({ length: 20500 }, (_, k) => row(k));
  assert.equal(series.fromOutput({ mira: [{ rows: many }] }).rows.length, 20000);
});

test("a node's text is its first string, or nothing", () => {
  assert.deepEqual([{ mira_text: ["a", "b"] }, { mira_text: "a" }, { mira_text: [3] }, null].map(textOf), ["a", null, null, null]);
});

test("rounds are told, and where each but the first begins", () => {
  const of = (iteration, round) => row(iteration, 0, { round, level: 14 / round });
  const run = after({ iteration: 0, iterations: 4, rows: [of(0, 1)] }, { iteration: 1, iterations: 4, rows: [of(1, 1)] }, { iteration: 2, iterations: 4, rows: [of(2, 2)] });
  assert.deepEqual(series.restarts(run, 0), [2]);
  assert.deepEqual(series.restarts(after(step(0), step(1)), 0), []);
  assert.match(series.status(run, 0), /iteration 2 of 4 · round 2 · reward/);
  assert.match(series.status(run, 0), /drift [0-9.]+ since the round began/);
  assert.ok(!series.columns(run).includes("round"));
});

test("a drift that was never measured is none", () => {
  const rows = [row(0, 0, { path_kl: null, mira: NaN }), row(1, 0, { path_kl: null, mira: NaN })];
  const run = { ...series.newRun(), rows };
  assert.equal(series.driftColumn(run), null);
  assert.doesNotMatch(series.status(run, 0), /drift/);
  assert.equal(series.driftColumn({ ...run, rows: [...rows, row(2, 0, { path_kl: null, mira: 0.5 })] }), "mira");
});

test("an axis has room for one value, and for none", () => {
  assert.deepEqual(series.spread(null, null), [0, 1]);
  assert.deepEqual(series.spread(0, 0), [-0.1, 0.1]);
  assert.deepEqual(series.spread(2, 2), [1.8, 2.2]);
  const [low, high] = series.spread(0, 1);
  assert.ok(low < 0 && low > -0.1 && high > 1 && high < 1.1);
});

test("no two ticks say the same", () => {
  assert.deepEqual(series.ticks([0, 0.0005, 0.001, 0.0015]), ["0", "0.0005", "0.0010", "0.0015"]);
  assert.deepEqual(series.ticks([0.25, 0.5, 0.75]), ["0.25", "0.50", "0.75"]);
  assert.deepEqual(series.ticks([-20, 0, 20]), ["-20", "0", "20"]);
  assert.deepEqual(series.ticks([0, 1e-7, 2e-7]), ["0", "1.0e-7", "2.0e-7"]);
  assert.deepEqual(series.ticks([0.1 + 0.2]), ["0.3"]);
  assert.deepEqual(series.ticks([]), []);
  assert.equal(new Set(series.ticks([5.2, 5.2000005, 5.200001])).size, 3);
});

test("drift is called so wherever it is shown", () => {
  const run = after({ iteration: 0, iterations: 1, rows: [row(0, 0, { path_kl: 0 })], settings: { drift_metric: "path_kl" } });
  assert.equal(series.label(run, "path_kl"), "drift (path_kl)");
  assert.equal(series.label(run, "reward"), "reward");
  assert.match(series.status(run, 0), /drift 0/);
});

test("a run that has begun says what it does before its first image", () => {
  assert.equal(series.status({ ...series.newRun(), waiting: "Trying 4 seeds ..." }, 0), "Trying 4 seeds ...");
});

test("keys of somebody who writes or looks at a dialog choose nothing", () => {
  for (const tagName of ["INPUT", "TEXTAREA", "SELECT"]) assert.ok(choice.isTaken({ tagName }));
  assert.ok(choice.isTaken({ tagName: "DIV", isContentEditable: true }));
  const within = (role) => ({ tagName: "BUTTON", closest: (selector) => (selector.includes(`[role=${role}]`) ? {} : null) });
  assert.ok(choice.isTaken(within("dialog")) && !choice.isTaken(within("toolbar")));
  for (const other of [null, undefined, { tagName: "BODY" }, { tagName: "CANVAS" }]) assert.ok(!choice.isTaken(other));
});

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

test("a chart draws the reward with its parts and one drift, and the limit of that drift alone", () => {
  const rows = [row(0, 0, { "reward.size": 1, path_kl: 0.1, mira: 2 })];
  const run = { ...series.newRun(), rows, settings: { drift_metric: "path_kl", drift_limit: 0.3 } };
  assert.deepEqual(series.curves(run), { drift: "path_kl", rewards: ["reward", "reward.size"], list: ["reward", "reward.size", "path_kl"] });
  assert.equal(series.limit(run), 0.3);
  assert.equal(series.limit({ ...run, settings: { drift_metric: "path_kl", drift_limit: 0 } }), null);
  assert.equal(series.limit({ ...run, settings: { drift_metric: "score_distance", drift_limit: 0.3 } }), null);
  const bare = { ...run, rows: [{ iteration: 0, image: 0, seconds: 1 }] };
  assert.deepEqual(series.curves(bare), { drift: null, rewards: [], list: [] });
});

test("upright lines: restarts between two iterations, the kept one, and what is looked at where it is another", () => {
  const rows = [row(0, 0, { round: 1 }), row(1, 0, { round: 1 }), row(2, 0, { round: 2 })];
  const run = { ...series.newRun(), rows, kept: [1] };
  const [restart, kept, chosen] = [{ at: 1.5, what: "restart" }, { at: 1, what: "kept" }, { at: 2, what: "chosen" }];
  assert.deepEqual(series.uprights(run, 0, 2), [restart, chosen]);
  assert.deepEqual(series.uprights({ ...run, done: true }, 0, 2), [restart, kept, chosen]);
  assert.deepEqual(series.uprights({ ...run, done: true }, 0, 1), [restart, kept]);
});

test("the newest iterate is looked at while a run goes on, but an earlier one stays, and at the end the kept one is", () => {
  const run = { ...series.newRun(), rows: [row(0), row(1), row(2)], kept: [1] };
  assert.deepEqual([series.follow(run, 0, 1, 1, false), series.follow(run, 0, 0, 1, false)], [2, 0]);
  const done = { ...run, done: true };
  assert.deepEqual([series.follow(done, 0, 2, 2, true), series.follow(done, 0, 2, 2, false), series.follow(done, 1, 0, 2, true)], [1, 2, 2]);
  assert.equal(series.follow(series.newRun(), 0, 7, 9, false), 0);
});

test("a ground is light or dark by what an eye sees of its colour", () => {
  assert.deepEqual(["rgb(255, 255, 255)", "rgb(0, 200, 0)", "rgb(0, 0, 255)", "rgba(34, 34, 34, 0.5)", ""].map(series.isLight), [true, false, false, false, false]);
});

test("a run that goes on tells its earlier rows once more, and they stay once", () => {
  const restored = { ...series.newRun(), rows: [row(0), row(1)], previews: {} };
  const event = { iteration: 2, rows: [row(0), row(1), row(2)], previews: { 0: "a", 1: "b" }, preview: "c" };
  const run = series.addStep(restored, event);
  assert.deepEqual(run.rows.map((r) => r.iteration), [0, 1, 2]);
  assert.deepEqual(run.previews, { 0: "a", 1: "b", 2: "c" });
});

test("of another run nothing stays, even where its first steps were missed", () => {
  const first = after(...[0, 1, 2, 3].map((k) => step(k, { run: "a", preview: `a${k}` })));
  const run = series.addStep(first, step(2, { run: "b", preview: "b2" }));
  assert.deepEqual([run.id, run.rows.map((r) => r.iteration), run.previews], ["b", [2, 2], { 2: "b2" }]);
  assert.equal(series.addStep(run, step(3, { run: "b" })).rows.length, 4);
  assert.equal(series.fromOutput({ mira: [{ rows: [row(0)], run: "b" }] }).id, "b");
});

test("a choice has at least two images, in a square of them, and a question", () => {
  const images = [1, 2, 3, 4].map((n) => ({ filename: `${n}.png` }));
  const asked = { token: "t", node: "3", images, wanted: "best", iteration: 0, iterations: 9, image: 0, batch: 1 };
  assert.equal(choice.validChoice(asked), asked);
  for (const bad of [null, {}, { ...asked, images: images.slice(0, 1) }, { ...asked, images: [1, 2] }, { ...asked, node: null }]) {
    assert.equal(choice.validChoice(bad), null);
  }
  assert.deepEqual([2, 3, 6, 7, 16].map(choice.columnsOf), [2, 2, 2, 3, 3]);
  assert.equal(choice.questionOf(asked), "Which is best? 1 of 9");
  assert.equal(choice.questionOf({ ...asked, images: images.slice(2), batch: 3 }), "Which is better? 1 of 9, image 1 of 3");
  assert.equal(choice.questionOf({ ...asked, wanted: "worst" }), "And which is the least good? 1 of 9");
});

test("what a stranger's record says is shown, and nothing else is done with it", () => {
  const record = { rows: [{ iteration: 0, image: 0 }], kept: [0], reasons: ["<img src=x onerror='alert(1)'> & \"more\""] };
  const said = series.status(series.fromOutput({ mira: [record] }), 0);
  const html = "&lt;img src=x onerror=&#39;alert(1)&#39;&gt; &amp; &quot;more&quot;";
  assert.ok(said.includes("<img") && series.escaped(said).endsWith(html) && !series.escaped(said).includes("<"));
});

test("the tab says that a choice is waited for, once, and stops saying so", () => {
  const called = choice.tabTitle("[0%] ComfyUI", true);
  assert.match(called, /Choose .* \[0%\] ComfyUI$/);
  assert.equal(choice.tabTitle(called, true), called);
  assert.equal(choice.tabTitle(called, false), "[0%] ComfyUI");
});

test("a key chooses among the images that are there, and one with a modifier is another's", () => {
  const answers = ["1", "4", "5", "0", "t", "Backspace", "Escape", "x"].map((key) => choice.answerOf({ key }, 4));
  assert.deepEqual(answers, [1, 4, null, "tie", "tie", "back", "stop", null]);
  assert.equal(choice.answerOf({ key: "1", ctrlKey: true }, 4), null);
});

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
});
