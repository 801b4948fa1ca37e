"use strict";
// The page of a comparison. All data stands in the page itself; nothing is fetched.
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#1a5fb4", "#c64600", "#26a269", "#a51d8c", "#986a44", "#0f8b8d", "#e01b24",
  "#613583", "#7a8a00", "#ff7800", "#000000", "#3d6b8e", "#b5577a", "#5e5c64", "#2e7d32", "#8d6e00", "#455a9f"];
const state = { sort: null, down: false, group: "", marked: null, shown: new Set(), timer: 0 };

const byId = (id) => document.getElementById(id);
function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
function draw(tag, options = {}, text = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  if (text !== null) element.textContent = text;
  return element;
}
const number = (x) => (x === "inf" ? Infinity : x);
const column = (name) => data.columns.find((one) => one.name === name);
// The dense model and its floors are of every group.
const cases = () => data.cases.filter((one) => !state.group || one.groups.includes(state.group)
  || (one.kind !== "case" && !one.groups.length));
const methods = () => cases().filter((one) => one.kind === "case");
const mean = (one, name) => (one.cells[name] ? number(one.cells[name].mean) : null);
function colourOf(one) {
  const types = [...new Set(data.cases.filter((c) => c.kind === "case").map((c) => c.type))];
  return one.kind === "case" ? COLOURS[types.indexOf(one.type) % COLOURS.length] : "var(--ink)";
}
function inDigits(value, digits) {
  if (value === null || value === undefined) return "–";
  return Number.isFinite(value) ? value.toFixed(digits) : "equal";
}

// The table.
function bestOf(name) {
  const values = methods().map((one) => mean(one, name)).filter((x) => x !== null);
  const better = column(name).better;
  if (values.length < 2 || better === "near") return null;
  return better === "high" ? Math.max(...values) : Math.min(...values);
}
function sortBy(name) {
  if (state.sort !== name) {
    state.sort = name;
    state.down = name !== "name" && column(name).better === "high";
  } else state.down = !state.down;
  table();
}
function sorted() {
  const found = [...cases()];
  if (state.sort === null) return found;
  const value = (one) => (state.sort === "name" ? one.name : mean(one, state.sort));
  return found.sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === null || y === null) return (x === null) - (y === null);  // always last
    const order = x < y ? -1 : x > y ? 1 : 0;
    return state.down ? -order : order;
  });
}
function table() {
  const way = (name) => (state.sort === name ? (state.down ? "descending" : "ascending") : "none");
  const head = make("tr", {},
    make("th", { "aria-sort": way("name") },
      make("button", { text: "case", onclick: () => sortBy("name") })),
    make("th", { text: "samples" }),
    ...data.columns.map((one) => make("th", { "aria-sort": way(one.name), "data-column": one.name },
      make("button", { text: one.title, onclick: () => sortBy(one.name) }))));
  const best = Object.fromEntries(data.columns.map((one) => [one.name, bestOf(one.name)]));
  const rows = sorted().map((one) => {
    const box = make("input", {
      type: "checkbox", checked: state.shown.has(one.name) ? "" : null,
      onchange: (event) => {
        if (event.target.checked) state.shown.add(one.name); else state.shown.delete(one.name);
        media();
      },
    });
    const row = make("tr", {
      class: `${one.kind} ${state.marked === one.name ? "marked" : ""}`, "data-case": one.name,
    }, make("td", {}, make("label", {}, box, ` ${one.name}`)), make("td", { text: one.samples }));
    for (const { name, digits } of data.columns) {
      const cell = one.cells[name] || { mean: null };
      const value = number(cell.mean);
      const isBest = one.kind === "case" && value !== null && value === best[name];
      const td = make("td", { text: inDigits(value, digits), class: isBest ? "best" : null,
        title: cell.reason || null });
      if (cell.deviation !== null && cell.deviation !== undefined) {
        td.append(make("span", { class: "spread", text: ` ± ${cell.deviation.toFixed(digits)}` }));
      }
      if (cell.infinite && Number.isFinite(value)) {
        td.append(make("span", { class: "spread", text: ` (${cell.infinite} equal)` }));
      }
      row.append(td);
    }
    return row;
  });
  byId("table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

// The plots.
function ticks(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-6; x += step) found.push(x);
  return [found, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
}
function front(points, isHigh) {
  // Points that no other beats in both: less cost, and better quality.
  const better = (a, b) => (isHigh ? a > b : a < b);
  const order = [...points].sort((a, b) => a.x - b.x || (better(a.y, b.y) ? -1 : 1));
  const kept = [];
  for (const point of order) {
    if (!kept.length || better(point.y, kept[kept.length - 1].y)) kept.push(point);
  }
  return kept;
}
function plot(name, cost) {
  const [width, height, left, right, bottom] = [560, 360, 58, 24, 46];
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${column(name).title} over ${column(cost).title}`, "data-cost": cost });
  const points = methods().map((one) => ({ one, x: mean(one, cost), y: mean(one, name) }))
    .filter((p) => Number.isFinite(p.x) && p.x !== null && Number.isFinite(p.y) && p.y !== null);
  const floors = cases().filter((one) => one.kind === "floor")
    .map((one) => ({ one, y: mean(one, name) })).filter((p) => p.y !== null);
  if (!points.length) {
    svg.append(draw("text", { x: width / 2, y: height / 2, "text-anchor": "middle" },
      "no case has both numbers"));
    return svg;
  }
  const dense = data.cases.find((one) => one.kind === "dense");
  const denseCost = dense ? mean(dense, cost) : null;
  const xs = points.map((p) => p.x).concat(denseCost === null ? [] : [denseCost]);
  const ys = points.map((p) => p.y);
  // A floor far beyond the methods would flatten them all: then it is told at the edge.
  const spread = Math.max(...ys) - Math.min(...ys) || Math.abs(ys[0]) || 1;
  const near = floors.filter((p) => Number.isFinite(p.y) && p.y < Math.max(...ys) + spread
    && p.y > Math.min(...ys) - spread);
  const beyond = floors.filter((p) => !near.includes(p));
  const top = 16 + 14 * beyond.length;
  const all = ys.concat(near.map((p) => p.y));
  let [low, high] = [Math.min(...all), Math.max(...all)];
  const margin = (high - low || Math.abs(high) || 1) * 0.08;
  [low, high] = [low - margin, high + margin];
  const most = Math.max(...xs) * 1.06 || 1;
  const px = (x) => left + (x / most) * (width - left - right);
  const py = (y) => height - bottom - ((y - low) / (high - low)) * (height - top - bottom);
  const [yTicks, yDigits] = ticks(low, high);
  for (const y of yTicks) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: py(y), y2: py(y) }),
      draw("text", { class: "tick", x: left - 6, y: py(y) + 4, "text-anchor": "end" }, y.toFixed(yDigits)));
  }
  const [xTicks, xDigits] = ticks(0, most);
  for (const x of xTicks) {
    svg.append(draw("text", { class: "tick", x: px(x), y: height - bottom + 16, "text-anchor": "middle" },
      x.toFixed(xDigits)));
  }
  svg.append(draw("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" },
    column(cost).title),
  draw("text", { transform: `translate(14 ${height / 2}) rotate(-90)`, "text-anchor": "middle" },
    column(name).title));
  const told = (p) => `${p.one.name}: ${inDigits(p.y, column(name).digits)}`;
  for (const p of near) {
    svg.append(draw("line", { class: "floor", x1: left, x2: width - right, y1: py(p.y), y2: py(p.y) }),
      draw("text", { class: "tick", x: left + 6, y: py(p.y) - 4 }, told(p)));
  }
  beyond.forEach((p, index) => svg.append(draw("text", { class: "tick", x: left, y: 16 + 14 * index },
    `${told(p)} (beyond the plot)`)));
  if (denseCost !== null) {
    svg.append(draw("line", { class: "floor", x1: px(denseCost), x2: px(denseCost), y1: top, y2: height - bottom }),
      draw("text", { class: "tick", x: px(denseCost) - 4, y: height - bottom - 6, "text-anchor": "end" }, "dense"));
  }
  const isHigh = column(name).better !== "low";
  const best = column(name).better === "near" ? [] : front(points, isHigh);
  if (best.length > 1) {
    svg.append(draw("polyline", { class: "front", points: best.map((p) => `${px(p.x)},${py(p.y)}`).join(" ") }));
  }
  const boxes = [];
  for (const p of points) {
    const circle = draw("circle", { cx: px(p.x), cy: py(p.y), r: 5.5, fill: colourOf(p.one),
      class: state.marked === p.one.name ? "marked" : "", "data-case": p.one.name,
      onclick: () => mark(p.one.name) });
    circle.append(draw("title", {}, `${p.one.name}\n${column(name).title}: `
      + `${inDigits(p.y, column(name).digits)}\n${column(cost).title}: ${inDigits(p.x, column(cost).digits)}`));
    svg.append(circle);
  }
  // Names where there is room: of the front first.
  for (const p of [...best, ...points.filter((one) => !best.includes(one))]) {
    const words = p.one.name.length > 28 ? `${p.one.name.slice(0, 27)}…` : p.one.name;
    const size = 6.2 * words.length;
    for (const [dx, dy, anchor] of [[8, 4, "start"], [-8, 4, "end"], [0, -9, "middle"], [0, 17, "middle"]]) {
      const start = px(p.x) + dx - (anchor === "end" ? size : anchor === "middle" ? size / 2 : 0);
      const box = [start, py(p.y) + dy - 11, start + size, py(p.y) + dy + 3];
      const inside = box[0] > left && box[2] < width - 2 && box[1] > top - 4 && box[3] < height - bottom;
      const free = boxes.every((b) => b[2] < box[0] || box[2] < b[0] || b[3] < box[1] || box[3] < b[1])
        && points.every((q) => q === p || px(q.x) < box[0] - 6 || px(q.x) > box[2] + 6
          || py(q.y) < box[1] - 6 || py(q.y) > box[3] + 6);
      if (inside && free) {
        boxes.push(box);
        svg.append(draw("text", { x: px(p.x) + dx, y: py(p.y) + dy, "text-anchor": anchor,
          "pointer-events": "none" }, words));
        break;
      }
    }
  }
  return svg;
}
function plots() {
  const name = byId("quality").value;
  const costs = data.columns.filter((one) => ["density", "seconds"].includes(one.name));
  byId("plots").replaceChildren(...costs.map((cost) => plot(name, cost.name)));
  const types = new Map(methods().map((one) => [one.type, one]));
  byId("legend").replaceChildren(...[...types].map(([type, one]) => make("span",
    { text: type, style: `--dot: ${colourOf(one)}` })));
}
function mark(name) {
  state.marked = state.marked === name ? null : name;
  table();
  plots();
  const row = [...document.querySelectorAll("#table tbody tr")].find((tr) => tr.dataset.case === name);
  if (row && state.marked) row.scrollIntoView({ block: "nearest" });
}

// Videos, all at the same frame.
const videos = () => [...document.querySelectorAll("#media video")];
const playing = () => byId("play").dataset.playing === "yes";
function setPlaying(on) {
  byId("play").dataset.playing = on ? "yes" : "no";
  byId("play").textContent = on ? "Pause" : "Play";
}
function showTime(seconds) {
  const frame = Math.min(data.frames - 1, Math.floor(seconds * data.fps + 1e-3));
  byId("scrub").value = frame;
  byId("frame").textContent = `frame ${frame + 1} of ${data.frames}`;
}
function toFrame(frame) {
  stop();
  // The middle of the frame: its edges may round to either side.
  for (const video of videos()) video.currentTime = (frame + 0.5) / data.fps;
  showTime((frame + 0.5) / data.fps);
}
function stop() {
  setPlaying(false);
  cancelAnimationFrame(state.timer);
  for (const video of videos()) video.pause();
}
function follow() {
  const all = videos();
  if (!playing() || !all.length) return;
  const [first, ...others] = all;
  const end = data.frames / data.fps;
  if (first.ended || first.currentTime >= end - 0.25 / data.fps) {
    for (const video of all) { video.currentTime = 0; video.play(); }
  } else {
    for (const video of others) {
      const behind = Math.abs(video.currentTime - first.currentTime);
      if (behind > 0.6 / data.fps && !video.seeking) video.currentTime = first.currentTime;
      if (video.paused && !video.ended) video.play();
    }
  }
  showTime(first.currentTime);
  state.timer = requestAnimationFrame(follow);
}
async function play() {
  const all = videos();
  if (playing()) {
    const time = all.length ? all[0].currentTime : 0;
    stop();
    toFrame(Math.min(data.frames - 1, Math.floor(time * data.fps)));
    return;
  }
  if (!all.length) return;
  setPlaying(true);
  const from = all[0].currentTime >= (data.frames - 1) / data.fps ? 0 : all[0].currentTime;
  for (const video of all) video.currentTime = from;
  await Promise.all(all.map((video) => video.play().catch(() => null)));
  follow();
}
function media() {
  stop();
  const sample = byId("sample").value;
  const figures = [];
  for (const one of cases()) {
    const found = (data.media[sample] || {})[one.name];
    if (!found || !state.shown.has(one.name)) continue;
    const shown = data.picture ? make("img", { src: found.uri, alt: one.name })
      : make("video", { src: found.uri, preload: "auto", playsinline: "", "aria-label": one.name });
    if (!data.picture) { shown.muted = true; shown.playbackRate = Number(byId("rate").value); }
    figures.push(make("figure", { class: data.large ? "large" : null, "data-case": one.name }, shown,
      make("figcaption", {}, make("strong", { text: one.name }), make("br"),
        make("span", { class: "soft", text: found.words }))));
  }
  byId("media").replaceChildren(...figures);
  if (!data.picture) toFrame(Number(byId("scrub").value));
}

// The paired tests.
function tests() {
  const name = byId("tested").value;
  const p = (x) => (x === null ? "–" : x < 0.001 ? x.toExponential(1) : x.toFixed(3));
  const names = new Set(methods().map((one) => one.name));
  const rows = (found) => found.filter((one) => one.measure === name && names.has(one.first))
    .map((one) => make("tr", {},
      make("td", { text: one.first }), make("td", { text: one.second }),
      make("td", { text: `${one.higher} / ${one.lower} of ${one.pairs}` }),
      make("td", { text: inDigits(one.mean, column(name).digits) }),
      make("td", { text: p(one.sign_p) }), make("td", { text: p(one.sign_holm) }),
      make("td", { text: p(one.t_p) }), make("td", { text: p(one.t_holm) })));
  const head = () => make("thead", {}, make("tr", {},
    ...["case", "against", "higher / lower in", "mean difference", "sign test p", "corrected",
      "paired t p", "corrected"].map((text) => make("th", { text }))));
  byId("floors").replaceChildren(head(), make("tbody", {}, ...rows(data.floors)));
  byId("between").replaceChildren(head(), make("tbody", {}, ...rows(data.between)));
}

function showFirst() {
  // All videos of the group, if they fit on a screen.
  state.shown = new Set(cases().slice(0, 12).map((one) => one.name));
}
function begin() {
  const groups = [...new Set(data.cases.flatMap((one) => one.groups))];
  if (groups.length > 1) {
    byId("groups").replaceChildren(...["", ...groups].map((group) => make("button", {
      text: group || "all", "aria-pressed": String(group === state.group), "data-group": group,
      onclick: (event) => {
        state.group = group;
        showFirst();
        for (const button of event.target.parentElement.children) {
          button.setAttribute("aria-pressed", String(button === event.target));
        }
        refresh();
      },
    })));
  }
  const measured = data.columns.filter((one) => one.is_measure);
  const options = () => measured.map((one) => make("option", { value: one.name, text: one.title }));
  byId("quality").replaceChildren(...options());
  const tested = new Set([...data.floors, ...data.between].map((one) => one.measure));
  byId("tested").replaceChildren(...options().filter((one) => tested.has(one.value)));
  byId("sample").replaceChildren(...data.samples.filter((one) => data.media[one.number])
    .map((one) => make("option", { value: one.number, text: `${one.prompt} (seed ${one.seed})` })));
  byId("scrub").max = data.frames - 1;
  showFirst();
  byId("quality").addEventListener("change", plots);
  byId("tested").addEventListener("change", tests);
  byId("sample").addEventListener("change", media);
  byId("play").addEventListener("click", play);
  byId("scrub").addEventListener("input", (event) => toFrame(Number(event.target.value)));
  byId("rate").addEventListener("change", media);
  for (const [id, step] of [["back", -1], ["forth", 1]]) {
    byId(id).addEventListener("click", () => toFrame(
      Math.min(data.frames - 1, Math.max(0, Number(byId("scrub").value) + step))));
  }
  byId("videobar").hidden = data.picture;
  refresh();
}
function refresh() {
  table();
  plots();
  tests();
  media();
  const names = new Map();
  for (const one of cases().filter((found) => found.mask !== null)) {
    names.set(one.mask, [...(names.get(one.mask) || []), one.name]);
  }
  const images = [...names].map(([mask, of]) => make("figure", {},
    make("img", { src: data.masks[mask], alt: `blocks of ${of.join(" and of ")}` }),
    make("figcaption", { text: of.length > 2 ? `${of[0]}, and ${of.length - 1} more` : of.join(", "),
      title: of.join("\n") })));
  byId("masks").replaceChildren(...images);
}
begin();
