// What a node says in words.
import assert from "node:assert/strict";
import { test } from "node:test";
import { textOf } from "../../web/text.js";

test("a node's text is its first string, or nothing", () => {
  assert.deepEqual([{ mira_text: ["a", 3] }, { mira_text: ["a"] }, { mira_text: "a" }, { mira_text: [3, "a"] }, null].map(textOf), ["a", "a", null, null, null]);
});
