// The page as a whole: which models answer, and with whose key.

import { clear, ours, showState, theirs } from "./chat.js";
import { $ } from "./dom.js";
import { watch } from "./plots.js";
import { ENDPOINTS, ask, complaint, setKey } from "./server.js";

async function connect() {
  try {
    const response = await ask(ENDPOINTS.models);
    if (!response.ok) {
      $("model").textContent = await complaint(response);
      return;
    }
    const [card] = (await response.json()).data;
    ours.model = card.id;
    $("model").textContent = `${card.id} · context of ${card.max_model_len} tokens · ${card.fingerprint.kernels}`;
    document.title = `${card.id} · quantkit`;
  } catch {
    $("model").textContent = "The server does not answer.";
    return;
  }
  if (document.body.dataset.compare === "yes") await connectPeer();
}

async function connectPeer() {
  let note = "";
  theirs.model = null;
  try {
    const response = await ask(ENDPOINTS.compare);
    if (response.ok) {
      const peer = await response.json();
      theirs.model = peer.model;
      $("peer").textContent = `${peer.model} at ${peer.url}`;
    } else {
      note = `No comparison: ${await complaint(response)}`;
    }
  } catch {
    note = "No comparison: the server does not answer.";
  }
  $("comparison").hidden = theirs.model === null;
  $("peer-retry").hidden = note === "";
  $("peer-note").textContent = note;
}

function changeKey(key) {
  setKey(key);
  $("key").value = "";
  clear(); // the next key may be another person's
  connect();
  watch();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  changeKey($("key").value.trim());
});
$("forget").addEventListener("click", () => changeKey(""));
$("peer-retry").addEventListener("click", connectPeer);

showState();
connect();
watch();
