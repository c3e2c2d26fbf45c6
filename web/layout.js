// Pure: where the values of a node's widgets belong. No side effects, nothing of ComfyUI.

const SAMPLING = ["seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler"];
const SETTINGS = [
  "iterations", "learning_rate", "regularizer", "beta", "keep", "drift_limit", "stop", "patience", "memory",
  "drift_metric", "optimizer", "clip_norm", "weighting", "measured", "prompt", "iterate", "method", "variables", "hold",
  "seeds", "gradient_steps", "repeatable",
];

/** A workflow saves the values of widgets by their place. These were the places before presets. */
const BEFORE = {
  MiraOptimizeKSampler: [...SAMPLING, "denoise", ...SETTINGS],
  MiraOptimizeSamplerAdvanced: SETTINGS,
  MiraSearchKSampler: [
    ...SAMPLING, "denoise", "method", "particles", "rounds", "interval", "strength", "potential", "radius", "iterations",
    "learning_rate", "regularizer", "beta", "memory", "prompt", "iterate", "repeatable",
  ],
  MiraDPOPreference: [
    "judge", ...SAMPLING, "denoise", "iterations", "method", "candidates", "learning_rate", "beta", "energy", "explore",
    "step", "keep", "skip_ties", "kick", "memory", "timeout", "on_timeout", "prompt", "iterate", "repeatable",
  ],
};

/** Whether these values were saved before presets: where there are names now, there were numbers. */
function isBefore(kind, values) {
  const at = { MiraOptimizeKSampler: 6, MiraOptimizeSamplerAdvanced: 0, MiraSearchKSampler: 6, MiraDPOPreference: 12 }[kind];
  return at !== undefined && typeof values[at] === "number";
}

/** widgets: [{ name, value }] in today's order, with their defaults. Returns today's values, or null where they are so. */
export function migrated(kind, values, widgets) {
  if (!(kind in BEFORE) || !Array.isArray(values) || !isBefore(kind, values)) return null;
  const known = Object.fromEntries(BEFORE[kind].slice(0, values.length).map((name, i) => [name, values[i]]));
  if (kind.startsWith("MiraOptimize")) {
    known.preset = known.method === undefined || known.method === "as_set" ? "custom" : known.method;
    known.restart_every = 0; // there were no restarts
    known.seeds ??= 1;
    known.gradient_steps ??= 0;
  }
  return widgets.map(({ name, value }) => known[name] ?? value);
}

/** The dials and inputs that a preset sets: { name: value }, of `{ presets, dials }` as the server tells them. */
export function presetValues({ presets, dials }, preset) {
  return { ...(presets?.[preset] ?? {}), ...(dials?.[preset] ?? {}) };
}

/** The preset after `name` was set to `value`: what departs from it is the user's own. */
export function presetAfter({ presets }, preset, name, value) {
  const wanted = presets?.[preset];
  return wanted && name in wanted && wanted[name] !== value ? "custom" : preset;
}

/** The inputs that some choice does not read, of { combo: { input: [values of the combo that read it] } }. */
export function readBySome(told) {
  return new Set(Object.values(told).flatMap(Object.keys));
}

/**
 * The inputs that mean nothing to what is chosen. told: { combo: { input: [values of the combo that read it] } };
 * values: { combo: its value }, without a combo whose value comes from elsewhere.
 */
export function unread(told, values) {
  const found = new Set();
  for (const [combo, inputs] of Object.entries(told)) {
    if (!(combo in values)) continue;
    for (const [name, readers] of Object.entries(inputs)) if (!readers.includes(values[combo])) found.add(name);
  }
  return found;
}

/** Today's widgets of a node as its class tells them: [{ name, value }]. */
export function widgetsOf({ input, input_order: order }) {
  const found = [];
  for (const part of ["required", "optional"]) {
    for (const name of order?.[part] ?? Object.keys(input?.[part] ?? {})) {
      const [kind, options = {}] = input[part][name];
      const combo = Array.isArray(kind) || kind === "COMBO";
      if (options.forceInput || !(combo || ["INT", "FLOAT", "STRING", "BOOLEAN"].includes(kind))) continue;
      const first = Array.isArray(kind) ? kind[0] : options.options?.[0];
      found.push({ name, value: options.default ?? first });
      if (options.control_after_generate) found.push({ name: "control_after_generate", value: "randomize" });
    }
  }
  return found;
}
