// The playground: answers as they are generated, each token in the colour of its source.

const MAX_EVENT_CHARS = 4_000_000;
const MAX_ROWS = 500;
const OTHER_SOURCES = ["lookup", "cloud", "fallback"];
const SVG = "http://www.w3.org/2000/svg";

/** Return an element with a class and a text. */
function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** Return an SVG element with attributes. */
function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  if (text) made.textContent = text;
  return made;
}

/** Return a number as a text of bounded length. */
function number(value, digits = 0) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  return value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits })
    .slice(0, 16);
}

/** Yield the events of a stream as [name, value]. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffered += value;
    const blocks = buffered.split("\n\n");
    buffered = blocks.pop();
    if (buffered.length > MAX_EVENT_CHARS) throw new Error("the server sent too large an event");
    for (const block of blocks) {
      const match = /^event: (\w+)\ndata: (.*)$/.exec(block);
      if (match) yield [match[1], JSON.parse(match[2])];
    }
  }
}

/** The lanes of an answer over time. */
class Waterfall {
  static LEFT = 52;
  static LANES = { device: 14, link: 44, cloud: 74, drafts: 104 };

  constructor() {
    this.svg = shape("svg", {
      class: "glass-waterfall", viewBox: "0 0 640 146", role: "img",
      "aria-label": "Waterfall of device, link and cloud; the tables below have its numbers",
    });
    this.events = [];
    this.trips = new Map();
    this.endMs = 100;
    this.chosen = null;
    this.isDue = false;
    new ResizeObserver(() => this.redraw()).observe(this.svg);
  }

  add(events, atMs) {
    for (const event of events) {
      this.events.push(event);
      this.endMs = Math.max(this.endMs, event.at_ms + (event.kind === "step" ? event.ms ?? 0 : 0));
      if (event.kind === "verify" && !this.trips.has(event.request)) {
        this.trips.set(event.request, { verify: event });
      }
    }
    for (const event of events) {
      const trip = this.trips.get(event.request);
      if (trip && event.kind === "verdict") trip.verdict = event;
      if (trip && event.kind === "settle") trip.settle = event;
    }
    this.endMs = Math.max(this.endMs, atMs);
    this.redraw();
  }

  choose(request) {
    this.chosen = request ?? null;
    this.redraw();
  }

  redraw() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      this.draw();
    });
  }

  draw() {
    const { LEFT, LANES } = Waterfall;
    const width = Math.max(280, Math.min(1200, this.svg.clientWidth || 640));
    this.svg.setAttribute("viewBox", `0 0 ${width} 146`);
    const scaleEnd = niceEnd(this.endMs);
    const x = (ms) => LEFT + ((width - LEFT - 8) * Math.min(ms, scaleEnd)) / scaleEnd;
    const parts = [];
    const box = (kind, from, to, y, height) => {
      parts.push(shape("rect", {
        class: kind, x: x(from).toFixed(1), y, height,
        width: Math.max(1, x(to) - x(from)).toFixed(1), rx: 1.5,
      }));
    };
    for (const [name, y] of Object.entries(LANES)) {
      parts.push(shape("text", { x: 0, y: y + 12 }, name));
      parts.push(shape("line", { class: "lane", x1: LEFT, x2: width - 8, y1: y + 18, y2: y + 18 }));
    }
    for (const tick of width < 500 ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]) {
      const label = `${number(tick * scaleEnd)}${tick === 1 ? " ms" : ""}`;
      const anchor = tick === 1 ? "end" : tick ? "middle" : "start";
      parts.push(shape("text", { x: x(tick * scaleEnd), y: 142, "text-anchor": anchor }, label));
    }
    for (const trip of this.trips.values()) this.drawTrip(trip, box);
    for (const event of this.events) this.drawEvent(event, x, box, parts);
    this.svg.replaceChildren(...parts);
  }

  drawTrip({ verify, verdict }, box) {
    if (!verdict) return;
    const isChosen = verify.request === this.chosen ? " is-chosen" : "";
    const busy = Math.min(verdict.ms ?? 0, verdict.at_ms - verify.at_ms);
    const start = (verify.at_ms + verdict.at_ms - busy) / 2;
    box(`trip${isChosen}`, verify.at_ms, verdict.at_ms, Waterfall.LANES.link + 4, 10);
    box(`cloud${isChosen}`, start, start + busy, Waterfall.LANES.cloud, 16);
  }

  drawEvent(event, x, box, parts) {
    const { device, link, drafts } = Waterfall.LANES;
    const at = x(event.at_ms).toFixed(1);
    const line = (kind, y1, y2) => parts.push(shape("line", { class: kind, x1: at, x2: at, y1, y2 }));
    if (event.kind === "step") box("step", event.at_ms, event.at_ms + (event.ms ?? 0), device, 16);
    if (event.kind === "queue") box("queue", 0, event.ms ?? 0, device + 4, 8);
    if (["open", "upload", "verify"].includes(event.kind)) line("up", link, link + 9);
    if (["opened", "verdict", "refused"].includes(event.kind)) line("down", link + 9, link + 18);
    if (event.kind === "lost") line("lost", 4, 122);
    if (event.kind === "settle") {
      const thrown = (event.drafts ?? 0) - (event.kept ?? 0);
      this.stack("kept", at, drafts, event.kept ?? 0, parts);
      this.stack("thrown", Number(at) + 3, drafts, thrown, parts);
    }
  }

  /** Draw a bar that is higher for more drafts. */
  stack(kind, x, y, count, parts) {
    if (count <= 0) return;
    const height = Math.min(18, 3 + 2 * count);
    parts.push(shape("rect", { class: kind, x, y: y + 18 - height, width: 2.5, height }));
  }
}

/** Return the end of the axis: few steps, so that the picture seldom changes its scale. */
function niceEnd(ms) {
  const power = 10 ** Math.floor(Math.log10(ms));
  return [1, 1.5, 2, 3, 4, 6, 8, 10].map((each) => each * power).find((each) => each >= ms) ?? ms;
}

/** One answer on the page. */
class AnswerView {
  constructor(title) {
    this.tokens = [];
    this.sources = new Map();
    this.chosen = -1;
    this.waterfall = new Waterfall();
    this.section = element("section", "glass-answer");
    this.section.setAttribute("aria-label", title);
    this.legend = element("ul", "glass-legend");
    this.legend.setAttribute("aria-label", "Sources");
    this.text = element("p", "glass-text");
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", "Answer; the arrow keys choose a token");
    this.facts = element("p", "glass-facts");
    this.totals = element("dl", "glass-totals");
    this.problem = element("p", "glass-problem");
    this.problem.hidden = true;
    this.tripRows = element("tbody");
    this.tokenRows = element("tbody");
    this.section.append(
      element("h2", "", title), this.legend, keyOfLines(), this.text, this.facts, this.problem,
      this.waterfall.svg, this.totals,
      details("Round trips", ["Sent, ms", "Took, ms", "Cloud, ms", "Drafts", "Kept", "Thrown away"],
        this.tripRows),
      details("Tokens", ["Source", "Confidence", "Log-prob.", "Round trip", "Token"], this.tokenRows),
    );
    this.show("Hover, tap or use the arrow keys to see where a token came from.");
    this.listen();
  }

  listen() {
    const indexOf = (event) => this.tokens.findIndex((each) => each.span === event.target);
    for (const kind of ["pointerover", "click"]) {
      this.text.addEventListener(kind, (event) => {
        const index = indexOf(event);
        if (index >= 0) this.choose(index);
      });
    }
    this.text.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
      const ends = { Home: 0, End: this.tokens.length - 1 };
      const index = event.key in ends ? ends[event.key] : this.chosen + (steps[event.key] ?? NaN);
      if (Number.isNaN(index) || !this.tokens.length) return;
      event.preventDefault();
      this.choose(Math.max(0, Math.min(this.tokens.length - 1, index)), true);
    });
  }

  add(reply) {
    const trace = reply.trace ?? { at_ms: 0 };
    this.waterfall.add(trace.events ?? [], trace.at_ms);
    if (reply.source) this.addToken(reply, trace);
    else if (reply.text) this.text.append(reply.text);
    if (reply.done) this.end(reply);
    else this.showTotals(trace);
  }

  addToken(reply, trace) {
    if (!this.sources.has(reply.source)) this.addSource(reply.source);
    this.sources.set(reply.source, this.sources.get(reply.source) + 1);
    const span = element("span", "glass-token", reply.text ?? "");
    if (trace.verdict) span.classList.add(`is-${trace.verdict}`);
    if (trace.is_proposed) span.classList.add("is-proposed");
    span.classList.add(this.colourOf(reply.source));
    this.tokens.push({ reply, trace, span });
    this.text.append(span);
  }

  /** Add a source to the legend; exits have their colours by depth. */
  addSource(source) {
    this.sources.set(source, 0);
    for (const { reply, span } of this.tokens) {
      span.className = span.className.replace(/source-\S+/, this.colourOf(reply.source));
    }
    const names = [...this.exits(), ...OTHER_SOURCES.filter((name) => this.sources.has(name))];
    this.legend.replaceChildren(...names.map((name) => element("li", this.colourOf(name), name)));
  }

  exits() {
    const exits = [...this.sources.keys()].filter((name) => /^exit:\d{1,4}$/.test(name));
    return exits.sort((a, b) => Number(a.slice(5)) - Number(b.slice(5)));
  }

  colourOf(source) {
    if (OTHER_SOURCES.includes(source)) return `source-${source}`;
    const depth = this.exits().indexOf(source);
    return depth < 0 ? "source-none" : `source-exit${depth % 4}`;
  }

  choose(index, isSpoken = false) {
    this.tokens[this.chosen]?.span.classList.remove("is-chosen");
    this.chosen = index;
    const { reply, trace, span } = this.tokens[index];
    span.classList.add("is-chosen");
    this.waterfall.choose(trace.request);
    this.facts.replaceChildren(
      element("b", "", reply.text ?? "(no text yet)"), ...factsOf(reply, trace).map(
        (fact) => element("span", "", fact)),
    );
    this.facts.setAttribute("aria-live", isSpoken ? "polite" : "off");
  }

  show(text) {
    this.facts.replaceChildren(element("span", "", text));
  }

  showTotals(trace, usage = null) {
    const tokens = this.tokens.length;
    const cloud = this.sources.get("cloud") ?? 0;
    const events = this.waterfall.events;
    const sum = (kinds) => events.reduce(
      (total, each) => total + (kinds.includes(each.kind) ? each.num_bytes ?? 0 : 0), 0);
    const first = this.tokens[0]?.trace.at_ms;
    const rate = tokens > 1 ? (trace.at_ms - first) / (tokens - 1) : NaN;
    const values = {
      Tokens: number(usage?.tokens ?? tokens),
      Offload: tokens ? `${number(100 * (usage?.offload_rate ?? cloud / tokens))} %` : "–",
      "Round trips": number(usage?.round_trips ?? this.waterfall.trips.size),
      Sent: `${number(usage?.bytes_up ?? sum(["open", "upload", "verify", "close"]))} B`,
      Received: `${number(usage?.bytes_down ?? sum(["opened", "receipt", "verdict", "refused"]))} B`,
      "First token": `${number(usage?.ttft_ms ?? first)} ms`,
      "Each token": `${number(usage?.tpot_ms ?? rate, 1)} ms`,
    };
    this.totals.replaceChildren(...Object.entries(values).map(([name, value]) => {
      const pair = element("div");
      pair.append(element("dt", "", name), element("dd", "", value));
      return pair;
    }));
  }

  end(reply) {
    this.showTotals(reply.trace ?? { at_ms: 0 }, reply.usage);
    if (reply.error) this.fail(reply.error.message);
    else if (reply.note) this.show(reply.note);
    this.fillTables();
  }

  fillTables() {
    const trips = [...this.waterfall.trips.values()].slice(0, MAX_ROWS);
    this.tripRows.replaceChildren(...trips.map(({ verify, verdict, settle }) => row([
      number(verify.at_ms, 1),
      verdict ? number(verdict.at_ms - verify.at_ms, 1) : "no verdict",
      verdict ? number(verdict.ms ?? 0, 1) : "", number(verify.drafts ?? 0),
      verdict ? number(verdict.kept ?? 0) : "", (settle?.dropped ?? []).join("·"),
    ])));
    this.tokenRows.replaceChildren(...this.tokens.slice(0, MAX_ROWS).map(({ reply, trace }) => row([
      reply.source, reply.confidence === undefined ? "" : number(reply.confidence, 3),
      number(trace.logprob, 3), trace.verdict ? `${(trace.request ?? 0) + 1} ${trace.verdict}` : "",
      reply.text ?? "",
    ])));
  }

  fail(message) {
    this.problem.textContent = message;
    this.problem.hidden = false;
    this.fillTables();
  }
}

/** Return the key of the lines under tokens. */
function keyOfLines() {
  const key = element("p", "glass-key");
  const lines = {
    "is-accepted": "accepted by the cloud",
    "is-corrected": "corrected by the cloud",
    "is-proposed": "copied from an earlier text",
  };
  for (const [name, text] of Object.entries(lines)) {
    key.append(element("span", `glass-token ${name}`, text));
  }
  return key;
}

function factsOf(reply, trace) {
  const facts = [reply.source];
  if (reply.confidence !== undefined) facts.push(`confidence ${number(100 * reply.confidence, 1)} %`);
  if (trace.logprob !== undefined) facts.push(`log-probability ${number(trace.logprob, 3)}`);
  if (trace.exit_layer) facts.push(`exit after layer ${trace.exit_layer}`);
  if (trace.is_proposed) facts.push("copied from an earlier text");
  if (trace.verdict) facts.push(`${trace.verdict} in round trip ${(trace.request ?? 0) + 1}`);
  facts.push(`at ${number(trace.at_ms)} ms`);
  return facts;
}

function row(cells) {
  const made = element("tr");
  made.append(...cells.map((text) => element("td", "", text)));
  return made;
}

function details(title, headers, body) {
  const made = element("details");
  const scroll = element("div", "glass-scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", title);
  const table = element("table");
  const head = element("thead");
  const names = element("tr");
  for (const name of headers) {
    const cell = element("th", "", name);
    cell.scope = "col";
    names.append(cell);
  }
  head.append(names);
  table.append(head, body);
  scroll.append(table);
  made.append(element("summary", "", title), scroll);
  return made;
}

/** The form and its answers. */
class Playground {
  constructor(form) {
    this.form = form;
    this.answers = document.getElementById("glass-answers");
    this.status = document.getElementById("glass-status");
    this.stop = document.getElementById("glass-stop");
    this.send = form.querySelector("button[type=submit]");
    this.control = null;
    for (const each of form.querySelectorAll(".glass-script")) each.hidden = false;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run(new FormData(form));
    });
    this.stop.addEventListener("click", () => this.control?.abort());
    form.elements.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
  }

  async run(fields) {
    if (this.control) return;
    this.control = new AbortController();
    this.setBusy(true);
    document.querySelectorAll("main > .problem").forEach((each) => each.remove());
    const modes = [fields.get("mode"), fields.get("other")].filter(Boolean);
    const views = modes.map((mode) => new AnswerView(`${mode} on ${fields.get("device")}`));
    this.answers.replaceChildren(...views.map((view) => view.section));
    this.status.textContent = "The device is answering.";
    try {
      // One after the other, so that the answers do not slow each other.
      for (const [i, view] of views.entries()) await this.answer(view, fields, modes[i]);
      const tokens = views.map((view) => view.tokens.length).join(" and ");
      this.status.textContent = `The answer is complete: ${tokens} tokens.`;
    } catch (error) {
      this.status.textContent = error.name === "AbortError" ? "Stopped." : error.message;
    } finally {
      this.control = null;
      this.setBusy(false);
    }
  }

  async answer(view, fields, mode) {
    const tokens = Number(fields.get("max_new_tokens"));
    const device = encodeURIComponent(fields.get("device"));
    const response = await fetch(`/v1/fleet/devices/${device}/prompts`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ prompt: fields.get("prompt"), mode, ...(tokens && {
        max_new_tokens: tokens }) }),
      signal: this.control.signal,
    });
    if (!response.ok) throw new Error(await problemOf(response));
    let isDone = false;
    for await (const [name, value] of eventsOf(response)) {
      if (name === "problem") throw new Error(String(value.message));
      view.add(value);
      isDone ||= value.done;
    }
    if (!isDone) throw new Error("The connection was cut before the end; send the prompt again.");
  }

  setBusy(isBusy) {
    this.send.disabled = isBusy;
    this.stop.disabled = !isBusy;
  }
}

async function problemOf(response) {
  try {
    return String((await response.json()).error.message);
  } catch {
    return `The server answered with status ${response.status}; load the page again.`;
  }
}

const form = document.getElementById("glass-form");
if (form) new Playground(form);
