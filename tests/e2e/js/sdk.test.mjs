// The official JavaScript SDK against a running server. `../test_sdk_js.py` starts both and gives
// the address and the key; models named `<vendor>/<script>` answer as its scripts say.
import assert from "node:assert/strict";
import { test } from "node:test";
import { GoogleGenAI } from "@google/genai";

const baseUrl = process.env.OI_URL;
const apiKey = process.env.OI_KEY;
const client = new GoogleGenAI({ apiKey, httpOptions: { baseUrl } });
const { interactions } = client;
const model = "gemini-3.5-flash";
const once = { maxRetries: 0 };
const weather = {
  type: "function",
  name: "get_weather",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};

async function all(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

const textOf = (events) =>
  events.filter((e) => e.event_type === "step.delta").map((e) => e.delta.text).join("");

async function rejects(promise, status, word) {
  await assert.rejects(promise, (error) => {
    assert.equal(error.status, status);
    assert.match(error.message, word);
    return true;
  });
}

test("create, get, chain, delete", async () => {
  const first = await interactions.create({ model, input: "remember 7" });
  assert.equal(first.status, "completed");
  assert.equal(first.output_text, "ok");
  assert.equal(first.object, "interaction");
  assert.deepEqual(first.steps.map((s) => s.type), ["model_output"]);
  assert.equal(first.usage.total_tokens, 12);
  const second = await interactions.create({
    model: "acme/echo",
    input: [{ type: "text", text: "and?" }],
    previous_interaction_id: first.id,
  });
  assert.equal(second.output_text, "remember 7|ok|and?");
  assert.equal(second.previous_interaction_id, first.id);
  const seen = await interactions.get(second.id, { include_input: true });
  assert.deepEqual(seen.steps.map((s) => s.type), ["user_input", "model_output"]);
  assert.equal(seen.output_text, second.output_text);
  assert.deepEqual(seen.input, [{ type: "text", text: "and?" }]);
  assert.equal((await interactions.cancel(second.id)).status, "completed");
  await interactions.delete(first.id);
  await rejects(interactions.get(first.id), 404, /not found/);
  assert.equal((await interactions.get(second.id)).status, "completed");
});

test("stream, and resume from every event", async () => {
  const events = await all(
    await interactions.create({ model: "acme/words", input: "Hi", stream: true }),
  );
  const names = events.map((e) => e.event_type);
  assert.deepEqual(names.slice(0, 3), [
    "interaction.created",
    "interaction.status_update",
    "step.start",
  ]);
  assert.deepEqual(names.slice(-2), ["step.stop", "interaction.completed"]);
  assert.equal(textOf(events), "one two three four ");
  assert.equal(new Set(events.map((e) => e.event_id)).size, events.length);
  const { id } = events[0].interaction;
  assert.deepEqual(await all(await interactions.get(id, { stream: true })), events);
  for (let at = 0; at < events.length - 1; at++) {
    const last_event_id = events[at].event_id;
    const rest = await all(await interactions.get(id, { stream: true, last_event_id }));
    assert.deepEqual(rest, events.slice(at + 1));
  }
  const seen = await interactions.get(id);
  assert.equal(seen.output_text, "one two three four ");
});

test("function tools, kept by the server", async () => {
  const asked = await interactions.create({ model: "acme/tools", input: "Where?", tools: [weather] });
  assert.equal(asked.status, "requires_action");
  const calls = asked.steps.filter((s) => s.type === "function_call");
  assert.deepEqual(calls.map((c) => c.arguments), [{ city: "Rome" }, { city: "Oslo" }]);
  const done = await interactions.create({
    model: "acme/echo",
    previous_interaction_id: asked.id,
    tools: [weather],
    input: calls.map((call) => ({
      type: "function_result",
      call_id: call.id,
      name: call.name,
      result: `fine in ${call.arguments.city}`,
    })),
  });
  assert.equal(done.status, "completed");
  assert.match(done.output_text, /fine in Rome.*fine in Oslo/);
});

test("function tools, kept by the client", async () => {
  const input = [{ type: "user_input", content: [{ type: "text", text: "Where?" }] }];
  const asked = await interactions.create({
    model: "acme/tools",
    input,
    tools: [weather],
    store: false,
  });
  const answers = asked.steps
    .filter((s) => s.type === "function_call")
    .map((c) => ({ type: "function_result", call_id: c.id, name: c.name, result: { ok: true } }));
  const done = await interactions.create({
    model: "acme/echo",
    input: [...input, ...asked.steps, ...answers],
    tools: [weather],
    store: false,
  });
  assert.match(done.output_text, /^Where\?\|/);
});

test("cancel a running stream", async () => {
  const stream = await interactions.create({ model: "acme/slow", input: "Hi", stream: true });
  const events = [];
  for await (const event of stream) {
    events.push(event);
    if (events.length === 4) {
      const cancelled = await interactions.cancel(events[0].interaction.id);
      assert.equal(cancelled.status, "cancelled");
    }
  }
  assert.equal(events.at(-1).event_type, "interaction.completed");
  assert.equal(events.at(-1).interaction.status, "cancelled");
});

test("errors", async () => {
  await rejects(interactions.get("v1_" + "0".repeat(32), {}, once), 404, /not found/);
  await rejects(interactions.create({ model, input: "" }, once), 400, /input/i);
  await rejects(interactions.create({ model, input: "x", flavour: 1 }, once), 400, /flavour/);
  await rejects(interactions.create({ model: "no/such", input: "x" }, once), 404, /no\/such/);
  await rejects(interactions.create({ model, input: "x", background: true, store: false }, once), 400, /background/);
  const stranger = new GoogleGenAI({ apiKey: "oi_wrong", httpOptions: { baseUrl } });
  await rejects(stranger.interactions.create({ model, input: "x" }, once), 401, /key/i);
  const failed = await interactions.create({ model: "acme/fails", input: "x" });
  assert.equal(failed.status, "failed");
  assert.match(failed.errors[0].message, /no luck/);
});
