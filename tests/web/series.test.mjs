// What the chart draws, from what the server tells.
import assert from "node:assert/strict";
import { test } from "node:test";
import * as series from "../../web/series.js";

const row = (iteration, image = 0, more = {}) => ({ iteration, image, reward: iteration / 10, path_kl: 0.1, seconds: 2, ...more });
const step = (iteration, more = {}) => ({ iteration, iterations: 10, rows: [row(iteration), row(iteration, 1)], ...more });
const after = (...events) => events.reduce(series.addStep, series.newRun());

test("steps are added in order, and an iteration that is told again replaces what followed it", () => {
  const run = after(step(0), step(1), step(2), step(1));
  assert.deepEqual(run.rows.map((r) => [r.iteration, r.image]), [[0, 0], [0, 1], [1, 0], [1, 1]]);
  assert.equal(run.iterations, 10);
  assert.deepEqual(series.images({ rows: [row(0, 10), row(0, 9), row(1, 10)] }), [9, 10]);
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

test("a finished run is its record's, whatever of it is missing", () => {
  const trace = { rows: [row(0), row(3)], kept: [3], reasons: ["done"], notices: ["n"], settings: {}, previews: { 3: { filename: "a" } } };
  const run = series.fromOutput({ mira: [trace] });
  assert.deepEqual([run.previews, run.iterations, run.done, run.kept, run.notices], [trace.previews, 3, true, [3], ["n"]]);
  assert.deepEqual(series.fromOutput({ mira: [{ rows: [] }] }), { ...series.newRun(), done: true });
  assert.deepEqual(series.fromOutput({ mira: [{ rows: [row(0)], kept: 7 }] }).kept, []);
});

test("columns are the measured ones, and the drift is the one that the limit is measured in", () => {
  const run = after(step(0, { settings: { drift_metric: "score_distance" } }));
  assert.deepEqual(series.columns(run), ["reward", "path_kl"]);
  assert.equal(series.driftColumn(run), "path_kl"); // the wanted one is not there
  const other = { ...run, rows: [{ ...run.rows[0], score_distance: 1 }] };
  assert.equal(series.driftColumn(other), "score_distance");
  assert.equal(series.driftColumn(series.newRun()), null);
});

test("what is not finite is a gap", () => {
  const run = after({ ...step(0), rows: [row(0, 0, { reward: null }), row(1, 0, { reward: NaN }), row(2)] });
  assert.deepEqual(series.table(run, 0, ["reward", "none"]), [[0, 1, 2], [null, null, 0.2], [null, null, null]]);
  assert.deepEqual([null, NaN, Infinity, "1", 0].map(series.finite), [null, null, null, null, 0]);
});

test("time left is by the median of the last iterations of the first image", () => {
  assert.equal(series.secondsLeft(series.newRun()), null);
  const run = after(...[9, 9, 9, 1, 5, 2, 4, 3].map((seconds, k) => step(k, { rows: [row(k, 0, { seconds })] })));
  assert.equal(series.secondsLeft(run), 3 * 3); // three iterations, of 1, 5, 2, 4, 3 the middle one
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

test("comparisons are counted as the chooser counts them, and a person's time is nobody's guess", () => {
  const settings = { judge: "person", iterations: 4 };
  const run = after({ ...step(0), settings }, { ...step(1), settings });
  assert.match(series.status(run, 0), /^2 of 4 choices made · /);
  assert.doesNotMatch(series.status(run, 0), /left/);
  const judged = { ...run, settings: { judge: "reward", iterations: 4 } };
  assert.match(series.status(judged, 0), /^2 of 4 comparisons made · .* left$/);
  const updated = after({ ...step(4), settings }); // Algorithm 2's last winner, after its update
  assert.match(series.status(updated, 0), /^4 of 4 choices made/);
});

test("the drift's axis shows the limit once it is in sight", () => {
  const run = { ...after(step(0)), settings: { drift_limit: 0.05, drift_metric: "path_kl" } };
  assert.deepEqual(series.driftSpread(run, 0, 0.012), series.spread(0, 0.012));
  assert.deepEqual(series.driftSpread(run, 0, 0.02), series.spread(0, 0.05));
  assert.deepEqual(series.driftSpread(run, 0, 0.2), series.spread(0, 0.2));
  assert.deepEqual(series.driftSpread({ ...run, settings: {} }, 0, 0.02), series.spread(0, 0.02));
  assert.deepEqual(series.driftSpread(run, null, null), [0, 1]);
});

test("the CSV has every column that any row has, and quotes what needs it", () => {
  const run = { ...series.newRun(), rows: [row(0), row(1, 0, { "reward.a,b": 'x"y' })] };
  const lines = series.csv(run).split("\n");
  assert.equal(lines[0], 'iteration,image,reward,path_kl,seconds,"reward.a,b"');
  assert.equal(lines[1], "0,0,0,0.1,2,");
  assert.equal(lines[2], '1,0,0.1,0.1,2,"x""y"');
  const strange = series.csv({ ...run, rows: [row(-1, 0, { a: "=1+1", b: "x\ry" })] }).split("\n")[1];
  assert.equal(strange, "-1,0,-0.1,0.1,2,'=1+1,\"x\ry\""); // a number is one, a text no formula
});

test("every row of a long run stays", () => {
  const many = Array.from({ length: 200_000 }, (_, k) => row(k));
  const run = series.fromOutput({ mira: [{ rows: many }] });
  assert.deepEqual([run.rows.length, run.iterations, series.lastOf(run)], [200_000, 199_999, 199_999]);
  assert.equal(series.addStep(run, { iteration: 199_999, rows: many }).rows.length, 200_000);
});

test("what the server knows is news to a chart that has less of it, or nothing that is over", () => {
  const mine = { ...series.newRun(), id: "a", rows: [row(0)] };
  const [done, known] = [{ ...mine, done: true }, { run: "a", rows: [row(0)] }];
  assert.ok(!series.isNews(mine, known, false) && series.isNews(mine, { ...known, rows: [row(0), row(1)] }, false));
  assert.ok(series.isNews(mine, { ...known, output: {} }, false) && !series.isNews(done, { ...known, output: {} }, true));
  const other = { ...known, run: "b" };
  assert.ok(series.isNews(mine, other, false) && series.isNews(done, other, false)); // that one still runs
  assert.deepEqual([false, true].map((missed) => series.isNews(done, { ...other, output: {} }, missed)), [false, true]);
  assert.ok(series.isNews(series.newRun(), { run: undefined, rows: [row(0)] }, false));
});

test("rounds are told, and where each but the first begins", () => {
  const of = (iteration, round) => row(iteration, 0, { round, level: 14 / round });
  const run = after({ iteration: 0, iterations: 4, rows: [of(0, 1)] }, { iteration: 1, iterations: 4, rows: [of(1, 1)] }, { iteration: 2, iterations: 4, rows: [of(2, 2)] });
  assert.deepEqual(series.restarts(run, 0), [2]);
  assert.deepEqual(series.restarts(after(step(0), step(1)), 0), []);
  const soon = after({ iteration: 0, iterations: 4, rows: [of(0, 1)] }, { iteration: 1, iterations: 4, rows: [of(1, 2)] });
  assert.deepEqual(series.restarts(soon, 0), [1]);
  assert.doesNotMatch(series.status(after({ iteration: 0, iterations: 4, rows: [of(0, 1)] }), 0), /since/);
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
  assert.deepEqual(["rgb(255, 255, 255)", "rgb(0, 200, 0)", "rgb(0, 0, 255)", "rgba(34, 34, 34, 0.5)", "rgb(141, 141, 141)", "rgb(139, 139, 139)", ""].map(series.isLight), [true, false, false, false, true, false, false]);
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

test("what a stranger's record says is shown, and nothing else is done with it", () => {
  const record = { rows: [{ iteration: 0, image: 0 }], kept: [0], reasons: ["<img src=x onerror='alert(1)'> & [[more|https://a.b]]"] };
  const said = series.status(series.fromOutput({ mira: [record] }), 0);
  const harmless = series.harmless(said);
  assert.ok(said.includes("<img") && !/[<>]|\[\[/.test(harmless));
  assert.match(harmless, /\u2039img src=x onerror='alert\(1\)'\u203A & \[ \[more\|https:\/\/a\.b\] \]$/);
});

test("a run that ended without a result says so, and how long it would take no more", () => {
  const run = { ...after(step(0), step(3)), ended: "a cancel" };
  assert.match(series.status(run, 0), /^iteration 3 of 10 .* ended by a cancel, with nothing handed back$/);
  assert.doesNotMatch(series.status(run, 0), / left/);
});

test("a long record is drawn in a moment", () => {
  const rows = Array.from({ length: 16 * 2000 }, (_, i) => row(Math.floor(i / 16), i % 16));
  const run = series.fromOutput({ mira: [{ rows }] });
  let looked = 0;
  const watched = { ...run, rows: new Proxy(run.rows, { get: (all, name) => ((looked += /^[0-9]+$/.test(String(name))), all[name]) }) };
  for (let i = 0; i < 200; i += 1) series.label(watched, series.curves(watched).drift) && series.limit(watched) && series.rowsOf(watched, i % 16);
  assert.equal(looked, rows.length); // once, however often a mouse moves
});
