// Draws frames of a trace (docs/trace.md) and plays them: the one renderer of the replay page and of the chat page.
// Text of a model only ever becomes textContent.
"use strict";

const DiffusionCanvas = (() => {
  // Entropy in nats, the bounds of the terminal's live view; the first that is not passed gives the class.
  const BANDS = [
    { bound: 0.005, name: "certain" },
    { bound: 0.1, name: "sure" },
    { bound: 0.7, name: "likely" },
    { bound: 2.0, name: "unsure" },
    { bound: Infinity, name: "guessing" },
  ];
  const DRAFTED = ["", " stands", " repaired"];
  const [SHORTEST, LONGEST] = [60, 1500]; // milliseconds a frame is shown at speed 1, whatever it took
  const SVG = "http://www.w3.org/2000/svg";

  const band = (nats) => (nats === null ? BANDS.length - 1 : BANDS.findIndex(({ bound }) => nats <= bound));
  const plural = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
  const nats = (value) => (value === null ? "not finite" : value < 0.0005 ? "0.000" : value.toFixed(3));

  function element(tag, { text, ...properties } = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in made) made[name] = value;
      else made.setAttribute(name, value);
    }
    if (text !== undefined) made.textContent = text;
    made.append(...children);
    return made;
  }

  function shape(tag, attributes) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  // Control characters, of which noise is full, would be invisible: Unicode has pictures of them.
  const visible = (piece) => piece.replace(/[\0-\x08\x0b-\x1f]/g, (sign) => String.fromCharCode(0x2400 + sign.charCodeAt(0)));

  // Spans are kept from frame to frame, so that a position changes its colour in place.
  function drawFrame(stage, frame, before = "") {
    let [settled, now] = stage.children;
    if (!now) {
      [settled, now] = [element("span", { className: "settled" }), element("span", { className: "positions" })];
      stage.replaceChildren(settled, now);
    }
    if (settled.textContent !== before) settled.textContent = before;
    while (now.childElementCount > frame.pieces.length) now.lastChild.remove();
    while (now.childElementCount < frame.pieces.length) now.append(element("span", {}, "", element("span")));
    frame.pieces.forEach((piece, place) => {
      // The space a word begins with is left without colour, so that the tokens stand apart.
      const [gap, span] = now.children[place].childNodes;
      const text = visible(piece).replace(/^ (?=\S)/, "");
      gap.data = piece.startsWith(" ") && !text.startsWith(" ") ? " " : "";
      if (span.textContent !== text) span.textContent = text;
      const accepted = frame.accepted[place] === "1";
      const line = /^\n+$/.test(piece) ? " line" : "";
      const drafted = frame.draft ? DRAFTED[Number(frame.draft[place])] : "";
      span.className = `token band${band(frame.entropy[place])}${accepted ? " accepted" : ""}${line}${drafted}`;
      span.title = `position ${place + 1}: ${nats(frame.entropy[place])} nats, ${accepted ? "accepted" : "not accepted"}` +
        (frame.draft ? [", not drafted", ", drafted and stands", ", drafted and repaired"][Number(frame.draft[place])] : "");
    });
    stage.classList.toggle("empty", !frame.pieces.length && !before);
  }

  function legend(drafted = false) {
    const list = element("ul", { className: "legend", "aria-label": "Colours: entropy of a position" });
    BANDS.forEach(({ bound, name }, index) => {
      const range = Number.isFinite(bound) ? `up to ${bound} nats` : "above that";
      list.append(element("li", {}, element("span", { className: `token band${index}`, text: name, title: range })));
    });
    if (drafted) {
      list.append(element("li", {}, element("span", { className: "token stands", text: "draft stands" })),
        element("li", {}, element("span", { className: "token repaired", text: "draft repaired" })));
    }
    return list;
  }

  // Positions that are decided at this frame: what is committed, and of the canvas in flight what is accepted.
  function decided(frame, committed) {
    const whole = frame.reason && !frame.rejected;
    return committed + (whole ? frame.pieces.length : frame.accepted.split("1").length - 1);
  }

  function figures(frame, rate) {
    const share = frame.pieces.length ? (100 * (frame.accepted.split("1").length - 1)) / frame.pieces.length : 100;
    const step = frame.step < 0 ? "draft, committed at once" : `${frame.step + 1} of ${frame.max_steps}`;
    const attempt = frame.retry ? `, attempt ${frame.retry + 1}` : "";
    const found = [["Canvas", `${frame.canvas + 1}${attempt}`, "canvas"], ["Step", step, "step"],
      ["Mean entropy", `${nats(frame.mean_entropy)} nats`, "entropy"], ["Accepted", `${Math.round(share)} %`, "accepted"]];
    if (frame.seconds !== undefined) found.push(["Time", `${frame.seconds.toFixed(2)} s`, "time"]);
    if (Number.isFinite(rate)) found.push(["Tokens/s", rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en"), "rate"]);
    if (frame.reason) {
      const why = [frame.reason.replace("_", " "), frame.rejected ? "begun anew" : frame.certificate].filter(Boolean);
      found.push(["Ended", why.join(", "), "reason"]);
    }
    return found.map(([name, value, key]) => element("div", { className: `figure ${key}` },
      element("dt", { text: name }), element("dd", { text: value })));
  }

  // The lines of a trace, as answers of one header, frames and a footer; a line cut off at the end, by a kill, is left out.
  function parseTrace(text) {
    const answers = [];
    let unread = 0;
    const lines = text.split("\n").filter((line) => line.trim());
    for (const line of lines) {
      let record;
      try {
        record = JSON.parse(line);
      } catch {
        unread += 1;
        continue;
      }
      if ("format" in record) answers.push({ header: record, frames: [], footer: null });
      else if (!answers.length) unread += 1;
      else if ("pieces" in record) answers.at(-1).frames.push(record);
      else if ("finish_reason" in record) answers.at(-1).footer = record;
    }
    return { answers, unread };
  }

  // Mean entropy over the steps, logarithmic from 10 to 0.001 nats, on the colours of the bands.
  class Chart {
    constructor(frames, seek) {
      this.count = frames.length;
      const [width, height] = [1000, 100];
      this.x = (index) => (this.count > 1 ? (width * index) / (this.count - 1) : width / 2); // as the slider's stops
      const y = (value) => 3 + ((height - 6) * (1 - Math.log10(Math.min(10, Math.max(0.001, value ?? 10))))) / 4;
      const values = frames.map((frame) => nats(frame.mean_entropy));
      this.svg = shape("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img",
        "aria-label": `Mean entropy over ${plural(this.count, "step")}: from ${values[0]} to ${values.at(-1)} nats` });
      this.svg.append(shape("title", {}));
      this.svg.firstChild.textContent = "Mean entropy over the steps";
      let top = 0;
      for (let index = BANDS.length - 1; index >= 0; index -= 1) {
        const bottom = index ? y(BANDS[index - 1].bound) : height;
        this.svg.append(shape("rect", { class: `band${index}`, x: 0, width, y: top, height: bottom - top }));
        top = bottom;
      }
      let start = 0;
      for (let index = 1; index <= frames.length; index += 1) {
        const [last, next] = [frames[index - 1], frames[index]];
        if (next && next.canvas === last.canvas && next.retry === last.retry) continue;
        const points = frames.slice(start, index).map((frame, place) => `${this.x(start + place)},${y(frame.mean_entropy)}`);
        if (points.length === 1) points.push(points[0]); // a line of no length is drawn as its round cap
        this.svg.append(shape("polyline", { points: points.join(" ") }));
        if (next) {
          const border = (this.x(index - 1) + this.x(index)) / 2;
          this.svg.append(shape("line", { class: "border", x1: border, x2: border, y1: 0, y2: height }));
        }
        start = index;
      }
      this.cursor = this.svg.appendChild(shape("line", { class: "cursor", y1: 0, y2: height }));
      const follow = (event) => {
        if (!event.buttons) return;
        const box = this.svg.getBoundingClientRect();
        const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
        seek(Math.round(share * (this.count - 1)));
      };
      this.svg.addEventListener("pointerdown", follow);
      this.svg.addEventListener("pointermove", follow);
    }

    at(index) {
      const x = this.x(Math.min(index, this.count - 1));
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
    }
  }

  // Plays the frames of an answer.  With ``final``, an element, the slider has one more stop, where that stands for the canvas.
  // ``keys``: where space and arrows are heard.
  class Player {
    constructor({ frames, footer }, { final = null, keys = null } = {}) {
      [this.frames, this.footer, this.final] = [frames, footer, final];
      this.last = frames.length - (final ? 0 : 1);
      this.before = [];
      this.committed = [];
      let [text, tokens] = ["", 0];
      for (const frame of frames) {
        this.before.push(text);
        this.committed.push(tokens);
        if (frame.reason && !frame.rejected) [text, tokens] = [text + frame.pieces.join(""), tokens + frame.pieces.length];
      }
      this.stage = element("div", { className: "stage", role: "group", dir: "auto" });
      this.button = element("button", { type: "button", className: "play", onclick: () => this.toggle() });
      this.slider = element("input", { type: "range", min: 0, max: this.last, step: 1, oninput: () => this.seek(Number(this.slider.value)) });
      this.slider.setAttribute("aria-label", "Step");
      this.speed = element("select", { title: "Speed" }, ...[0.5, 1, 2].map((factor) =>
        element("option", { value: factor, text: `${factor}×`, selected: factor === 1 })));
      this.speed.setAttribute("aria-label", "Speed");
      this.figures = element("dl", { className: "figures" });
      this.chart = new Chart(frames, (index) => this.seek(index));
      const controls = element("div", { className: "controls" }, this.button, this.slider, this.speed);
      this.more = element("div", { className: "more" }, this.chart.svg, this.figures, legend(frames.some((frame) => frame.draft)));
      this.root = element("div", { className: "player" }, this.stage, controls, this.more);
      (keys ?? this.root).addEventListener("keydown", (event) => this.key(event));
      this.timer = null;
      this.show(final ? this.last : 0);
      this.pause();
    }

    get playing() {
      return this.timer !== null;
    }

    show(index) {
      this.index = Math.min(this.last, Math.max(0, index));
      const over = this.index === this.frames.length; // past the frames stands the answer itself
      const frame = this.frames[Math.min(this.index, this.frames.length - 1)];
      const end = this.index >= this.frames.length - 1;
      const rate = end && this.footer?.tokens_per_second ? this.footer.tokens_per_second
        : decided(frame, this.committed[Math.min(this.index, this.frames.length - 1)]) / frame.seconds;
      this.stage.hidden = over;
      if (this.final) {
        this.final.hidden = !over;
        this.more.hidden = over;
      }
      if (!over) {
        drawFrame(this.stage, frame, this.before[this.index]);
        this.stage.setAttribute("aria-label", `Canvas ${frame.canvas + 1}, step ${frame.step + 1}`);
      }
      this.figures.replaceChildren(...figures(frame, rate));
      this.chart.at(this.index);
      this.slider.value = this.index;
      this.slider.setAttribute("aria-valuetext", over ? "the answer" : `canvas ${frame.canvas + 1}, step ${frame.step + 1}`);
    }

    seek(index) {
      this.pause();
      this.show(index);
    }

    toggle() {
      if (this.playing) this.pause();
      else this.play();
    }

    play() {
      if (this.index >= this.last) this.show(0);
      this.label("Pause", "playing");
      this.timer = setTimeout(() => this.next(), this.wait());
    }

    pause() {
      clearTimeout(this.timer);
      this.timer = null;
      this.label("Play", "paused");
    }

    label(text, state) {
      this.button.setAttribute("aria-label", text);
      this.button.title = `${text} (space)`;
      this.root.dataset.state = state;
    }

    next() {
      this.show(this.index + 1);
      if (this.index >= this.last) this.pause();
      else this.timer = setTimeout(() => this.next(), this.wait());
    }

    // As long as the next step took when it was recorded, within bounds that the eye can follow.
    wait() {
      const [now, next] = [this.frames[this.index], this.frames[this.index + 1]];
      const took = now && next ? 1000 * (next.seconds - now.seconds) : 600;
      return Math.min(LONGEST, Math.max(SHORTEST, Number.isFinite(took) ? took : 200)) / Number(this.speed.value);
    }

    key(event) {
      if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest?.("textarea, select, a, summary, dialog")) return;
      const onButton = event.target.closest?.("button");
      const acts = {
        " ": () => this.toggle(), ArrowLeft: () => this.seek(this.index - 1), ArrowRight: () => this.seek(this.index + 1),
        Home: () => this.seek(0), End: () => this.seek(this.last),
      }[event.key];
      if (!acts || (event.key === " " && onButton)) return; // a button is pressed by space already
      event.preventDefault();
      acts();
    }
  }

  return { BANDS, Player, band, decided, drawFrame, element, figures, legend, parseTrace, plural };
})();
