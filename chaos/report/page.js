"use strict";
const { result, operations } = JSON.parse(document.getElementById("data").textContent);
const [NUMBER, CLIENT, KIND, KEY, OWNER, INVOKED, RETURNED, OUTCOME, VALUE, EXPECTED, RESULT, CODE] =
  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
const $ = (id) => document.getElementById(id);
const element = (name, text, attributes = {}) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const seconds = (value) => (value === null || value === undefined ? "–" : `${value.toFixed(3)} s`);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// -- words and tables

$("title").textContent = `${result.scenario} on ${result.hosts}: seed ${result.seed}, ` +
  `${result.nodes.length} nodes, ${result.clients} clients`;
$("verdict").textContent = (result.passed ? "Every claim holds." : "Not every claim holds.") +
  (result.interrupted ? " The run was ended early." : "") + ` Started ${result.started_at}.`;
$("verdict").className = result.passed ? "holds" : "violated";
$("command").textContent = result.command;

function table(id, heads, rows) {
  const head = element("tr");
  for (const name of heads) head.append(element("th", name));
  $(id).append(head);
  for (const row of rows) {
    const line = element("tr");
    for (const cell of row) {
      const data = element("td");
      if (cell instanceof Node) data.append(cell); else data.textContent = cell;
      if (typeof cell === "number") data.className = "number";
      line.append(data);
    }
    $(id).append(line);
  }
}

function claim(finding) {
  const cell = element("div", finding.claim);
  for (const detail of finding.details) cell.append(element("pre", detail, { class: "violated" }));
  return cell;
}

table("findings", ["checker", "verdict", "of", "claim"], result.findings.map((f) => [
  f.checker, element("span", f.verdict, { class: f.verdict.split(" ")[0] }), f.looked_at, claim(f)]));

const spread = (s) => (s.count ? `p50 ${seconds(s.p50)}, p99 ${seconds(s.p99)}, max ${seconds(s.max)} (${s.count})` : "–");
const counts = (object) => Object.entries(object).sort((a, b) => b[1] - a[1]).map(([k, n]) => `${k} ${n}`).join(", ") || "–";
const figures = result.figures;
table("figures", ["what", "value"], [
  ["operations", `${figures.operations}: ${figures.ok} ok, ${figures.failed} refused, ${figures.unknown} unknown`],
  ["by kind", counts(figures.by_kind)],
  ["errors", counts(figures.error_codes)],
  ["faults", String(figures.faults)],
  ["latency of what succeeded", spread(figures.latency_s)],
  ["leader lost to next acknowledged write", spread(figures.lost_leader_to_next_write_s)],
  ["fault undone to every node ready", spread(figures.healed_to_ready_s)],
  ["everything healed to every node ready", seconds(result.converged_s)],
  ["longest time without any acknowledged write", seconds(figures.longest_without_a_write_s)],
]);
table("faults", ["at", "undone", "ready after", "nemesis", "what", "led then"], result.faults.map((f) => [
  seconds(f.at_s), seconds(f.undone_s), seconds(f.ready_s), f.nemesis,
  f.failed ? `${f.what} FAILED: ${f.failed}` : f.what, f.led.join(" ")]));
if (result.refusals.length) {
  table("refusals", ["at", "node", "shard", "asked", "answered", "after"], result.refusals.map((r) => [
    seconds(r.at_s), r.node, r.shard, r.asked, `${r.status} ${r.code}`, seconds(r.took_s)]));
} else $("refusals-section").remove();

// -- the timeline

const LANE = 16, GAP = 10, LEFT = 110, CURVE = 80, AXIS = 22;
const end = Math.max(result.ended_s, 1);
const shards = [...new Set(result.leaders.map((change) => change[1]))].sort();
const clients = [...Array(result.clients).keys()];
const hues = result.nodes.map((_, i) => `hsl(${(i * 360) / result.nodes.length + 200}, 55%, 55%)`);
const hue = (node) => hues[result.nodes.indexOf(node)] || "#888";
const canvas = $("timeline"), tip = $("tip");
let from = 0, to = end, boxes = [];

for (const [name, style] of [["ok", "var(--ok)"], ["refused", "var(--failed)"], ["unknown", "var(--unknown)"],
  ["fault", "var(--bad)"], ...result.nodes.map((n) => [`led by ${n}`, hue(n)])]) {
  const item = element("li", name);
  const mark = element("i");
  mark.style.background = style;
  item.prepend(mark);
  $("legend").append(item);
}

function describe(op) {
  const took = op[RETURNED] === null ? "no answer" : `${((op[RETURNED] - op[INVOKED]) * 1000).toFixed(1)} ms`;
  const lines = [`${op[KIND]} ${op[KEY]} (${op[OWNER]}), client ${op[CLIENT]}`,
    `${op[INVOKED].toFixed(3)} s, ${took}: ${op[OUTCOME]}${op[CODE] ? ` (${op[CODE]})` : ""}`];
  if (op[EXPECTED] !== null) lines.push(`expected ${op[EXPECTED]}`);
  if (op[VALUE] !== null) lines.push(`value ${op[VALUE]}`);
  if (op[RESULT] !== null) lines.push(`result ${JSON.stringify(op[RESULT])}`);
  return lines.join("\n");
}

function draw() {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  const faultLanes = Math.max(1, result.faults.length ? 1 : 0);
  const height = AXIS + (faultLanes + shards.length + clients.length) * LANE + 4 * GAP + CURVE;
  canvas.width = width * ratio; canvas.height = height * ratio; canvas.style.height = `${height}px`;
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  g.font = "12px system-ui, sans-serif"; g.textBaseline = "middle";
  const scale = (width - LEFT) / (to - from);
  const x = (t) => LEFT + (t - from) * scale;
  boxes = [];
  const box = (left, right, top, tall, fill, text) => {
    const a = Math.max(LEFT, left), b = Math.min(width, Math.max(right, left + 1));
    if (b < LEFT || a > width) return;
    g.fillStyle = fill; g.fillRect(a, top, Math.max(1, b - a), tall);
    boxes.push([a, b, top, top + tall, text]);
  };
  const label = (text, y) => { g.fillStyle = colour("soft"); g.textAlign = "left"; g.fillText(text, 0, y + LANE / 2); };
  // the axis
  const step = [0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 600].find((s) => s * scale > 60) || 1800;
  g.strokeStyle = colour("line"); g.textAlign = "center"; g.fillStyle = colour("soft");
  for (let t = Math.ceil(from / step) * step; t <= to; t += step) {
    g.beginPath(); g.moveTo(x(t), AXIS - 4); g.lineTo(x(t), height); g.stroke();
    g.fillText(`${+t.toFixed(2)} s`, Math.min(width - 20, x(t)), 8);
  }
  let y = AXIS;
  label("faults", y);
  for (const fault of result.faults) {
    const until = fault.undone_s ?? end;
    g.globalAlpha = 0.1; g.fillStyle = colour("bad");
    const a = Math.max(LEFT, x(fault.at_s)), b = Math.min(width, x(until));
    if (b > a) g.fillRect(a, AXIS, b - a, height - AXIS);
    g.globalAlpha = 1;
    box(x(fault.at_s), x(until), y + 2, LANE - 4, colour("bad"),
      `${fault.nemesis}: ${fault.what || fault.failed}\n${seconds(fault.at_s)} to ${seconds(until)}`);
  }
  y += LANE + GAP;
  for (const shard of shards) {
    label(`leader of ${shard}`, y);
    const changes = result.leaders.filter((change) => change[1] === shard);
    changes.forEach(([at, , term, leader], i) => {
      const until = i + 1 < changes.length ? changes[i + 1][0] : end;
      box(x(at), x(until), y + 2, LANE - 4, hue(leader), `${shard} is led by ${leader}, term ${term}\nfrom ${seconds(at)}`);
    });
    y += LANE;
  }
  y += GAP;
  const shades = { ok: colour("ok"), failed: colour("failed"), unknown: colour("unknown") };
  for (const number of clients) label(`client ${number}`, y + number * LANE);
  for (const op of operations) {
    const until = op[RETURNED] ?? Math.min(end, op[INVOKED] + 5);
    if (until < from || op[INVOKED] > to) continue;
    box(x(op[INVOKED]), x(until), y + op[CLIENT] * LANE + 2, LANE - 4, shades[op[OUTCOME]], describe(op));
  }
  y += clients.length * LANE + GAP;
  drawCurve(g, x, y, width);
}

function drawCurve(g, x, top, width) {
  const columns = Math.max(1, Math.floor((width - LEFT) / 4));
  const worst = new Array(columns).fill(0);
  let highest = 0.001;
  for (const op of operations) {
    if (op[RETURNED] === null) continue;
    const at = Math.floor(((op[RETURNED] - from) / (to - from)) * columns);
    if (at < 0 || at >= columns) continue;
    worst[at] = Math.max(worst[at], op[RETURNED] - op[INVOKED]);
    highest = Math.max(highest, worst[at]);
  }
  g.fillStyle = colour("soft"); g.textAlign = "left";
  g.fillText("slowest answer", 0, top + 8);
  g.fillText(`${highest.toFixed(2)} s at most`, 0, top + 26);
  worst.forEach((value, i) => {
    const tall = (value / highest) * CURVE;
    g.fillRect(LEFT + i * 4, top + CURVE - tall, 3, tall);
  });
}

function view(first, last) {
  const least = 0.05;
  const span = Math.min(end, Math.max(least, last - first));
  from = Math.min(Math.max(0, first), end - span); to = from + span;
  requestAnimationFrame(draw);
}
const timeAt = (event) => {
  const place = canvas.getBoundingClientRect();
  return from + ((event.clientX - place.left - LEFT) / (place.width - LEFT)) * (to - from);
};
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const at = timeAt(event), factor = Math.exp(event.deltaY / 400);
  view(at - (at - from) * factor, at + (to - at) * factor);
}, { passive: false });
let grabbed = null;
canvas.addEventListener("pointerdown", (event) => { grabbed = [event.clientX, from, to]; canvas.setPointerCapture(event.pointerId); });
canvas.addEventListener("pointerup", () => { grabbed = null; });
canvas.addEventListener("dblclick", () => view(0, end));
canvas.addEventListener("pointermove", (event) => {
  if (grabbed) {
    const moved = ((event.clientX - grabbed[0]) / (canvas.clientWidth - LEFT)) * (grabbed[2] - grabbed[1]);
    view(grabbed[1] - moved, grabbed[2] - moved);
    return;
  }
  const place = canvas.getBoundingClientRect();
  const px = event.clientX - place.left, py = event.clientY - place.top;
  const hit = boxes.findLast(([a, b, c, d]) => px >= a - 1 && px <= b + 1 && py >= c && py <= d);
  tip.hidden = !hit;
  if (hit) {
    tip.textContent = hit[4];
    tip.style.left = `${Math.min(event.clientX + 12, innerWidth - 300)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  }
});
canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
canvas.addEventListener("keydown", (event) => {
  const span = to - from;
  const moves = { ArrowLeft: [-0.2, -0.2], ArrowRight: [0.2, 0.2], "+": [0.2, -0.2], "-": [-0.3, 0.3] };
  if (event.key in moves) { const [a, b] = moves[event.key]; view(from + a * span, to + b * span); }
});
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
