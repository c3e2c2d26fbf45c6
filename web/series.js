// Pure: from a run's record to what is drawn. No side effects, nothing of ComfyUI, nothing of the page.
import { BOOKKEEPING } from "./columns.js";

/**
 * A run as the events and the history tell it: settings, rows, kept iterations. Bad input gives an empty run.
 *
 * waiting: what is said while there is no row. why: it was begun, where nobody would think that it has to be. ended: by
 * what, where nothing came of it. refused: why an iterate of it was not taken. unknown: one was, when the server knew
 * nothing of the run any more.
 */
export function newRun() {
  return {
    id: null, settings: {}, rows: [], kept: [], reasons: [], notices: [], iterations: 0, previews: {}, done: false,
    waiting: null, why: "", ended: null, refused: null, unknown: false,
  };
}

/** A run that has no image yet, where `last` was shown. detail: what the server says of it; count: the seeds that are tried. */
export function begun(last, { run, seeds, count = 0 }) {
  const again = last.unknown ? "The server kept nothing of that run: it is run again. " : "";
  const why = last.id === run ? last.why : again;
  const trying = `Trying ${seeds} seeds${count ? `: ${count} of them done` : " ..."}`;
  return { ...newRun(), id: run, why, waiting: why + (seeds > 1 ? trying : "Sampling the first image ...") };
}

/** The last iteration that there is a row of; 0 without any. */
export function lastOf(run) {
  return run.rows.reduce((last, row) => Math.max(last, row.iteration), 0);
}

/** Whether a run that the server knows of is to be shown in the place of what a chart has. missed: whether a whole run
 * may have come and gone meanwhile.
 */
export function isNews(mine, known, missed) {
  if (mine.id !== null && mine.id === known.run) return !mine.done && (Boolean(known.output) || mine.rows.length < known.rows.length);
  return !mine.done || !known.output || missed; // else the chart may well have another run's record
}

/** Number, or null for what is none. */
export function finite(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

function isRow(row) {
  return row !== null && typeof row === "object" && Number.isInteger(row.iteration) && Number.isInteger(row.image);
}

/** The run after one `mira.step` event. Iteration 0 begins a new one; a row of an iteration that is there already replaces it. */
export function addStep(run, event) {
  if (!Array.isArray(event?.rows)) return run;
  const rows = event.rows.filter(isRow);
  const first = rows.reduce((least, row) => Math.min(least, row.iteration), event.iteration); // of a run that goes on, all are told again
  if (event.run && event.run !== run.id) run = { ...newRun(), id: event.run }; // nothing of another run stays
  const known = run.rows.filter((r) => r.iteration < first);
  const previews = { ...(event.iteration === 0 ? {} : run.previews), ...event.previews };
  if (event.preview) previews[event.iteration] = event.preview;
  return {
    ...newRun(),
    id: run.id,
    rows: [...known, ...rows],
    iterations: finite(event.iterations) ?? run.iterations,
    settings: event.settings ?? (event.iteration === 0 ? {} : run.settings),
    previews,
  };
}

/** The run of a finished node's output, `ui.mira` (a list of traces), or null where there is none. */
export function fromOutput(output) {
  const trace = Array.isArray(output?.mira) ? output.mira[0] : null;
  if (!trace || !Array.isArray(trace.rows)) return null;
  const rows = trace.rows.filter(isRow);
  const list = (value) => (Array.isArray(value) ? value : []);
  return {
    ...newRun(),
    id: trace.run ?? null,
    rows,
    settings: trace.settings ?? {},
    kept: list(trace.kept),
    reasons: list(trace.reasons),
    notices: list(trace.notices),
    previews: trace.previews ?? {},
    iterations: lastOf({ rows }),
    done: true,
  };
}

/** What is stored of an image of the batch at an iteration, or null. */
export function previewOf(run, iteration, image) {
  const first = run.previews?.[iteration];
  return (image === 0 ? first : first?.others?.[image - 1]) ?? null;
}

const FOUND = new WeakMap(); // of rows, which nobody changes: { names, filled, byImage }, as they may be many thousands

function found(run) {
  if (FOUND.has(run.rows)) return FOUND.get(run.rows);
  const [names, filled, byImage] = [new Set(), new Set(), new Map()];
  for (const row of run.rows) {
    for (const name of Object.keys(row)) {
      if (BOOKKEEPING.has(name)) continue;
      names.add(name);
      if (finite(row[name]) !== null) filled.add(name);
    }
    if (!byImage.has(row.image)) byImage.set(row.image, []);
    byImage.get(row.image).push(row);
  }
  const all = { names: [...names], filled, byImage };
  FOUND.set(run.rows, all);
  return all;
}

export function images(run) {
  return [...found(run).byImage.keys()].sort((a, b) => a - b);
}

/** The rows of one image. */
export function rowsOf(run, image) {
  return found(run).byImage.get(image) ?? [];
}

/** Names of the measured columns, in the order in which they first appear. */
export function columns(run) {
  return found(run).names;
}

/** The column of the drift that the run's limit is measured in, or the first one that there is. */
export function driftColumn(run) {
  const { filled } = found(run);
  return [run.settings.drift_metric, "path_kl", "score_distance", "mira"].find((name) => filled.has(name)) ?? null;
}

/** The columns that a chart draws: the reward with its parts, and one drift. */
export function curves(run) {
  const drift = driftColumn(run);
  const rewards = columns(run).filter((name) => name === "reward" || name.startsWith("reward."));
  return { drift, rewards, list: [...rewards, ...(drift ? [drift] : [])] };
}

/** The limit of the drift that is drawn; null where there is none, or where it is another column's. */
export function limit(run) {
  const { drift_limit: most, drift_metric: metric } = run.settings;
  return most > 0 && driftColumn(run) === metric ? most : null;
}

/** [{ at, what }]: the iterations where a chart has an upright line. chosen: the iterate that is looked at. */
export function uprights(run, image, chosen) {
  const kept = run.done ? finite(run.kept[image]) : null;
  // Before a round's first iteration: what the line does there is the restart.
  const lines = restarts(run, image).map((at) => ({ at: at - 0.5, what: "restart" }));
  if (kept !== null) lines.push({ at: kept, what: "kept" });
  if (chosen !== kept) lines.push({ at: chosen, what: "chosen" });
  return lines;
}

/** The iterate to look at, where `at` of 0 to `end` was looked at before: the kept one when a run has ended, the newest
 * one while one goes on, but for those who look at an earlier one. ended: just now.
 */
export function follow(run, image, at, end, ended) {
  const last = lastOf(run);
  if (ended) return run.kept[image] ?? last;
  return run.done || at < end ? Math.min(at, last) : last;
}

/** Whether a colour (as the browser computes it, `rgb(...)`) is a light ground. */
export function isLight(colour) {
  const [r, g, b] = (colour.match(/[\d.]+/g) ?? [0, 0, 0]).map(Number);
  return 0.299 * r + 0.587 * g + 0.114 * b > 140;
}

/** [iterations, ...one array per column] of one image, as uPlot takes it. */
export function table(run, image, names) {
  const rows = rowsOf(run, image);
  return [rows.map((r) => r.iteration), ...names.map((name) => rows.map((r) => finite(r[name])))];
}

/** The iterations at which the image was noised again and a new round began. */
export function restarts(run, image) {
  const rows = rowsOf(run, image);
  return rows.filter((r, i) => i > 0 && r.round > rows[i - 1].round).map((r) => r.iteration);
}

/** Seconds left, by the median of the last iterations, or null while nothing is known: of how long a person takes. */
export function secondsLeft(run) {
  if (run.done || run.ended || run.rows.length === 0 || run.settings.judge === "person") return null;
  const seconds = rowsOf(run, run.rows[0].image).map((r) => finite(r.seconds)).filter((s) => s !== null);
  if (seconds.length === 0) return null;
  const recent = seconds.slice(-5).sort((a, b) => a - b);
  return Math.max(0, run.iterations - lastOf(run)) * recent[Math.floor(recent.length / 2)];
}

export function clock(seconds) {
  const s = Math.round(seconds);
  return s >= 3600
    ? `${Math.floor(s / 3600)}:${String(Math.floor(s / 60) % 60).padStart(2, "0")}:${String(s % 60).padStart(2, "0")}`
    : `${Math.floor(s / 60)}:${String(s % 60).padStart(2, "0")}`;
}

/** A number in four significant digits, a dash for none. */
export function brief(value) {
  const number = finite(value);
  if (number === null) return "–";
  if (number !== 0 && (Math.abs(number) >= 1e5 || Math.abs(number) < 1e-3)) return number.toExponential(2);
  return String(Number(number.toPrecision(4)));
}

/** The bounds of an axis that shows values from `min` to `max`, of which there may be one or none (null). */
export function spread(min, max) {
  if (min === null || max === null) return [0, 1];
  const room = max > min ? 0.08 * (max - min) : Math.abs(max) * 0.1 || 0.1;
  return [min - room, max + room];
}

const DECIMALS = 5; // that an axis has room for

const IN_SIGHT = 4; // times the drift so far: a limit that is nearer is shown with it

/** The bounds of the drift's axis: its limit belongs to it, once it is in sight. */
export function driftSpread(run, min, max) {
  const most = limit(run);
  const inSight = most !== null && max !== null && max > 0 && most <= IN_SIGHT * max;
  return spread(min, inSight ? Math.max(max, most) : max);
}

/** What an axis says at its ticks: as many digits as tell them apart. */
export function ticks(values) {
  const step = values.length > 1 ? Math.abs(values[1] - values[0]) : Math.abs(values[0] ?? 0);
  const shown = (v, digits, way) => (Math.abs(v) <= 1e-6 * step ? "0" : v[way](digits));
  for (let digits = 0; digits <= DECIMALS; digits += 1) {
    if (values.every((v) => Math.abs(Number(v.toFixed(digits)) - v) <= 1e-6 * step)) return values.map((v) => shown(v, digits, "toFixed"));
  }
  let said = [];
  for (let digits = 1; digits <= 15; digits += 1) {
    said = values.map((v) => shown(v, digits, "toExponential"));
    if (new Set(said).size === values.length) break;
  }
  return said;
}

/** What a column is called beside its value. */
export function label(run, name) {
  return name === driftColumn(run) ? `drift (${name})` : name;
}

/** How far a run is. Comparisons are counted as the chooser does, which has one open more. */
function progress(run, iteration) {
  const { judge, iterations: wanted } = run.settings;
  if (!judge) return `iteration ${iteration} of ${run.iterations}`;
  return `${Math.min(iteration + 1, wanted)} of ${wanted} ${judge === "person" ? "choices" : "comparisons"} made`;
}

/** One line of what has happened so far. */
export function status(run, image) {
  const rows = rowsOf(run, image);
  if (rows.length === 0) return run.waiting ?? "Reward and drift appear here while the node runs.";
  const last = rows[rows.length - 1];
  const kept = run.done ? rows.find((r) => r.iteration === run.kept[image]) : null;
  const row = kept ?? last;
  const drift = driftColumn(run);
  const parts = [kept ? `kept iteration ${row.iteration}` : progress(run, last.iteration)];
  if (finite(row.round) !== null) parts.push(`round ${row.round}`);
  if (finite(row.reward) !== null) {
    parts.push(`reward ${brief(row.reward)} (start ${brief(rows[0].reward)})`);
  }
  if (drift) parts.push(`drift ${brief(row[drift])}${finite(row.round) > 1 ? " since the round began" : ""}`);
  const left = secondsLeft(run);
  if (left !== null) parts.push(`${clock(left)} left`);
  if (run.ended) parts.push(`ended by ${run.ended}, with nothing handed back`);
  if (run.done && run.reasons[image]) parts.push(run.reasons[image]);
  return parts.join(" · ");
}

/** A stranger's text without what some frontends take for HTML or a link, and others escape themselves. */
export function harmless(text) {
  const alike = { "<": "\u2039", ">": "\u203A", "[[": "[ [", "]]": "] ]" };
  return text.replace(/[<>]|\[\[|\]\]/g, (found) => alike[found]);
}

/** The rows as CSV, every column that any row has. */
export function csv(run) {
  const names = [...new Set(run.rows.flatMap((r) => Object.keys(r)))];
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    const text = typeof value === "string" && /^[=+@-]/.test(value) ? `'${value}` : String(value); // no formula
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const quoted = (list) => list.map(cell).join(",");
  return [quoted(names), ...run.rows.map((r) => quoted(names.map((n) => r[n])))].join("\n") + "\n";
}
