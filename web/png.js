// Pure: the texts that a PNG carries. Nothing of ComfyUI, nothing of the page.

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];

/** { keyword: text } of an ArrayBuffer's tEXt and uncompressed iTXt chunks; empty for what is no PNG, or damaged. */
export function pngTexts(buffer) {
  const bytes = new Uint8Array(buffer);
  const found = {};
  if (!SIGNATURE.every((byte, i) => bytes[i] === byte)) return found;
  const view = new DataView(buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (data.length < length || kind === "IEND") break;
    const end = data.indexOf(0);
    if (kind === "tEXt" && end > 0) found[latin(data.subarray(0, end))] = latin(data.subarray(end + 1));
    if (kind === "iTXt" && end > 0 && data[end + 1] === 0) {
      const language = data.indexOf(0, end + 3);
      const translated = data.indexOf(0, language + 1);
      if (language > 0 && translated > 0) {
        found[latin(data.subarray(0, end))] = new TextDecoder().decode(data.subarray(translated + 1));
      }
    }
    at += 12 + length;
  }
  return found;
}

function latin(bytes) {
  return new TextDecoder("latin1").decode(bytes);
}

/** { workflow: its id, records: [[node's execution id, trace], ...] } of a PNG that a run saved, or null. */
export function recordsOf(buffer) {
  const texts = pngTexts(buffer);
  try {
    const records = Object.entries(JSON.parse(texts.mira_traces));
    // Of a list, the picture's own, which has the node's name: a node has one chart.
    return { workflow: JSON.parse(texts.workflow).id, records: records.filter(([key]) => !key.includes("#")) };
  } catch {
    return null; // no record, or none that can be read
  }
}
