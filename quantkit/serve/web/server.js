// What the page asks of the server that it came from; it may connect to no other.

import { $ } from "./dom.js";

// Every address, relative to the page, so that it works behind a proxy's path.
export const ENDPOINTS = {
  models: "v1/models",
  chat: "v1/chat/completions",
  compare: "compare",
  metrics: "metrics",
};
const KEY = "quantkit.key"; // in sessionStorage, which ends with the tab

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

// Send a request with the key, if there is one; show the field for it if the server wants another.
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.status === 401) {
    $("key-form").hidden = false;
    $("key-note").textContent = key ? "The server does not know this key." : "The server asks for a key.";
  } else if (key) {
    $("key-form").hidden = false;
    $("key-note").textContent = "It stays in this tab and goes with it.";
  }
  return response;
}

// Why a response is no success, in the server's words where it has some.
export async function complaint(response) {
  try {
    return String((await response.json()).error.message);
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

// The JSON of each server-sent event, up to `[DONE]`.
export async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const blocks = rest.split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice("data:".length).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
    if (done) return;
  }
}
