// The live chart of one run as an element: no side effects beyond it, nothing of ComfyUI.
import uPlot from "./vendor/uPlot.esm.js";
import {
  brief, csv, curves, driftSpread, follow, images, isLight, label, lastOf, limit, newRun, previewOf, rowsOf, spread, status, table, ticks, uprights,
} from "./series.js";
import { keepScrolling } from "./text.js";

// On a dark and on a light ground; both have a contrast of 4.5 to 1 and more there.
const REWARD = "var(--mira-reward)";
const DRIFT = "var(--mira-drift)";
const INK = { dark: ["#65a3f6", "#f0a03c"], light: ["#154da0", "#843c00"] };
const PART_DASHES = [[4, 3], [1, 3], [8, 4], [2, 2]];
const HEIGHT = 150;
const AXIS = 46; // pixels of the plot's width, or more for long numbers

export const CSS = `
.mira-box { display: flex; flex-direction: column; gap: 4px; width: 100%; box-sizing: border-box;
  font: 12px/1.35 var(--mira-font, Inter, Arial, sans-serif); color: var(--fg-color, #ddd); }
.mira-head { display: flex; gap: 6px; align-items: center; min-height: 22px; }
.mira-status { flex: 1; overflow: hidden; text-overflow: ellipsis; }
.mira-box button, .mira-box select { font: inherit; color: var(--input-text, var(--fg-color, #ddd));
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px;
  padding: 2px 7px; cursor: pointer; }
.mira-box button:hover:not(:disabled) { border-color: ${REWARD}; }
.mira-box button:disabled { opacity: .45; cursor: default; }
.mira-box :focus-visible { outline: 2px solid ${REWARD}; outline-offset: 1px; }
.mira-plot { position: relative; width: 100%; height: ${HEIGHT}px; border-radius: 4px; overflow: hidden;
  background: var(--comfy-input-bg, #222); }
.mira-values { display: flex; flex-wrap: wrap; gap: 0 10px; min-height: 17px; font-variant-numeric: tabular-nums;
  padding: 0 4px; border-radius: 4px; color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); }
/* Not of all: a node that is new has no width yet, and would be as high as its words are long. */
.mira-values, .mira-notices { overflow-wrap: anywhere; }
.mira-values:empty { background: none; }
.mira-values b { font-weight: 600; }
.mira-scrub { display: flex; gap: 8px; align-items: center; }
.mira-scrub input { flex: 1; min-width: 40px; accent-color: ${REWARD}; }
.mira-scrub img, .mira-none { width: 72px; height: 72px; object-fit: contain; border-radius: 4px;
  background: var(--comfy-input-bg, #222); }
.mira-none { display: grid; place-items: center; font-size: 10px; text-align: center; }
.mira-notices { white-space: pre-line; max-height: 96px; overflow-y: auto; }
.mira-box [hidden] { display: none !important; }
`;

function element(tag, className, attributes = {}) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** uPlot takes the screen's pixels for the plot's own; the editor's zoom lies between. An event is scaled once. */
function unscaled() {
  let last = null;
  return (u, left, top) => {
    const event = u.cursor.event;
    if (!event || event === last || left < 0) return [left, top];
    last = event;
    const zoom = u.over.getBoundingClientRect().width / u.over.offsetWidth || 1;
    return [left / zoom, top / zoom];
  };
}

/** How wide an axis is: as its longest tick, from the second look on as before. */
function widthOf(u, values, index, cycle) {
  const axis = u.axes[index];
  if (cycle > 1) return axis._size;
  u.ctx.font = axis.font[0];
  const widest = Math.max(0, ...(values ?? []).map((text) => u.ctx.measureText(text).width));
  return Math.max(AXIS, Math.ceil(axis.ticks.size + axis.gap + widest / devicePixelRatio) + 2);
}

/**
 * onTake(iteration, anew): the user wants this iterate, anew: painted anew; null leaves the buttons out.
 * onLook(preview): of a run that is done, this iterate is looked at: the kept one first, then where the slider goes.
 * imageUrl(preview): the address of a stored preview. first: what is said before there is a run.
 * Returns { element, inner, set(run), run(), restyle(), destroy() }: `element` is for the host, `inner` may be measured,
 * `restyle` is for when the page's colours have changed. What was destroyed draws again once it is set.
 */
export function createChart({ onTake = null, onLook = () => {}, imageUrl = () => "", saveAs = () => {}, first } = {}) {
  const outer = element("div");
  const inner = element("div", "mira-box", { role: "group", "aria-label": "MIRA record" });
  const head = element("div", "mira-head");
  const line = element("div", "mira-status", { role: "status", "aria-live": "off" });
  const which = element("select", "", { "aria-label": "Image of the batch" });
  const save = element("button", "", { type: "button", title: "Save the record as CSV" });
  save.textContent = "CSV";
  const plot = element("div", "mira-plot", { role: "img", "aria-label": "Reward and drift by iteration" });
  const values = element("div", "mira-values");
  const scrub = element("div", "mira-scrub");
  const shown = element("img", "", { alt: "The image at the chosen iteration" });
  const none = element("div", "mira-none");
  none.textContent = "no picture is kept of it";
  const slider = element("input", "", { type: "range", min: "0", step: "1", "aria-label": "Iteration to look at" });
  const take = element("button", "", { type: "button", title: "Return this iterate: set `iterate` and queue again" });
  take.textContent = "Take";
  const anew = element("button", "mira-anew", {
    type: "button",
    title: "Return this iterate painted anew, nearer to what the model would paint: set `final_restart`",
  });
  anew.textContent = "Repaint";
  const notices = element("div", "mira-notices");
  head.append(line, which, save);
  scrub.append(shown, none, slider, ...(onTake ? [take, anew] : []));
  inner.append(head, plot, values, scrub, notices);
  outer.append(inner);
  // The canvas drags no node by what is pressed here; all else is its own.
  inner.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
  keepScrolling(notices);

  let run = { ...newRun(), waiting: first };
  let isFresh = false; // a run that has ended, since the last drawing
  let image = 0;
  let chart = null;
  let shape = "";
  let frame = 0;

  function colour(name) {
    return getComputedStyle(inner).getPropertyValue(name).trim();
  }

  const reward = () => colour("--mira-reward");
  const drifted = () => colour("--mira-drift");

  function ink() {
    const [one, other] = INK[isLight(getComputedStyle(plot).backgroundColor) ? "light" : "dark"];
    inner.style.setProperty("--mira-reward", one);
    inner.style.setProperty("--mira-drift", other);
  }

  /** A straight line over the plot, in the screen's pixels. */
  function rule({ ctx, bbox }, { x, y, stroke, dash, alpha = 1 }) {
    ctx.save();
    Object.assign(ctx, { strokeStyle: stroke, globalAlpha: alpha });
    ctx.setLineDash(dash);
    ctx.beginPath();
    ctx.moveTo(x ?? bbox.left, y ?? bbox.top);
    ctx.lineTo(x ?? bbox.left + bbox.width, y ?? bbox.top + bbox.height);
    ctx.stroke();
    ctx.restore();
  }

  function mark(u) {
    const grey = colour("--descrip-text") || "#999";
    const looks = { restart: [grey, [1, 5]], kept: [reward(), []], chosen: [grey, [3, 3]] };
    for (const { at, what } of uprights(run, image, Number(slider.value))) {
      const [stroke, dash] = looks[what];
      rule(u, { x: Math.round(u.valToPos(at, "x", true)), stroke, dash });
    }
    const most = limit(run);
    if (most === null) return;
    const y = Math.round(u.valToPos(most, "drift", true));
    if (y < u.bbox.top || y > u.bbox.top + u.bbox.height) return;
    rule(u, { y, stroke: drifted(), dash: [6, 4], alpha: 0.6 });
  }

  function build({ drift, rewards, list }) {
    chart?.destroy();
    // Functions, so that a change of theme is seen at the next drawing.
    const grid = { stroke: () => colour("--border-color") || "#444", width: 0.5 };
    const values = (_, splits) => ticks(splits);
    const axis = { stroke: () => colour("--fg-color") || "#ddd", grid, ticks: grid, values, font: "11px Inter, Arial, sans-serif", size: widthOf };
    const series = rewards.map((name, i) => ({
      label: name, scale: "reward", stroke: reward, width: name === "reward" ? 2 : 1,
      dash: name === "reward" ? undefined : PART_DASHES[(i - 1) % PART_DASHES.length], points: { size: 4 },
    }));
    if (drift) series.push({ label: drift, scale: "drift", stroke: drifted, width: 2, points: { size: 4 } });
    chart = new uPlot(
      {
        width: Math.max(plot.clientWidth, 120), height: HEIGHT, legend: { show: false },
        cursor: { drag: { x: false, y: false }, move: unscaled() },
        scales: {
          x: { time: false, range: (_, min, max) => [min ?? 0, Math.max(max ?? 1, (min ?? 0) + 1)] },
          reward: { range: (_, min, max) => spread(min, max) },
          drift: { range: (_, min, max) => driftSpread(run, min, max) },
        },
        axes: [
          { ...axis, size: 26, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] },
          ...(rewards.length ? [{ ...axis, scale: "reward", stroke: reward }] : []),
          ...(drift ? [{ ...axis, scale: "drift", side: 1, stroke: drifted, grid: { show: false } }] : []),
        ],
        series: [{ label: "iteration" }, ...series],
        hooks: { draw: [mark], setCursor: [(u) => showValues(u.cursor.idx)] },
      },
      table(run, image, list),
      plot,
    );
    resized.observe(plot);
  }

  function showValues(index) {
    const { list, drift } = curves(run);
    const rows = rowsOf(run, image);
    const row = rows[index ?? rows.findIndex((r) => r.iteration === Number(slider.value))];
    values.replaceChildren();
    if (!row) return;
    for (const name of ["iteration", ...list]) {
      const item = element("span");
      const title = element("b");
      title.textContent = `${label(run, name)} `;
      if (name !== "iteration") title.style.color = name === drift ? DRIFT : REWARD;
      item.append(title, name === "iteration" ? String(row.iteration) : brief(row[name]));
      values.append(item);
    }
  }

  function showIterate() {
    const at = Number(slider.value);
    const preview = previewOf(run, at, image);
    shown.hidden = !preview;
    none.hidden = Boolean(preview) || Object.keys(run.previews).length === 0;
    if (preview) shown.src = imageUrl(preview);
    slider.setAttribute("aria-valuetext", `iteration ${at}`);
    take.disabled = anew.disabled = !run.done;
    showValues(null);
    chart?.redraw(false);
  }

  function look() {
    const preview = previewOf(run, Number(slider.value), image);
    if (run.done && preview) onLook(preview);
  }

  function draw() {
    frame = 0;
    ink();
    const all = images(run);
    if (all.length && !all.includes(image)) image = all[0];
    which.hidden = all.length < 2;
    which.replaceChildren(
      ...all.map((b) => Object.assign(element("option"), { value: b, textContent: `image ${b}`, selected: b === image })),
    );
    line.textContent = line.title = status(run, image);
    save.disabled = run.rows.length === 0;
    notices.textContent = [...(run.refused ? [run.refused] : []), ...run.notices].join("\n");
    const finished = isFresh;
    isFresh = false;
    const at = follow(run, image, Number(slider.value), Number(slider.max), finished);
    slider.max = String(lastOf(run));
    slider.value = String(at);
    if (finished && !run.settings.final_restart) look(); // else what was painted anew stays on the node
    scrub.hidden = run.rows.length === 0;
    const wanted = curves(run);
    if (wanted.list.length === 0) {
      chart?.destroy();
      chart = null;
      return showIterate();
    }
    const signature = wanted.list.join();
    if (!chart || signature !== shape) {
      shape = signature;
      build(wanted);
    } else {
      chart.setData(table(run, image, wanted.list));
    }
    showIterate();
  }

  const redraw = () => {
    frame ||= requestAnimationFrame(draw);
  };
  const resized = new ResizeObserver(() => {
    if (chart && plot.clientWidth > 0) chart.setSize({ width: plot.clientWidth, height: HEIGHT });
  });
  slider.addEventListener("input", () => {
    showIterate();
    look();
  });
  which.addEventListener("change", () => {
    image = Number(which.value);
    draw();
    look();
  });
  save.addEventListener("click", () => saveAs("mira_trace.csv", csv(run)));
  take.addEventListener("click", () => onTake?.(Number(slider.value), false));
  anew.addEventListener("click", () => onTake?.(Number(slider.value), true));
  draw();

  return {
    element: outer,
    inner,
    run: () => run,
    set(next) {
      isFresh = next.done && (isFresh || !run.done || next.id !== run.id);
      run = next;
      redraw();
    },
    restyle() {
      ink();
      chart?.redraw(false);
    },
    destroy() {
      resized.disconnect();
      cancelAnimationFrame(frame);
      chart?.destroy();
      chart = null;
      frame = 0;
    },
  };
}
