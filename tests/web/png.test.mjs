// The texts of PNGs, made here byte by byte.
import assert from "node:assert/strict";
import { test } from "node:test";
import { pngTexts, recordsOf } from "../../web/png.js";

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const bytes = (text) => [...new TextEncoder().encode(text)];

function chunk(kind, data) {
  const n = data.length;
  return [n >>> 24, (n >>> 16) & 255, (n >>> 8) & 255, n & 255, ...bytes(kind), ...data, 0, 0, 0, 0];
}

const png = (...chunks) => new Uint8Array([...SIGNATURE, ...chunks.flat(), ...chunk("IEND", [])]).buffer;
const text = (key, value) => chunk("tEXt", [...bytes(key), 0, ...bytes(value)]);

test("texts of both kinds are read, and others passed over", () => {
  const long = chunk("iTXt", [...bytes("prompt"), 0, 0, 0, 0, 0, ...bytes("Füchse")]);
  const packed = chunk("iTXt", [...bytes("packed"), 0, 1, 0, 0, 0, 1, 2, 3]);
  const found = pngTexts(png(chunk("IHDR", Array(13).fill(0)), text("a", "1"), packed, long, text("b", "")));
  assert.deepEqual(found, { a: "1", prompt: "Füchse", b: "" });
});

test("what is no PNG, or is cut short, has none", () => {
  assert.deepEqual(pngTexts(new ArrayBuffer(0)), {});
  assert.deepEqual(pngTexts(new Uint8Array(bytes("<svg/>")).buffer), {});
  const whole = png(text("a", "1"), text("b", "a long text"));
  assert.deepEqual(pngTexts(whole.slice(0, whole.byteLength - 20)), { a: "1" });
  const huge = new Uint8Array([...SIGNATURE, 0xff, 0xff, 0xff, 0xff, ...bytes("tEXt"), 1, 2, 3, 4]).buffer;
  assert.deepEqual(pngTexts(huge), {});
});

test("the records of a run, with the workflow that they belong to", () => {
  const traces = JSON.stringify({ 7: { rows: [] }, "7#1": { rows: [] }, "2:5": { rows: [] } });
  const found = recordsOf(png(text("workflow", '{"id": "w"}'), text("mira_traces", traces)));
  assert.equal(found.workflow, "w");
  assert.deepEqual(found.records.map(([key]) => key), ["7", "2:5"]);
  assert.equal(recordsOf(png(text("workflow", '{"id": "w"}'))), null);
  assert.equal(recordsOf(png(text("workflow", "{"), text("mira_traces", traces))), null);
});
