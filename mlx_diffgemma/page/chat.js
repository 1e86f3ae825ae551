// A conversation with the server that this page comes from, over the same HTTP protocol as any other client.
"use strict";

(() => {
  const { Player, decided, drawFrame, element, figures, legend, plural } = DiffusionCanvas;
  const at = (id) => document.getElementById(id);
  const [log, form, box, settings] = [at("log"), at("composer"), at("message"), at("settings").querySelector("form")];
  const KEPT = "mlx-diffgemma settings";
  let messages = []; // the conversation as the server is told it
  let running = null; // the AbortController of the answer in flight

  // What the user can do something about; anything else is a mistake of this page.
  class Problem extends Error {}

  function restore() {
    let kept = {};
    try {
      kept = JSON.parse(sessionStorage.getItem(KEPT)) ?? {};
    } catch {
      // nothing that could be read
    }
    for (const field of settings.elements) {
      if (field.name && field.type === "checkbox") field.checked = Boolean(kept[field.name]);
      else if (field.name) field.value = kept[field.name] ?? "";
    }
  }

  function chosen() {
    const found = {};
    for (const field of settings.elements) {
      if (field.name) found[field.name] = field.type === "checkbox" ? field.checked : field.value.trim();
    }
    return found;
  }

  function headers() {
    const { key } = chosen();
    return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  }

  function request() {
    const { system, temperature, seed, max_tokens: limit, think } = chosen();
    const told = system ? [{ role: "system", content: system }] : [];
    return {
      model: at("model").value || undefined,
      messages: [...told, ...messages],
      stream: true,
      stream_options: { include_usage: true, include_drafts: true },
      ...(temperature && { temperature: Number(temperature) }),
      ...(seed && { seed: Number(seed) }),
      ...(limit && { max_tokens: Number(limit) }),
      ...(think && { reasoning_effort: "medium" }),
    };
  }

  async function refusal(response) {
    const text = await response.text();
    let said = text.slice(0, 300);
    try {
      said = JSON.parse(text).error?.message ?? said;
    } catch {
      // some other server's page
    }
    const hint = response.status === 401 ? " The key goes into Settings." : "";
    return new Problem(`HTTP ${response.status}: ${said || response.statusText}${hint}`);
  }

  // The data of server-sent events, as they come.
  async function* events(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  }

  // One answer on the page, from its first chunk to its replay.
  class Answer {
    constructor(body, prompt) {
      [this.body, this.prompt, this.created, this.began] = [body, prompt, new Date().toISOString(), performance.now()];
      [this.frames, this.calls, this.text, this.thought, this.reason, this.usage] = [[], [], "", "", null, null];
      [this.seed, this.warnings] = [body.seed ?? null, []];
      [this.committed, this.unread, this.drawing] = [0, 0, false];
      this.shown = element("p", { className: "text", dir: "auto" });
      this.thoughts = element("p", { dir: "auto" });
      this.folded = element("details", { className: "thought", hidden: true }, element("summary", { text: "Thought" }), this.thoughts);
      this.stage = element("div", { className: "stage", role: "group", dir: "auto" });
      this.stage.setAttribute("aria-label", "The canvas in flight");
      this.figures = element("dl", { className: "figures" });
      this.live = element("div", { className: "live", hidden: true }, this.stage, this.figures, legend());
      this.waiting = element("p", { className: "note", text: "Reading the prompt…" });
      this.root = element("article", { className: "turn model" }, this.folded, this.shown, this.waiting, this.live);
    }

    read(chunk) {
      if (chunk.error) throw new Problem(chunk.error.message ?? "The server stopped with an error.");
      if (chunk.diffusion) {
        const { index: _, ...frame } = chunk.diffusion; // there is one choice
        this.frame(frame);
      }
      if (chunk.usage) this.usage = chunk.usage;
      this.seed = chunk.seed ?? this.seed;
      this.warnings.push(...(chunk.warnings ?? []));
      const choice = chunk.choices?.[0];
      if (!choice) return;
      const delta = choice.delta ?? {};
      this.text += delta.content ?? "";
      this.thought += delta.reasoning_content ?? "";
      for (const call of delta.tool_calls ?? []) {
        const known = (this.calls[call.index ?? 0] ??= { name: "", arguments: "" });
        known.name += call.function?.name ?? "";
        known.arguments += call.function?.arguments ?? "";
      }
      this.reason = choice.finish_reason ?? this.reason;
      this.shown.textContent = this.text;
      this.thoughts.textContent = this.thought;
      this.folded.hidden = !this.thought.trim();
    }

    frame(frame) {
      const last = this.frames.at(-1);
      if (last?.reason && !last.rejected) this.committed += last.pieces.length;
      this.frames.push(frame);
      if (this.drawing) return;
      this.drawing = true; // frames may come faster than the screen shows them
      requestAnimationFrame(() => {
        this.drawing = false;
        const now = this.frames.at(-1);
        [this.waiting.hidden, this.live.hidden] = [true, false];
        drawFrame(this.stage, now);
        this.figures.replaceChildren(...figures(now, decided(now, this.committed) / now.seconds));
        follow();
      });
    }

    // Nothing follows: the replay takes the place of the live canvas.
    finish(reason) {
      this.reason ??= reason;
      this.seconds = (performance.now() - this.began) / 1000;
      this.live.remove();
      this.waiting.remove();
      for (const call of this.calls.filter(Boolean)) {
        this.root.append(element("pre", { className: "call", text: `${call.name}(${call.arguments})` }));
      }
      if (this.unread) this.root.append(element("p", { className: "problem", text: `${plural(this.unread, "event")} of the stream could not be read; something may be missing.` }));
      for (const text of this.warnings) this.root.append(element("p", { className: "note warning", role: "status", text }));
      if (this.frames.length) {
        this.root.append(new Player({ frames: this.frames, footer: this.footer() }, { final: this.shown }).root);
      }
      const foot = element("div", { className: "foot" }, element("p", { className: "note", text: this.summary() }));
      if (this.frames.length) {
        foot.append(element("button", { type: "button", className: "quiet", text: "Save trace", onclick: () => this.save() }));
      }
      this.root.append(foot);
    }

    get steps() {
      return this.usage?.denoising_steps ?? this.frames.filter((frame) => frame.step >= 0).length;
    }

    summary() {
      const parts = [];
      const tokens = this.usage?.completion_tokens;
      if (tokens !== undefined) parts.push(plural(tokens, "token"));
      if (this.steps) parts.push(plural(this.steps, "step"));
      if (this.usage?.tokens_per_forward) parts.push(`${this.usage.tokens_per_forward.toFixed(1)} tokens a forward`);
      if (tokens !== undefined) parts.push(`${(tokens / this.seconds).toFixed(1)} tokens/s`);
      const why = { length: "cut at the limit", empty: "empty", stopped: "stopped", error: "ended by an error" }[this.reason];
      return [...parts, `${this.seconds.toFixed(1)} s`, ...(why ? [why] : [])].join(" · ");
    }

    footer() {
      const tokens = this.usage?.completion_tokens;
      return { text: this.text, finish_reason: this.reason, ...(this.thought && { thought: this.thought }),
        ...(tokens !== undefined && { tokens, tokens_per_second: tokens / this.seconds }), steps: this.steps, seconds: this.seconds,
        ...(this.seed !== null && { seed: this.seed }) };
    }

    // The same lines as `generate --trace` writes.
    save() {
      const { model, seed = null, messages: _, stream: _1, stream_options: _2, ...options } = this.body;
      const header = { format: "mlx-diffgemma trace 1", model, prompt: this.prompt, seed, options, created: this.created };
      const lines = [header, ...this.frames, this.footer()].map((record) => `${JSON.stringify(record)}\n`);
      const link = element("a", { href: URL.createObjectURL(new Blob(lines, { type: "application/jsonl" })),
        download: `trace-${this.created.replace(/[:.]/g, "-")}.jsonl` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
  }

  // Keep the end in sight, unless the reader has gone back.
  let pinned = true;
  log.addEventListener("scroll", () => { pinned = log.scrollHeight - log.scrollTop - log.clientHeight < 80; });
  function follow() {
    if (pinned) log.scrollTop = log.scrollHeight;
  }

  function busy(controller) {
    running = controller;
    [at("send").hidden, at("stop").hidden] = [Boolean(controller), !controller];
  }

  async function stream(answer, signal) {
    let response;
    try {
      response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(answer.body), signal });
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Problem("The server does not answer. Is it still running?");
    }
    if (!response.ok) throw await refusal(response);
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") return;
        let chunk;
        try {
          chunk = JSON.parse(data);
        } catch {
          answer.unread += 1;
          continue;
        }
        answer.read(chunk);
        follow();
      }
    } catch (error) {
      if (signal.aborted || error instanceof Problem) throw error;
    }
    throw new Problem("The connection ended before the answer did.");
  }

  async function say(text) {
    const asked = { role: "user", content: text };
    messages.push(asked);
    at("welcome").hidden = true;
    const [question, answer] = [element("article", { className: "turn user" }, element("p", { dir: "auto", text })), new Answer(request(), text)];
    const here = messages;
    log.append(question, answer.root);
    pinned = true;
    follow();
    const controller = new AbortController();
    busy(controller);
    let problem = null;
    try {
      await stream(answer, controller.signal);
    } catch (error) {
      if (!controller.signal.aborted) {
        if (!(error instanceof Problem)) console.error(error);
        problem = error.message;
      }
    }
    if (running === controller) busy(null);
    answer.finish(problem ? "error" : "stopped");
    if (problem) answer.root.append(element("p", { className: "problem", role: "alert", text: problem }));
    if (answer.text) {
      here.push({ role: "assistant", content: answer.text });
    } else if (here.at(-1) === asked) {
      here.pop(); // the turn is as if it had not been, and can be sent again
      if (problem && !box.value) box.value = text;
    }
    if (answer.root.isConnected) at("announce").textContent = answer.text; // a new chat may have begun
    follow();
  }

  async function listModels() {
    let names = [];
    try {
      const response = await fetch("v1/models", { headers: headers() });
      if (!response.ok) throw await refusal(response);
      names = (await response.json()).data.map((model) => model.id);
    } catch (error) {
      const text = error instanceof Problem ? error.message : "The server does not list its models. Is it still running?";
      at("welcome").append(element("p", { className: "problem", role: "alert", text }));
      return;
    }
    at("welcome").querySelector(".problem")?.remove();
    at("model").replaceChildren(...names.map((name) => element("option", { value: name, text: name })));
    at("model").hidden = !names.length;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = box.value.trim();
    if (!text || running) return;
    box.value = "";
    say(text);
  });
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  at("stop").addEventListener("click", () => running?.abort());
  at("new").addEventListener("click", () => {
    running?.abort();
    busy(null);
    messages = [];
    for (const turn of log.querySelectorAll(".turn")) turn.remove();
    at("welcome").hidden = false;
    box.focus();
  });
  at("examples").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button && !running) say(button.textContent);
  });
  at("open-settings").addEventListener("click", () => at("settings").showModal());
  at("settings").addEventListener("close", () => {
    sessionStorage.setItem(KEPT, JSON.stringify(chosen()));
    if (at("model").hidden) listModels(); // it may have wanted the key
  });
  restore();
  listModels();
  box.focus();
})();
