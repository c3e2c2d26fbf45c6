// The chooser among images as an element: no side effects beyond it, nothing of ComfyUI.

export const CSS = `
.mira-choice { display: flex; flex-direction: column; gap: 6px; padding: 6px; border-radius: 6px;
  border: 2px solid var(--mira-reward, #65a3f6); background: var(--comfy-menu-bg, #353535); }
.mira-offers { display: grid; gap: 6px; }
.mira-offers button { padding: 4px; display: flex; flex-direction: column; gap: 3px; align-items: center; }
.mira-offers img { width: 100%; max-height: 420px; object-fit: contain; }
.mira-more { display: flex; gap: 6px; flex-wrap: wrap; }
.mira-more span { flex: 1; align-self: center; }
.mira-more span:empty { display: none; }
.mira-error { font-weight: 600; border-left: 4px solid var(--error-text, #ff4444); padding-left: 6px; }
.mira-error:empty { display: none; }
`;
// Milliseconds in which a key was meant for what had the focus before; of one that ends the choice or takes one back.
const [SETTLES, ENDS] = [400, 1000];
const SOON = 1000; // after an answer: what is asked then may be met by the second click of a double one
const KEYS = { 0: "tie", t: "tie", Backspace: "back", Escape: "stop" };

function isRef(ref) {
  return ref !== null && typeof ref === "object" && typeof ref.filename === "string";
}

/** A choice as the server asks for it, or null for anything else. */
export function validChoice(data) {
  const whole = data && typeof data.token === "string" && data.node !== undefined && data.node !== null;
  return whole && Array.isArray(data.images) && data.images.length > 1 && data.images.every(isRef) ? data : null;
}

/** In how many columns so many images stand: of more than three, one is too small to judge. */
export function columnsOf(count) {
  return count > 6 ? 3 : 2;
}

/** In pixels: what so many images and the buttons take on a node of the usual width. */
export function heightOf(count) {
  const columns = columnsOf(count);
  return 110 + Math.ceil(count / columns) * Math.round(380 / columns + 30);
}

/** What is asked, in words, of a choice as the server asks for it. */
export function questionOf({ images, wanted, iteration, iterations, image, batch }) {
  const asked = wanted === "worst" ? "And which is the least good?" : `Which is ${images.length > 2 ? "best" : "better"}?`;
  return `${asked} Choice ${iteration + 1} of ${iterations}${batch > 1 ? `, image ${image}` : ""}`;
}

/** How long a choice is still waited for, `passed` seconds after it was shown; empty: for ever. */
export function timeLeft({ timeout, left = timeout }, passed) {
  return timeout > 0 ? `${Math.max(0, Math.ceil(left - passed))} s left` : "";
}

const CALL = "\u25CF Choose \u00B7 ";

/** The title of the browser's tab, which says so while a choice is waited for. */
export function tabTitle(title, waits) {
  if (waits && title.includes(CALL)) return title; // though another pack has put something before it
  const bare = title.replaceAll(CALL, "");
  return waits ? CALL + bare : bare;
}

/** Whether the keys are somebody else's while this element has the focus: of text that is written, of a dialog. */
export function isTaken(element) {
  if (!element) return false;
  const writing = element.isContentEditable === true || /^(INPUT|TEXTAREA|SELECT)$/.test(element.tagName ?? "");
  return writing || Boolean(element.closest?.("dialog, [role=dialog], [role=menu], [role=listbox]"));
}

/** The answer that a key stands for among so many images, or null. Keys with a modifier belong to others. */
export function answerOf(event, count) {
  if (event.ctrlKey || event.metaKey || event.altKey) return null;
  const place = /^[1-9]$/.test(event.key) ? Number(event.key) : null;
  return place ? (place <= count ? place : null) : (KEYS[event.key] ?? null);
}

/**
 * onAnswer(choice, answer) -> Promise of null, or of why it was not taken; answer: an image's place from 1, or a word.
 * Returns { element, show(choice), hide(token), choice() }.
 */
export function createChooser({ imageUrl, onAnswer }) {
  const box = document.createElement("div");
  box.className = "mira-choice";
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "Choose an image. Keys 1, 2, ...: that one, 0: tie, Backspace: the last one again, Escape: enough");
  box.hidden = true;
  const grid = document.createElement("div");
  grid.className = "mira-offers";
  const more = document.createElement("div");
  more.className = "mira-more";
  const error = document.createElement("div");
  error.className = "mira-error";
  error.setAttribute("role", "alert");
  let choice = null;
  let busy = null; // the token of the choice that an answer is on its way to
  let since = 0; // when the choice was shown
  let seized = false; // whether it took the focus then
  let latest = -Infinity; // when the last answer was given
  let clock = 0; // of what a choice has left

  function button(answer, label, title) {
    const made = document.createElement("button");
    made.type = "button";
    made.title = title;
    made.dataset.answer = answer;
    made.append(label);
    made.addEventListener("click", () => answered(answer));
    return made;
  }

  function offer(image, place) {
    const made = button(place, `${place}`, place < 10 ? `This one (key ${place})` : "This one");
    const picture = document.createElement("img");
    picture.alt = `image ${place}`;
    picture.draggable = false;
    picture.src = imageUrl(image);
    made.prepend(picture);
    return made;
  }

  const count = document.createElement("span");
  count.setAttribute("aria-live", "polite");
  const timer = document.createElement("span");
  timer.setAttribute("role", "timer");
  more.append(
    count,
    timer,
    button("back", "Back (\u232B)", "Take the last choice back (Backspace)"),
    button("tie", "Tie (0)", "None is better (key 0)"),
    button("stop", "Good enough (Esc)", "Keep the best so far (Escape)"),
  );
  box.append(grid, more, error);
  box.addEventListener("keydown", (event) => {
    const answer = choice && answerOf(event, choice.images.length);
    if (!answer) return;
    event.preventDefault();
    event.stopPropagation();
    const passed = performance.now() - since;
    if (!event.repeat && !(seized && passed < (answer === "back" || answer === "stop" ? ENDS : SETTLES))) answered(answer);
  });

  async function answered(answer) {
    const now = performance.now();
    if (!choice || busy === choice.token || (since - latest < SOON && now - since < SETTLES)) return;
    error.textContent = "";
    latest = now;
    const asked = choice;
    busy = asked.token;
    const refused = await onAnswer(asked, answer);
    if (busy === asked.token) busy = null;
    if (!refused) hide(asked.token);
    else if (choice?.token === asked.token) error.textContent = refused; // not beneath another question
  }

  function hide(token) {
    if (choice && token !== undefined && choice.token !== token) return;
    choice = null;
    clearInterval(clock);
    box.hidden = true;
  }

  function tick() {
    timer.textContent = timeLeft(choice, (performance.now() - since) / 1000);
  }

  return {
    element: box,
    hide,
    choice: () => choice,
    show(next) {
      if (choice?.token === next.token) return;
      choice = next;
      since = performance.now();
      error.textContent = "";
      grid.style.gridTemplateColumns = `repeat(${columnsOf(next.images.length)}, 1fr)`;
      grid.replaceChildren(...next.images.map((image, i) => offer(image, i + 1)));
      count.textContent = questionOf(next);
      clearInterval(clock);
      tick();
      if (timer.textContent) clock = setInterval(tick, 1000);
      box.hidden = false;
      // Keys choose at once, but never those of somebody who does something else with them.
      const active = document.activeElement;
      seized = !isTaken(active) && !box.contains(active);
      if (!isTaken(active)) box.focus({ preventScroll: true });
    },
  };
}
