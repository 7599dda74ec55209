// Plots of /metrics, the same numbers that Prometheus reads.

import { $, element } from "./dom.js";
import { ENDPOINTS, ask, complaint } from "./server.js";

const POLL_MS = 2000;
const WINDOW_S = 300; // what a plot shows
const QUANTILE_S = 30; // what a quantile is taken over
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [300, 100]; // of a plot's own coordinates, stretched to its box

const count = (value) => String(Math.round(value));
const rate = (value) => value.toFixed(value < 10 ? 1 : 0);
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const seconds = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`);

// `read` gives the value of each series by its name, from a sample and those before it; a sample
// is {time, metrics}. `limit` gives what a series is to be held against, `limited` says what that
// is, and `top` is the highest value of the axis.
const PLOTS = [
  {
    title: "Requests", format: count,
    read: (now) => [["running", one(now, "requests_running")], ["queued", one(now, "requests_queued")]],
  },
  {
    title: "Waiting for their first token, by tier", format: count,
    read: (now) => tiers(now).map((tier) => [tier, one(now, "tier_requests_waiting", { tier })]),
  },
  {
    title: `Time to first token, p90 of ${QUANTILE_S} s`, format: seconds,
    read: (now, before) => p90s(now, before, "tier_time_to_first_token_seconds"),
    limited: "promised", limit: (now, tier) => one(now, "tier_slo_ttft_seconds", { tier }),
  },
  {
    title: `Inter-token latency, p90 of ${QUANTILE_S} s`, format: seconds,
    read: (now, before) => p90s(now, before, "tier_inter_token_latency_seconds"),
  },
  {
    title: "SLO attainment, last 1,000 requests", format: percent, top: 1,
    empty: "No tier promises a time to the first token.",
    read: (now) =>
      tiers(now)
        .map((tier) => [tier, one(now, "tier_slo_attainment", { tier })])
        .filter(([, value]) => !Number.isNaN(value)),
  },
  {
    title: "KV cache", format: count,
    read: (now) => [["tokens in use", one(now, "kv_reserved_tokens")]],
    limited: "of", limit: (now) => one(now, "kv_total_tokens"),
  },
  {
    title: "Tokens a second", format: rate,
    read: (now, before) =>
      [["prompt", "prompt_tokens_total"], ["generated", "generated_tokens_total"]].map(
        ([name, metric]) => [name, increase(now, before.at(-1), metric) / (now.time - before.at(-1)?.time)],
      ),
  },
];

// --- numbers from the text -----------------------------------------------------------------

// Prometheus' text format: name without its prefix → [{labels, value}].
function parse(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const found = /^quantkit_(\w+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!found) continue;
    const labels = Object.fromEntries(
      [...(found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name, value]),
    );
    const value = found[3] === "+Inf" ? Infinity : Number(found[3]);
    if (!metrics.has(found[1])) metrics.set(found[1], []);
    metrics.get(found[1]).push({ labels, value });
  }
  return metrics;
}

// A metric's entries whose labels are these, whatever others they have.
const entries = (sample, name, labels) =>
  (sample.metrics.get(name) ?? []).filter((entry) =>
    Object.entries(labels).every(([label, value]) => entry.labels[label] === value),
  );
const one = (sample, name, labels = {}) => entries(sample, name, labels)[0]?.value ?? NaN;
const tiers = (sample) => entries(sample, "tier_requests_waiting", {}).map((entry) => entry.labels.tier);
const increase = (now, before, name) => (before ? one(now, name) - one(before, name) : NaN);

// The 90th percentile of what a histogram counted lately, linear within its buckets as in
// Prometheus' histogram_quantile; NaN where it counted nothing.
function p90s(now, before, name) {
  const since = before.find((sample) => now.time - sample.time <= QUANTILE_S);
  return tiers(now).map((tier) => {
    const old = since ? entries(since, `${name}_bucket`, { tier }) : [];
    // A tier's first requests make its buckets appear; before, they were at 0.
    const buckets = entries(now, `${name}_bucket`, { tier }).map((entry, i) => ({
      bound: entry.labels.le === "+Inf" ? Infinity : Number(entry.labels.le),
      total: entry.value - (old[i]?.value ?? 0),
    }));
    return [tier, since ? quantile(0.9, buckets) : NaN];
  });
}

function quantile(share, buckets) {
  const rank = share * (buckets.at(-1)?.total ?? 0);
  if (rank === 0) return NaN;
  const i = buckets.findIndex((bucket) => bucket.total >= rank);
  const [low, below] = i > 0 ? [buckets[i - 1].bound, buckets[i - 1].total] : [0, 0];
  if (buckets[i].bound === Infinity) return low;
  return low + ((buckets[i].bound - low) * (rank - below)) / (buckets[i].total - below);
}

// --- drawing -------------------------------------------------------------------------------

for (const plot of PLOTS) {
  const figure = $("charts").appendChild(document.createElement("figure"));
  figure.append(element("figcaption", "", plot.title));
  plot.box = figure.appendChild(element("div", "plot"));
  plot.svg = plot.box.appendChild(document.createElementNS(SVG, "svg"));
  plot.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  plot.svg.setAttribute("preserveAspectRatio", "none");
  plot.svg.setAttribute("role", "img");
  plot.topLabel = plot.box.appendChild(element("span", "top"));
  plot.legend = figure.appendChild(element("div", "legend"));
}

function draw(plot, samples) {
  const now = samples.at(-1);
  const names = now.values.get(plot).map(([name]) => name);
  const lines = names.map((name) =>
    samples.map((sample) => {
      const found = sample.values.get(plot).find(([other]) => other === name);
      return { time: sample.time, value: found ? found[1] : NaN };
    }),
  );
  const limits = names.map((name) => plot.limit?.(now, name) ?? NaN);
  const seen = lines.flat().map((point) => point.value).filter(Number.isFinite);
  const highest = Math.max(0, ...seen);
  const top = plot.top ?? ceiling(highest);

  const paths = [];
  const texts = names.map((name, i) => {
    const style = `s${i % 6}` + (i >= 6 ? " dashed" : "");
    paths.push(path(style, line(lines[i], now.time, top)));
    if (limits[i] <= top) paths.push(path(`${style} limit`, level(limits[i], top)));
    const value = lines[i].at(-1).value;
    const limit = Number.isNaN(limits[i]) ? "" : ` (${plot.limited} ${plot.format(limits[i])})`;
    return [style, `${name} ${Number.isNaN(value) ? "–" : plot.format(value)}${limit}`];
  });
  plot.svg.replaceChildren(...paths);
  plot.svg.setAttribute("aria-label", `${plot.title}, now: ${texts.map(([, text]) => text).join(", ")}`);
  plot.topLabel.textContent = names.length && seen.length ? plot.format(top) : "";
  plot.legend.replaceChildren(...texts.map(([style, text]) => entry(style, text)));
  plot.box.hidden = names.length === 0;
  if (!names.length) plot.legend.textContent = plot.empty ?? "";
}

function entry(style, text) {
  const made = element("span", "", text);
  made.prepend(element("i", style));
  return made;
}

function path(className, d) {
  const made = document.createElementNS(SVG, "path");
  made.setAttribute("class", className);
  made.setAttribute("d", d);
  return made;
}

const height = (value, top) => (HEIGHT * (1 - Math.min(1, value / top))).toFixed(1);
const level = (value, top) => `M0 ${height(value, top)}H${WIDTH}`;

// A path through the points; where there is no value, it breaks.
function line(points, now, top) {
  let d = "", drawing = false;
  for (const { time, value } of points) {
    const at = `${(WIDTH * (1 - (now - time) / WINDOW_S)).toFixed(1)} ${height(value, top)}`;
    if (Number.isNaN(value)) drawing = false;
    // A line to where it begins shows a point that stands alone.
    else [d, drawing] = [d + (drawing ? `L${at}` : `M${at}L${at}`), true];
  }
  return d;
}

// The next of 1, 2, 5, 10, 20, 50 …
function ceiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => value <= step * power * (1 + 1e-9)) * power;
}

// --- polling -------------------------------------------------------------------------------

let samples = []; // {time, metrics, values: plot → [[series, value]]}
let timer = null;
let round = 0; // of polling: each key has its own

// Begin to poll, or begin again with another key.
export function watch() {
  clearTimeout(timer);
  poll(++round);
}

async function poll(mine) {
  let going = true;
  if (!document.hidden) {
    try {
      going = await sample(mine);
    } catch {
      if (mine === round) $("live-note").textContent = "The server does not answer; trying again.";
    }
  }
  if (going && mine === round) timer = setTimeout(poll, POLL_MS, mine);
}

// Take one sample and draw it; false if the server will not give any. What comes after the key has
// changed is another key's, and is not drawn.
async function sample(mine) {
  const response = await ask(ENDPOINTS.metrics);
  const text = await (response.ok ? response.text() : complaint(response));
  if (mine !== round) return false;
  $("charts").hidden = !response.ok;
  if (!response.ok) {
    samples = [];
    $("live-note").textContent = `No plots: ${text}`;
    return response.status >= 500;
  }
  const now = { time: performance.now() / 1000, metrics: parse(text) };
  // Counters go back when a server starts again; what was before says nothing of it.
  if (increase(now, samples.at(-1), "generated_tokens_total") < 0) samples = [];
  now.values = new Map(PLOTS.map((plot) => [plot, plot.read(now, samples)]));
  samples = [...samples.filter((old) => now.time - old.time <= WINDOW_S), now];
  for (const plot of PLOTS) draw(plot, samples);
  $("live-note").textContent = "Since this page was opened, five minutes at most.";
  return true;
}
