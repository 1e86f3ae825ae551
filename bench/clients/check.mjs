// Two turns, a loop of tools and a schema with the npm clients `openai` and `ai`, against a running server.
//
//   python -m tests.clients.scripted serve --port 8080 --max-denoising-steps 4 &
//   cd bench/clients && npm install && BASE_URL=http://127.0.0.1:8080/v1 npm run check

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = process.env.BASE_URL ?? "http://127.0.0.1:8080/v1";
const ask = { role: "user", content: "Add 12 and 30." };
const Sum = z.object({ total: z.number().int() });
const input = z.object({ number: z.number().int().min(0).max(99) });
const passed = [];

async function check(name, run) {
  await run();
  passed.push(name);
  console.log(`ok  ${name}`);
}

const openai = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const options = { model: "nano", max_tokens: 64 };

await check("openai: two turns, whole and streamed", async () => {
  const first = (await openai.chat.completions.create({ ...options, messages: [ask] })).choices[0].message;
  const stream = openai.chat.completions.stream({ ...options, messages: [ask, first, ask] });
  const second = await stream.finalMessage();
  const third = await openai.chat.completions.create({ ...options, messages: [ask, first, ask, second, ask] });
  assert.equal(third.choices[0].message.role, "assistant");
});

await check("openai: tools", async () => {
  const called = [];
  const runner = openai.chat.completions.runTools({
    ...options, messages: [ask],
    tools: [{ type: "function", function: {
      name: "double", description: "Doubles a number.", parse: JSON.parse, parameters: z.toJSONSchema(input),
      function: ({ number }) => { called.push(number); return String(2 * number); } } }],
  });
  const last = await runner.finalMessage();
  assert.equal(called.length, 1);
  assert.equal(last.role, "assistant");
});

await check("openai: schema", async () => {
  const given = { ...options, response_format: zodResponseFormat(Sum, "sum") };
  const first = (await openai.chat.completions.parse({ ...given, messages: [ask] })).choices[0].message;
  Sum.parse(first.parsed);
  const again = (await openai.chat.completions.parse({ ...given, messages: [ask, first, ask] })).choices[0].message;
  Sum.parse(again.parsed);
});

const model = createOpenAICompatible({ name: "local", baseURL, apiKey: "none", supportsStructuredOutputs: true })("nano");
const settings = { model, maxOutputTokens: 64, maxRetries: 0 };

await check("ai: two turns, whole and streamed", async () => {
  const first = await generateText({ ...settings, messages: [ask] });
  const stream = streamText({ ...settings, messages: [ask, ...first.response.messages, ask] });
  await stream.consumeStream();
  const { messages } = await stream.response;
  await generateText({ ...settings, messages: [ask, ...first.response.messages, ask, ...messages, ask] });
});

await check("ai: tools", async () => {
  const called = [];
  const double = tool({ description: "Doubles a number.", inputSchema: input,
                        execute: async ({ number }) => { called.push(number); return 2 * number; } });
  const result = await generateText({ ...settings, messages: [ask], tools: { double }, stopWhen: stepCountIs(3) });
  assert.equal(called.length, 1);
  assert.equal(result.steps.length, 2);
});

await check("ai: schema", async () => {
  Sum.parse((await generateObject({ ...settings, messages: [ask], schema: Sum })).object);
});

assert.equal(passed.length, 6);
