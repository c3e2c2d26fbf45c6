// The chooser of a pair as an element: no side effects beyond it, nothing of ComfyUI.

export const CSS = `
.mira-choice { display: flex; flex-direction: column; gap: 6px; padding: 6px; border-radius: 6px;
  border: 2px solid #5b9cf5; background: var(--comfy-menu-bg, #353535); }
.mira-pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.mira-pair button { padding: 4px; display: flex; flex-direction: column; gap: 3px; align-items: center; }
.mira-pair img { width: 100%; max-height: 420px; object-fit: contain; }
.mira-more { display: flex; gap: 6px; flex-wrap: wrap; }
.mira-more span { flex: 1; align-self: center; }
.mira-error { color: var(--error-text, #ff4444); }
`;
const KEYS = { 1: "left", 2: "right", 0: "tie", t: "tie", Backspace: "back", Escape: "stop" };

function isRef(ref) {
  return ref !== null && typeof ref === "object" && typeof ref.filename === "string";
}

/** A pair as the server sends it, or null for anything else. */
export function validPair(data) {
  const whole = data && typeof data.token === "string" && data.node !== undefined && data.node !== null;
  return whole && isRef(data.left) && isRef(data.right) ? data : null;
}

/** Whether text is being written into this element. */
export function isWriting(element) {
  return Boolean(element) && (element.isContentEditable === true || /^(INPUT|TEXTAREA|SELECT)$/.test(element.tagName ?? ""));
}

/** The answer that a key stands for, or null. Keys with a modifier belong to others. */
export function answerOf(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return null;
  return KEYS[event.key] ?? null;
}

/**
 * onAnswer(pair, answer) -> Promise of null, or of why it was not taken.
 * Returns { element, show(pair), hide(token), pair(), answer(answer) }.
 */
export function createChooser({ imageUrl, onAnswer }) {
  const box = document.createElement("div");
  box.className = "mira-choice";
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "Which image is better? Key 1: left, 2: right, 0: tie, Escape: enough");
  box.hidden = true;
  const grid = document.createElement("div");
  grid.className = "mira-pair";
  const more = document.createElement("div");
  more.className = "mira-more";
  const error = document.createElement("div");
  error.className = "mira-error";
  error.setAttribute("role", "alert");
  let pair = null;
  let busy = false;

  function button(answer, label, title) {
    const made = document.createElement("button");
    made.type = "button";
    made.title = title;
    made.dataset.answer = answer;
    made.append(label);
    made.addEventListener("click", () => answered(answer));
    return made;
  }

  const pictures = {};
  for (const [side, key] of [["left", "1"], ["right", "2"]]) {
    pictures[side] = document.createElement("img");
    pictures[side].alt = `the ${side} image`;
    pictures[side].draggable = false;
    const made = button(side, `${key}`, `The ${side} one is better (key ${key})`);
    made.prepend(pictures[side]);
    grid.append(made);
  }
  const count = document.createElement("span");
  more.append(
    count,
    button("back", "Back", "Take the last choice back (Backspace)"),
    button("tie", "Tie", "Neither is better (key 0)"),
    button("stop", "Good enough, stop", "Keep the best so far (Escape)"),
  );
  box.append(grid, more, error);
  for (const type of ["wheel", "pointerdown"]) box.addEventListener(type, (e) => e.stopPropagation());
  box.addEventListener("keydown", (event) => {
    const answer = answerOf(event);
    if (!answer) return;
    event.preventDefault();
    event.stopPropagation();
    answered(answer);
  });

  async function answered(answer) {
    if (!pair || busy) return;
    busy = true;
    error.textContent = "";
    const asked = pair;
    const refused = await onAnswer(asked, answer);
    busy = false;
    if (refused) error.textContent = refused;
    else hide(asked.token);
  }

  function hide(token) {
    if (pair && token !== undefined && pair.token !== token) return;
    pair = null;
    box.hidden = true;
  }

  return {
    element: box,
    hide,
    pair: () => pair,
    answer: answered,
    show(next) {
      if (pair?.token === next.token) return;
      pair = next;
      error.textContent = "";
      for (const side of ["left", "right"]) pictures[side].src = imageUrl(next[side]);
      const of = next.batch > 1 ? `, image ${next.image + 1} of ${next.batch}` : "";
      count.textContent = `Which is better? ${next.iteration + 1} of ${next.iterations}${of}`;
      box.hidden = false;
      // Keys choose at once, but never those of somebody who is writing.
      if (!isWriting(document.activeElement)) box.focus({ preventScroll: true });
    },
  };
}
