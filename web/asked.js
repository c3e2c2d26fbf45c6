// Pure: what a run was asked for, against what a prompt of today asks for. Nothing of ComfyUI, nothing of the page.

/**
 * Where the two differ: [{ node, name, was, now }], ids as the run has them; name null: it is gone, or another node.
 *
 * asked: { id: [class, inputs] } of all that the run was made from. prompt: { id: { class_type, inputs } }.
 * free: the inputs that may differ, as "id name".
 */
export function differences(asked, prompt, free) {
  const found = [];
  for (const [node, [kind, before]] of Object.entries(asked)) {
    const today = prompt[node];
    if (today?.class_type !== kind) {
      found.push({ node, name: null });
      continue;
    }
    for (const name of new Set([...Object.keys(before), ...Object.keys(today.inputs)])) {
      const [was, now] = [before[name], today.inputs[name]];
      if (!free.has(`${node} ${name}`) && JSON.stringify(was) !== JSON.stringify(now)) found.push({ node, name, was, now });
    }
  }
  return found;
}

const TOLD = 3; // differences that a sentence names
const LONGEST = 40; // characters of a value

const shown = (value) => {
  if (Array.isArray(value)) return "a link";
  const text = value === undefined ? "nothing" : JSON.stringify(value);
  return text.length > LONGEST ? `${text.slice(0, LONGEST)}...` : text;
};

/** Why an iterate cannot be taken, or null. titleOf: id -> the node's title. */
export function whyNotTaken(found, titleOf) {
  if (!found.length) return null;
  const each = found.slice(0, TOLD).map(({ node, name, was, now }) => {
    if (name === null) return `${titleOf(node)} is gone`;
    const links = Array.isArray(was) && Array.isArray(now);
    return `${titleOf(node)}: ${name} ${links ? "is linked elsewhere" : `was ${shown(was)}, is ${shown(now)}`}`;
  });
  const more = found.length > TOLD ? `; and ${found.length - TOLD} more` : "";
  return `Not taken: the graph has changed since this run, and it would be run anew (${each.join("; ")}${more}). Set that back, or queue the graph.`;
}

/** Why nothing is taken where an input comes by a link from what others read as well. title: of the node that gives it. */
export function whyShared(input, title) {
  return `Not taken: ${input} comes from ${title}, which gives its value to other inputs too: more than the picture would change. Give ${input} a node of its own.`;
}
