// What a person chooses among, and by which keys.
import assert from "node:assert/strict";
import { test } from "node:test";
import * as choice from "../../web/choice.js";

test("keys of somebody who writes or looks at a dialog choose nothing", () => {
  for (const tagName of ["INPUT", "TEXTAREA", "SELECT"]) assert.ok(choice.isTaken({ tagName }));
  assert.ok(choice.isTaken({ tagName: "DIV", isContentEditable: true }));
  const within = (role) => ({ tagName: "BUTTON", closest: (selector) => (selector.includes(`[role=${role}]`) ? {} : null) });
  assert.ok(choice.isTaken(within("dialog")) && !choice.isTaken(within("toolbar")));
  for (const other of [null, undefined, { tagName: "BODY" }, { tagName: "CANVAS" }]) assert.ok(!choice.isTaken(other));
});

test("a choice has at least two images, in a square of them, and a question", () => {
  const images = [1, 2, 3, 4].map((n) => ({ filename: `${n}.png` }));
  const asked = { token: "t", node: "3", images, wanted: "best", iteration: 0, iterations: 9, image: 0, batch: 1 };
  const pair = { ...asked, images: images.slice(2) };
  assert.deepEqual([asked, pair].map(choice.validChoice), [asked, pair]);
  assert.equal(choice.questionOf({ ...asked, images: images.slice(1), batch: 2, image: 1 }), "Which is best? Choice 1 of 9, image 1");
  assert.ok(choice.heightOf(2) < choice.heightOf(3) && choice.heightOf(3) === choice.heightOf(4) && choice.heightOf(9) < choice.heightOf(10));
  for (const bad of [null, {}, { ...asked, images: images.slice(0, 1) }, { ...asked, images: [1, 2] }, { ...asked, node: null }]) {
    assert.equal(choice.validChoice(bad), null);
  }
  assert.deepEqual([2, 3, 6, 7, 16].map(choice.columnsOf), [2, 2, 2, 3, 3]);
  assert.equal(choice.questionOf(asked), "Which is best? Choice 1 of 9");
  assert.equal(choice.questionOf({ ...asked, images: images.slice(2), batch: 3 }), "Which is better? Choice 1 of 9, image 0");
  assert.equal(choice.questionOf({ ...asked, wanted: "worst" }), "And which is the least good? Choice 1 of 9");
  assert.equal(choice.timeLeft({ timeout: 0 }, 5), "");
  assert.equal(choice.timeLeft({ timeout: 30 }, 4.2), "26 s left");
  assert.equal(choice.timeLeft({ timeout: 30, left: 8 }, 9), "0 s left"); // a page that was loaded again
});

test("the tab says that a choice is waited for, once, and stops saying so", () => {
  const called = choice.tabTitle("[0%] ComfyUI", true);
  assert.match(called, /Choose .* \[0%\] ComfyUI$/);
  assert.equal(choice.tabTitle(called, true), called);
  assert.equal(choice.tabTitle(called, false), "[0%] ComfyUI");
  assert.equal(choice.tabTitle(`(1) ${called}`, true), `(1) ${called}`); // another pack's word before it stays there
});

test("a key chooses among the images that are there, and one with a modifier is another's", () => {
  const answers = ["1", "4", "5", "0", "t", "Backspace", "Escape", "x"].map((key) => choice.answerOf({ key }, 4));
  assert.deepEqual(answers, [1, 4, null, "tie", "tie", "back", "stop", null]);
  assert.equal(choice.answerOf({ key: "1", ctrlKey: true }, 4), null);
});

/** As much of a page's element as a chooser asks for. */
class Element {
  constructor() {
    Object.assign(this, { children: [], dataset: {}, style: {}, listeners: {}, hidden: false, textContent: "" });
  }
  append(...more) { this.children.push(...more); }
  prepend(...more) { this.children.unshift(...more); }
  replaceChildren(...these) { this.children = these; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  setAttribute() {}
  contains() { return false; }
  focus() {}
}

test("a double click answers one question, and the next one after a moment", async (context) => {
  const before = globalThis.document;
  context.after(() => (globalThis.document = before));
  globalThis.document = { createElement: () => new Element(), activeElement: null };
  let now = 0;
  context.mock.method(performance, "now", () => now);
  const sent = [];
  const chooser = choice.createChooser({ imageUrl: () => "", onAnswer: async (asked, answer) => (sent.push([asked.token, answer]), null) });
  const question = (token) => ({ token, node: "1", images: [{ filename: "a" }, { filename: "b" }], iteration: 0, iterations: 2, image: 0, batch: 2 });
  const click = async (place) => {
    chooser.element.children[0].children[place - 1].listeners.click();
    await Promise.resolve();
    await Promise.resolve();
  };
  chooser.show(question("one"));
  now = 5000;
  await click(1);
  now = 5060;
  chooser.show(question("two")); // another image of the batch, at once
  now = 5140;
  await click(1);
  assert.deepEqual(sent, [["one", 1]]);
  now = 5500;
  await click(2);
  assert.deepEqual(sent, [["one", 1], ["two", 2]]);
});
