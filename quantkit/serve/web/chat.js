// The conversation: one prompt, an answer of each side as it comes, and what it took.

import { $, element } from "./dom.js";
import { ENDPOINTS, ask, complaint, events } from "./server.js";
import { differing, words } from "./words.js";

// A side is a server that answers: `path` to ask, the name of its `model`, `said` so far.
export const ours = { path: ENDPOINTS.chat, model: null, said: [] };
export const theirs = { path: ENDPOINTS.compare, model: null, said: [] };

const transcript = $("transcript");
let running = null; // an AbortController while answers come

export function showState() {
  $("send").disabled = running !== null;
  $("stop").disabled = running === null;
  // Both sides must have heard the same from the beginning.
  $("compare").disabled = running !== null || ours.said.length > 0;
}

export function clear() {
  running?.abort();
  for (const turn of transcript.querySelectorAll(".turn")) turn.remove();
  ours.said = [];
  theirs.said = [];
  $("hint").hidden = false;
  showState();
}

async function send() {
  const prompt = $("prompt").value.trim();
  if (!prompt || running || !$("composer").reportValidity()) return;
  const { signal } = (running = new AbortController());
  const comparing = theirs.model !== null && $("compare").checked;
  const sides = comparing ? [ours, theirs] : [ours];
  const heard = sides.map((side) => side.said); // of this conversation; a new one has lists of its own
  const { turn, views } = addTurn(prompt, sides);
  $("prompt").value = "";
  showState();

  const system = $("system").value.trim();
  const question = { role: "user", content: prompt };
  const body = (side, i) => ({
    model: side.model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...heard[i], question],
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  });
  const asking = (side, i) => answer(side.path, body(side, i), views[i], signal);
  let said = [];
  if ($("together").checked) {
    said = await Promise.all(sides.map(asking));
  } else {
    for (const [i, side] of sides.entries()) said.push(await asking(side, i));
  }

  if (said.includes(null)) {
    turn.append(element("p", "difference", "This turn is no part of the conversation."));
  } else {
    for (const [i, list] of heard.entries()) list.push(question, { role: "assistant", content: said[i] });
    if (comparing) turn.append(compare(said, views));
  }
  running = null;
  showState();
  scrollToEnd();
}

// Ask one side and show its answer as it comes; the text, or null if there is none to go on from.
async function answer(path, body, view, signal) {
  const text = view.said.appendChild(document.createTextNode(""));
  const taken = { start: performance.now(), first: null, end: null, reason: null, usage: null };
  view.box.setAttribute("aria-busy", "true");
  view.timing.textContent = "asked";
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error(await complaint(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(String(event.error.message));
      taken.usage = event.usage ?? taken.usage;
      const choice = event.choices?.[0];
      const said = choice?.delta?.content;
      // Reasoning is not shown, but its tokens are counted. vLLM calls it `reasoning`.
      const thought = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning;
      if (said || thought) {
        taken.first ??= performance.now();
        view.timing.textContent = said ? "answering" : "thinking";
      }
      if (said) {
        const follow = isAtEnd();
        text.appendData(said);
        if (follow) scrollToEnd();
      }
      if (choice?.finish_reason) {
        taken.reason = choice.finish_reason;
        taken.end = performance.now();
      }
    }
    if (taken.reason === null) throw new Error("The answer broke off.");
    view.timing.textContent = timing(taken);
  } catch (error) {
    view.timing.textContent = signal.aborted ? "stopped" : String(error.message);
    view.timing.classList.toggle("error", !signal.aborted);
    if (!signal.aborted || !text.data) return null;
  } finally {
    view.box.removeAttribute("aria-busy");
  }
  return text.data;
}

// Seconds from sending to the first text, said or thought (TTFT), tokens a second after it, and why
// it ended.
function timing({ start, first, end, reason, usage }) {
  const parts = [];
  if (first !== null) parts.push(`TTFT ${((first - start) / 1000).toFixed(2)} s`);
  if (usage) {
    const later = usage.completion_tokens - 1;
    if (first !== null && later > 0 && end > first) {
      parts.push(`${((later * 1000) / (end - first)).toFixed(1)} tokens/s`);
    }
    parts.push(`${usage.completion_tokens} tokens`);
    const cached = usage.prompt_tokens_details?.cached_tokens;
    if (cached) parts.push(`${cached} of ${usage.prompt_tokens} prompt tokens cached`);
  } else {
    parts.push("number of tokens not told");
  }
  if (reason !== "stop") parts.push(reason === "length" ? "cut at max tokens" : String(reason));
  return parts.join(" · ");
}

function addTurn(prompt, sides) {
  $("hint").hidden = true;
  const turn = transcript.appendChild(element("article", "turn"));
  turn.append(element("div", "asked", prompt));
  const answers = turn.appendChild(element("div", "answers"));
  const views = sides.map((side) => {
    const box = answers.appendChild(element("div", "answer"));
    box.append(element("div", "name", side.model ?? ""));
    const said = box.appendChild(element("div", "said"));
    return { box, said, timing: box.appendChild(element("div", "timing", "waiting")) };
  });
  scrollToEnd();
  return { turn, views };
}

// Mark the words that differ, and say how many do.
function compare(said, views) {
  const lists = said.map(words);
  const differs = differing(...lists);
  if (differs === null) return element("p", "difference", "Too long to mark the words that differ.");
  for (const [i, view] of views.entries()) mark(view.said, said[i], differs[i]);
  const [left, right] = differs.map((flags, i) => `${flags.filter(Boolean).length} of ${lists[i].length}`);
  const same = !differs.flat().includes(true);
  return element("p", "difference", same ? "The same words." : `${left} and ${right} words differ.`);
}

// One mark around words that differ and follow each other.
function mark(parent, text, differs) {
  let word = 0;
  const runs = [];
  for (const part of text.match(/\S+\s*|\s+/g) ?? []) {
    const marked = /\S/.test(part) && differs[word++];
    if (runs.at(-1)?.marked === marked) runs.at(-1).text += part;
    else runs.push({ marked, text: part });
  }
  const nodes = runs.flatMap(({ marked, text }) =>
    marked ? [element("mark", "", text.trimEnd()), text.slice(text.trimEnd().length)] : [text],
  );
  parent.replaceChildren(...nodes);
}

const isAtEnd = () => transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 40;
const scrollToEnd = () => (transcript.scrollTop = transcript.scrollHeight);

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
// A browser does not show what is wrong with a field that it cannot reach.
$("settings").addEventListener("invalid", () => ($("settings").open = true), true);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
