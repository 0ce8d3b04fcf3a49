// Draws the timetables of a page. Rows are ranks, time goes to the right.
// The data are those of `make_page` in page.py: boxes by their columns, a list for each timetable.
"use strict";

const LEFT = 66, RIGHT = 58, RULER = 24, NAME = 26, GAP = 3, LEGEND = 90; // pixels
const LEAST_ROW = 17, MOST_ROW = 38;
const MOST_ZOOM = 20000;

const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("timetable");
const details = document.getElementById("details");
const pen = canvas.getContext("2d");

// --- data -> rows ----------------------------------------------------------------------------

const rows = []; // {table, rank, idle, boxes, top}, from above to below
for (const table of data.timetables) {
  const boxes = table.boxes.map((cells) =>
    Object.fromEntries(data.columns.map((column, place) => [column, cells[place]])));
  const ofRanks = table.idle_shares.map((idle, rank) => ({ table, rank, idle, boxes: [] }));
  for (const box of boxes) {
    box.row = ofRanks[box.rank];
    box.row.boxes.push(box);
    box.shade = (box.direction || 0) % 2;
    box.name = box.kind === "send" ? "send"
      : (box.shade ? box.kind.toLowerCase() : box.kind) + box.microbatch;
  }
  for (const row of ofRanks) {
    const actions = {}; // by their ticks; a measured action may have several boxes
    let free = 0; // when the box before ends; a transfer does not count
    for (const box of row.boxes) {
      box.free = free;
      if (box.kind === "send") {
        box.whole = { boxes: [box], maker: null, readers: [] };
      } else {
        free = box.end;
        box.whole = actions[box.tick] ??= { boxes: [], maker: null, readers: [] };
        box.whole.boxes.push(box);
      }
    }
  }
  for (const box of boxes) {
    if (box.source === null) continue;
    box.whole.maker = boxes[box.source];
    box.whole.value = box.value;
    boxes[box.source].whole.readers.push(box);
  }
  table.end = Math.max(...boxes.map((box) => box.end));
  table.ticks = Math.max(...boxes.map((box) => box.tick)) + 1;
  rows.push(...ofRanks);
}
const hasNames = data.timetables.length > 1;
const hasSends = rows.some((row) => row.boxes.some((box) => box.kind === "send"));

// --- state -----------------------------------------------------------------------------------

let byTicks = false;
let from = 0, to = 1; // the part of the time that is drawn
let width = 0, height = 0, rowHeight = MOST_ROW;
let pointed = null; // {box, idle, row, at}: below the pointer
let chosen = null; // the same, by a click or by keys

const left = (box) => (byTicks ? box.tick : box.start);
const right = (box) => (byTicks ? box.tick + 1 : box.end);
const endOf = (table) => (byTicks ? table.ticks : table.end);
const findEnd = () => Math.max(...data.timetables.map(endOf));
let end = findEnd();

const toX = (time) => LEFT + ((time - from) / (to - from)) * (width - LEFT - RIGHT);
const spanOf = (pixels) => (pixels / (width - LEFT - RIGHT)) * (to - from);
const toTime = (x) => from + spanOf(x - LEFT);

function look(start, span) {
  span = Math.min(end, Math.max(end / MOST_ZOOM, span));
  from = Math.min(Math.max(0, start), end - span);
  to = from + span;
  draw();
}

function zoom(factor, time = (from + to) / 2) {
  const span = Math.min(end, Math.max(end / MOST_ZOOM, (to - from) / factor));
  look(time - ((time - from) / (to - from)) * span, span);
}

// The first box of a row that ends after a time; as many as the row has if there is none.
function search(row, time) {
  let low = 0, high = row.boxes.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (right(row.boxes[middle]) > time) high = middle;
    else low = middle + 1;
  }
  return low;
}

// What is at a point of the canvas: a box, or an idle time of a rank.
function find(x, y) {
  if (x < LEFT || x > width - RIGHT) return null;
  const row = rows.find((row) => y >= row.top && y < row.top + rowHeight);
  if (!row) return null;
  const time = toTime(x), place = search(row, time);
  const box = row.boxes[place] || null;
  if (box && left(box) <= time) return { box, row, idle: false };
  return { box, row, idle: true };
}

// --- the look --------------------------------------------------------------------------------

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name);
const face = (kind, shade) => (kind === "send" ? data.send : data.faces[kind][shade]);
const patterns = {}; // of I and W, for readers who do not tell the colours apart

function pattern(kind, shade) {
  const key = kind + shade;
  if (!(key in patterns)) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 16; // twice the size in which it is drawn
    const on = tile.getContext("2d");
    on.strokeStyle = on.fillStyle = data.inks[shade];
    on.globalAlpha = 0.3;
    if (kind === "I") {
      on.lineWidth = 2;
      for (const shift of [-16, 0, 16]) {
        on.moveTo(shift, 16);
        on.lineTo(shift + 16, 0);
      }
      on.stroke();
    } else if (kind === "W") {
      for (const [x, y] of [[4, 4], [12, 12]]) {
        on.beginPath();
        on.arc(x, y, 1.9, 0, 2 * Math.PI);
        on.fill();
      }
    }
    patterns[key] = pen.createPattern(tile, "repeat");
    patterns[key].setTransform(new DOMMatrix().scale(0.5));
  }
  return patterns[key];
}

function paint(on, kind, shade, x, y, wide, high) {
  on.fillStyle = face(kind, shade);
  on.fillRect(x, y, wide, high);
  if ((kind === "I" || kind === "W") && wide > 3) {
    on.fillStyle = pattern(kind, shade);
    on.fillRect(x, y, wide, high);
  }
}

function layOut() {
  const scale = window.devicePixelRatio || 1;
  width = canvas.clientWidth;
  const names = hasNames ? data.timetables.length * NAME : 0;
  const above = canvas.getBoundingClientRect().top + window.scrollY;
  const room = window.innerHeight - above - RULER - names - LEGEND;
  rowHeight = Math.max(LEAST_ROW, Math.min(MOST_ROW, Math.floor(room / rows.length)));
  let top = RULER;
  for (const row of rows) {
    if (hasNames && row.rank === 0) top += NAME;
    row.top = top;
    top += rowHeight;
  }
  height = top + 2;
  canvas.style.height = height + "px";
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  draw();
}

let isWaiting = false;
function draw() {
  if (isWaiting) return;
  isWaiting = true;
  requestAnimationFrame(() => {
    isWaiting = false;
    drawNow();
  });
}

function drawNow() {
  const scale = window.devicePixelRatio || 1;
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.textBaseline = "middle";
  drawFrame();
  pen.save();
  pen.beginPath();
  pen.rect(LEFT, 0, width - LEFT - RIGHT, height);
  pen.clip();
  const edge = color("edge");
  for (const row of rows) drawRow(row, edge);
  const active = pointed || chosen;
  if (active && !active.idle) drawWay(active.box);
  pen.restore();
}

function drawFrame() {
  const ink = color("ink"), muted = color("muted"), idle = color("idle");
  pen.font = "12px system-ui, sans-serif";
  for (const row of rows) {
    const middle = row.top + rowHeight / 2;
    if (hasNames && row.rank === 0) {
      pen.fillStyle = ink;
      pen.textAlign = "left";
      pen.fillText(row.table.name, 0, row.top - NAME / 2 + 2);
    }
    pen.fillStyle = idle;
    const until = Math.min(width - RIGHT, toX(endOf(row.table)));
    pen.fillRect(LEFT, row.top, Math.max(until - LEFT, 0), rowHeight - GAP);
    pen.fillStyle = ink;
    pen.textAlign = "right";
    pen.fillText("rank " + row.rank, LEFT - 8, middle - GAP / 2);
    pen.fillText((100 * row.idle).toFixed(1) + "%", width - 4, middle - GAP / 2);
  }
  pen.fillStyle = muted;
  pen.fillText("idle", width - 4, RULER / 2 - 2);
  pen.fillText(byTicks ? "tick" : data.unit || "time", LEFT - 14, RULER / 2 - 2);
  pen.textAlign = "center";
  let step = 10 ** Math.floor(Math.log10(((to - from) * 60) / (width - LEFT - RIGHT)));
  step = [1, 2, 5, 10].map((n) => n * step).find((n) => toX(from + n) - LEFT >= 60) || 10 * step;
  if (byTicks) step = Math.max(1, Math.round(step));
  for (let mark = Math.ceil(from / step - 1e-9); mark * step <= to * (1 + 1e-9); mark++) {
    const x = toX(mark * step + (byTicks ? 0.5 : 0));
    if (x < LEFT || x > width - RIGHT) continue;
    pen.fillStyle = muted;
    pen.fillText(show(mark * step), x, RULER / 2 - 2);
    if (!byTicks) pen.fillRect(x - 0.5, RULER - 5, 1, 4);
  }
}

const widths = {}; // of labels, which are measured once
function widthOf(text) {
  widths[text] ??= pen.measureText(text).width;
  return widths[text];
}

function drawRow(row, edge) {
  const high = rowHeight - GAP;
  pen.font = "11px system-ui, sans-serif";
  let drawn = -1; // pixels up to which the row is drawn: of many boxes in a pixel one is enough
  for (let place = search(row, from); place < row.boxes.length; place++) {
    const box = row.boxes[place];
    if (left(box) >= to) break;
    const x = toX(left(box)), until = toX(right(box));
    if (until <= x || until < drawn + 0.5) continue;
    drawn = until;
    const wide = Math.max(until - x, 0.5);
    paint(pen, box.kind, box.shade, x, row.top, wide, high);
    if (wide > 4) {
      pen.strokeStyle = edge;
      pen.lineWidth = 1;
      pen.strokeRect(x + 0.5, row.top + 0.5, wide - 1, high - 1);
    }
    // The number of a box that is partly outside stands in the middle of its visible part.
    const start = Math.max(x, LEFT), stop = Math.min(until, width - RIGHT);
    const label = box.kind === "send" ? null
      : [box.name, String(box.microbatch)].find((text) => stop - start > widthOf(text) + 1);
    if (label) {
      pen.textAlign = "center";
      pen.fillStyle = data.inks[box.shade];
      pen.fillText(label, (start + stop) / 2, row.top + high / 2 + 0.5);
    }
  }
}

// Draws the frame of an action, an arrow from the maker of its value, and arrows to the readers of
// its own value.
function drawWay({ whole }) {
  const mark = color("mark"), high = rowHeight - GAP;
  const first = whole.boxes[0], final = whole.boxes.at(-1);
  pen.strokeStyle = pen.fillStyle = mark;
  const arrow = (source, target) => {
    const x = toX(right(source)), y = source.row.top + high / 2;
    const tipX = toX(left(target)), tipY = target.row.top + high / 2;
    const angle = Math.atan2(tipY - y, tipX - x);
    pen.beginPath();
    pen.moveTo(x, y);
    pen.lineTo(tipX, tipY);
    pen.stroke();
    pen.setLineDash([]);
    pen.beginPath();
    pen.moveTo(tipX, tipY);
    for (const turn of [-0.4, 0.4]) {
      pen.lineTo(tipX - 9 * Math.cos(angle + turn), tipY - 9 * Math.sin(angle + turn));
    }
    pen.fill();
  };
  const outline = (boxes, wide) => {
    pen.lineWidth = wide;
    for (const box of boxes) {
      const x = toX(left(box));
      pen.strokeRect(x, box.row.top - 0.5, Math.max(toX(right(box)) - x, 1), high + 1);
    }
  };
  outline(whole.boxes, 3);
  outline([whole.maker, ...whole.readers].filter(Boolean).flatMap((box) => box.whole.boxes), 1.5);
  pen.lineWidth = 2;
  if (whole.maker) arrow(whole.maker, first);
  for (const reader of whole.readers) {
    pen.setLineDash([5, 4]);
    arrow(final, reader);
  }
}

// --- details ---------------------------------------------------------------------------------

const show = (number) => String(Number(number.toPrecision(6)));
const time = (number) => show(number) + (data.unit ? " " + data.unit : "");

// The lines of the details; those of a list are parts of the line before.
function describe({ box, row, idle }) {
  if (idle) {
    if (!box) return ["idle", `rank ${row.rank} has nothing left to do`];
    const until = byTicks ? `tick ${box.tick}` : time(box.start);
    return [`idle, before ${box.name} at ${until}`, `rank ${row.rank}`, ...waits(box)];
  }
  const isSend = box.kind === "send";
  const { boxes, maker, value, readers } = box.whole;
  const columns = ["rank", "stage", "microbatch", "direction", "tick"];
  const lines = [
    isSend ? box.action : `${box.name}: ${box.action}`,
    columns.filter((column) => box[column] !== null)
      .map((column) => `${column} ${box[column]}`).join(" · "),
    `${time(box.start)} to ${time(box.end)}, takes ${time(box.end - box.start)}`,
  ];
  if (boxes.length > 1) {
    const span = `${time(boxes[0].start)} to ${time(boxes.at(-1).end)}`;
    lines.push(`part ${boxes.indexOf(box) + 1} of ${boxes.length} of this tick's action, ${span}`);
  }
  if (!isSend) lines.push(...waits(box));
  if (maker) {
    const where = `${maker.name} of rank ${maker.rank}`;
    lines.push(`reads the ${value} that ${where} made at ${time(maker.end)}`);
  }
  for (const reader of readers) {
    const size = data.x_bytes === null ? "" : `, ${data.x_bytes},`;
    const where = `${reader.name} of rank ${reader.rank}`;
    const sent = `${reader.whole.value}${size}`;
    lines.push(`sends the ${sent} that ${where} reads at ${time(reader.start)}`);
  }
  return lines;
}

function waits(box) {
  const all = box.start - box.free;
  if (all <= 1e-7 * box.row.table.end) return ["no wait before it"];
  const parts = box.waits.map(([wait, text]) => `${time(wait)} ${text}`);
  const rest = all - box.waits.reduce((sum, [wait]) => sum + wait, 0);
  if (rest > 1e-6 * all) parts.push(`${time(rest)} ${box.row.table.rest}`);
  return [`waits ${time(all)} before it, from ${time(box.free)}:`, parts];
}

function tell(x, y) {
  const active = pointed || chosen;
  details.hidden = !active;
  if (!active) return;
  const [heading, ...lines] = describe(active);
  const element = (tag, text, name = "") => {
    const made = document.createElement(tag);
    made.textContent = text;
    made.className = name;
    return made;
  };
  details.replaceChildren(
    element("b", heading),
    ...lines.flatMap((line) => (Array.isArray(line)
      ? line.map((part) => element("div", part, "part")) : [element("div", line)])));
  const { offsetWidth, offsetHeight } = details;
  const below = y + 18 + offsetHeight < window.innerHeight;
  details.style.left = Math.max(4, Math.min(x + 14, window.innerWidth - offsetWidth - 6)) + "px";
  details.style.top = Math.max(4, below ? y + 18 : y - offsetHeight - 14) + "px";
}

function tellChosen() {
  if (!chosen) return tell(0, 0);
  const around = canvas.getBoundingClientRect();
  const middle = toX((left(chosen.box) + right(chosen.box)) / 2);
  const x = Math.min(Math.max(middle, LEFT), width - RIGHT);
  return tell(around.left + x, around.top + chosen.row.top + rowHeight - 10);
}

// --- pointer and keys ------------------------------------------------------------------------

let dragged = null; // {x, from}: where a drag began

canvas.addEventListener("pointerdown", (event) => {
  dragged = { x: event.offsetX, from, moved: false };
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  if (dragged && Math.abs(event.offsetX - dragged.x) > 3) {
    dragged.moved = true;
    canvas.classList.add("dragged");
  }
  if (dragged && dragged.moved) {
    pointed = null;
    look(dragged.from - spanOf(event.offsetX - dragged.x), to - from);
  } else {
    pointed = find(event.offsetX, event.offsetY);
    draw();
  }
  tell(event.clientX, event.clientY);
});
canvas.addEventListener("pointerup", (event) => {
  if (dragged && !dragged.moved) {
    const found = find(event.offsetX, event.offsetY);
    chosen = found && !found.idle ? found : null;
    draw();
  }
  dragged = null;
  canvas.classList.remove("dragged");
});
canvas.addEventListener("pointerleave", () => {
  pointed = null;
  tellChosen();
  draw();
});
canvas.addEventListener("wheel", (event) => {
  // Beside the rows the wheel scrolls the page.
  if (event.offsetX < LEFT || event.offsetX > width - RIGHT || event.ctrlKey) return;
  event.preventDefault();
  const pixels = event.deltaMode === 0 ? 1 : 30;
  const across = event.shiftKey ? event.deltaX + event.deltaY : event.deltaX;
  if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
    look(from + spanOf(across * pixels), to - from);
  } else {
    zoom(Math.exp(-event.deltaY * pixels * 0.002), toTime(event.offsetX));
  }
  pointed = find(event.offsetX, event.offsetY);
  tell(event.clientX, event.clientY);
}, { passive: false });

// The action of the next rank in a direction that is the nearest in time.
function neighbour({ box, row }, step) {
  for (let place = rows.indexOf(row) + step; rows[place]; place += step) {
    const middle = (left(box) + right(box)) / 2, { boxes } = rows[place];
    if (!boxes.length) continue;
    const found = search(rows[place], middle);
    const candidates = [boxes[found - 1], boxes[found]].filter(Boolean);
    const away = (each) => Math.max(left(each) - middle, middle - right(each), 0);
    return candidates.sort((a, b) => away(a) - away(b))[0];
  }
  return null;
}

function choose(box) {
  if (!box) return;
  chosen = { box, row: box.row, idle: false };
  pointed = null;
  const span = to - from;
  if (left(box) < from) look(left(box) - span / 10, span);
  else if (right(box) > to) look(right(box) - 0.9 * span, span);
  draw();
  tellChosen();
}

canvas.addEventListener("keydown", (event) => {
  const of = chosen && chosen.row.boxes.indexOf(chosen.box);
  const first = rows[0].boxes[0];
  const middle = chosen ? (left(chosen.box) + right(chosen.box)) / 2 : (from + to) / 2;
  const actions = {
    ArrowRight: () => choose(chosen ? chosen.row.boxes[of + 1] : first),
    ArrowLeft: () => choose(chosen ? chosen.row.boxes[of - 1] : first),
    ArrowDown: () => choose(chosen ? neighbour(chosen, 1) : first),
    ArrowUp: () => choose(chosen ? neighbour(chosen, -1) : first),
    "+": () => zoom(1.5, middle),
    "=": () => zoom(1.5, middle),
    "-": () => zoom(1 / 1.5, middle),
    0: () => look(0, end),
    Home: () => look(0, end),
    Escape: () => { chosen = pointed = null; draw(); },
  };
  if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  actions[event.key]();
  tellChosen();
});

document.getElementById("closer").addEventListener("click", () => zoom(1.5));
document.getElementById("farther").addEventListener("click", () => zoom(1 / 1.5));
document.getElementById("whole").addEventListener("click", () => look(0, end));
document.getElementById("scales").hidden = !data.has_ticks;
document.getElementById("scale").addEventListener("change", (event) => {
  byTicks = event.target.value === "ticks";
  pointed = chosen = null;
  end = findEnd();
  tell(0, 0);
  look(0, end);
});

// --- legend ----------------------------------------------------------------------------------

function addToLegend(text, ...swatches) {
  const entry = document.createElement("span");
  for (const [kind, shade] of swatches) {
    const swatch = document.createElement("canvas");
    swatch.width = 52;
    swatch.height = 32;
    swatch.style.width = "26px";
    swatch.style.height = "16px";
    const on = swatch.getContext("2d");
    on.scale(2, 2);
    if (kind === "idle") {
      on.fillStyle = color("idle");
      on.fillRect(0, 0, 26, 16);
      on.strokeStyle = color("line");
      on.strokeRect(0.5, 0.5, 25, 15);
    } else {
      paint(on, kind, shade, 0, 0, 26, 16);
    }
    entry.append(swatch);
  }
  entry.append(text);
  document.getElementById("legend").append(entry);
}

function writeLegend() {
  document.getElementById("legend").replaceChildren();
  const shades = data.starts.map((_, direction) => direction);
  for (const [kind, word] of Object.entries(data.words)) {
    addToLegend(`${word} (${kind})`, ...shades.map((shade) => [kind, shade]));
  }
  addToLegend("idle", ["idle", 0]);
  if (hasSends) addToLegend("send, and the wait for the other rank", ["send", 0]);
  if (shades.length === 2) {
    addToLegend(`light, F3: direction 0, enters at rank ${data.starts[0]}`);
    addToLegend(`dark, f3: direction 1, enters at rank ${data.starts[1]}`);
  } else {
    addToLegend("F3: forward of microbatch 3");
  }
}

// --- start -----------------------------------------------------------------------------------

new ResizeObserver(layOut).observe(canvas.parentElement);
window.addEventListener("resize", layOut);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  writeLegend();
  draw();
});
writeLegend();
layOut();
look(0, end);
