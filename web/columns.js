// Made by tools/help.py of COLUMNS in sampler/trace.py: what a row holds that was not measured of an image.
export const BOOKKEEPING = new Set(["iteration", "image", "round", "level", "preferred", "lr", "evaluations", "backwards", "seconds", "memory_mb"]);
