// Shows the trace that stands in this page.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const { Player, element, parseTrace, plural } = DiffusionCanvas;
  const { answers, unread } = parseTrace(document.getElementById("trace").textContent);
  const main = document.querySelector("main");

  function told(header, footer) {
    const facts = { model: header.model, seed: footer?.seed ?? header.seed, recorded: header.created?.replace("T", " ").replace("+00:00", " UTC"), ...header.options };
    const list = element("dl", { className: "facts" });
    for (const [name, value] of Object.entries(facts)) {
      if (value === null || value === undefined) continue;
      list.append(element("div", {}, element("dt", { text: name.replaceAll("_", " ") }),
        element("dd", { text: typeof value === "string" ? value : JSON.stringify(value) })));
    }
    return list;
  }

  function ending(footer) {
    if (!footer) return "The recording was cut off before the answer ended.";
    const rate = footer.tokens_per_second ? `, ${footer.tokens_per_second.toFixed(1)} tokens/s` : "";
    return `${plural(footer.tokens ?? 0, "token")} in ${plural(footer.steps, "step")}${rate}, finished by ${footer.finish_reason}`;
  }

  for (const { header, frames, footer } of answers) {
    const section = element("section", { className: "answer" }, element("h2", { text: "Prompt" }),
      element("p", { className: "prompt", dir: "auto", text: header.prompt }), told(header, footer));
    if (frames.length) {
      const player = new Player({ frames, footer }, { keys: answers.length === 1 ? document : null });
      section.append(element("h2", { text: "Canvas" }), player.root);
    } else {
      section.append(element("p", { className: "note", text: "No denoising step was recorded." }));
    }
    section.append(element("h2", { text: "Answer" }));
    if (footer?.thought) {
      section.append(element("details", { className: "thought" }, element("summary", { text: "Thought" }),
        element("p", { dir: "auto", text: footer.thought })));
    }
    section.append(element("p", { className: "final", dir: "auto", "aria-live": "polite", text: footer?.text ?? "" }),
      element("p", { className: "note", text: ending(footer) }));
    main.append(section);
  }
  if (!answers.length) main.append(element("p", { className: "problem", text: "There is no trace in this page." }));
  if (unread) main.append(element("p", { className: "note", text: `${plural(unread, "line")} could not be read.` }));
});
