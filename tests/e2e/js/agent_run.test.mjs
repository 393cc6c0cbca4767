// An agent with the official JavaScript SDK, in a real sandbox. `../test_agents_js.py` starts the
// server, and scripts the model by what it is asked.
import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { GoogleGenAI } from "@google/genai";

const baseUrl = process.env.OI_URL;
const apiKey = process.env.OI_KEY;
const { interactions, environments } = new GoogleGenAI({ apiKey, httpOptions: { baseUrl } });
const agent = "antigravity-preview-09-2026";
const program = "print(6 * 7)\n";
const WHOLE = [
  "function_call write_file",
  "code_execution_call",
  "function_result write_file",
  "code_execution_result",
  "model_output",
];
const price = {
  type: "function",
  name: "get_price",
  parameters: { type: "object", properties: { item: { type: "string" } }, required: ["item"] },
};

const kinds = (steps) => steps.map((s) => (s.type.startsWith("function_") ? `${s.type} ${s.name}` : s.type));

async function ended(id) {
  for (;;) {
    const seen = await interactions.get(id);
    if (seen.status !== "in_progress") return seen;
    await sleep(50);
  }
}

async function written(environment) {
  const bytes = await environments.files.download({ environment, path: "workspace/six.py" });
  return new TextDecoder().decode(bytes);
}

function check(steps) {
  assert.deepEqual(kinds(steps), WHOLE);
  const [write, run, wrote, ran] = steps;
  assert.deepEqual([wrote.call_id, wrote.is_error], [write.id, false]);
  assert.equal(run.arguments.code, "python3 six.py");
  assert.deepEqual([ran.call_id, ran.result], [run.id, "42\n"]);
}

/** The steps of a stream, put together as the contract says and decision 0012 adds. */
function rebuilt(events) {
  const steps = [];
  for (const event of events) {
    if (event.event_type === "step.start") steps[event.index] = structuredClone(event.step);
    if (event.event_type === "step.stop") {
      const { usage, step_usage } = event;
      Object.assign(steps[event.index], usage && { usage }, step_usage && { step_usage });
    }
    if (event.event_type !== "step.delta") continue;
    const step = steps[event.index];
    const { type, ...rest } = event.delta;
    if (type === "text") {
      step.content ??= [{ type, text: "" }];
      step.content[0].text += rest.text;
    } else if (type === "arguments_delta") {
      step.arguments = JSON.parse(rest.arguments);
    } else if (type === "code_execution_result") {
      const { content, ...plain } = rest;
      assert.equal(step.result, "");
      assert.equal(typeof plain.result, "string");
      Object.assign(step, plain, content && { result: content });
    } else {
      Object.assign(step, rest);
    }
  }
  return steps;
}

test("in the background, polled", async () => {
  const started = await interactions.create({
    agent,
    input: "Multiply 6 and 7.",
    environment: "remote",
    background: true,
  });
  assert.equal(started.status, "in_progress");
  const done = await ended(started.id);
  assert.equal(done.status, "completed");
  assert.equal(done.agent, agent);
  assert.equal(done.output_text, "It printed 42.");
  check(done.steps.filter((s) => s.type !== "user_input"));
  assert.equal(await written(done.environment_id), program);
});

test("streamed: every step, as it comes", async () => {
  const stream = await interactions.create({
    agent,
    input: "Multiply 6 and 7.",
    environment: { type: "remote" },
    stream: true,
  });
  const steps = [];
  const deltas = [];
  let last;
  for await (const event of stream) {
    if (event.event_type === "step.start") steps[event.index] = event.step;
    if (event.event_type === "step.delta") deltas.push([event.index, event.delta]);
    last = event;
  }
  assert.equal(last.event_type, "interaction.completed");
  assert.equal(last.interaction.status, "completed");
  assert.deepEqual(kinds(steps), WHOLE);
  const of = (index) => deltas.filter(([at]) => at === index).map(([, delta]) => delta);
  const wanted = of(0).map((delta) => delta.arguments).join("");
  assert.deepEqual(JSON.parse(wanted), { path: "/workspace/six.py", content: program });
  assert.deepEqual(of(1).map((delta) => [delta.type, delta.arguments.code]), [
    ["code_execution_call", "python3 six.py"],
  ]);
  assert.deepEqual(of(2).map((delta) => delta.type), ["function_result"]);
  assert.deepEqual(of(3).map((delta) => [delta.type, delta.result]), [
    ["code_execution_result", "42\n"],
  ]);
  assert.equal(of(4).map((delta) => delta.text).join(""), "It printed 42.");
  const seen = await interactions.get(last.interaction.id);
  check(seen.steps.filter((s) => s.type !== "user_input"));
  assert.equal(await written(seen.environment_id), program);
});

test("streamed: pictures, from code and from files", async () => {
  const stream = await interactions.create({
    agent,
    input: "Draw a line.",
    environment: "remote",
    stream: true,
  });
  const events = [];
  for await (const event of stream) events.push(event);
  const { id } = events.at(-1).interaction;
  const seen = (await interactions.get(id)).steps.filter((s) => s.type !== "user_input");
  assert.deepEqual(kinds(seen), [
    "code_execution_call",
    "code_execution_result",
    "function_call view_image",
    "function_result view_image",
    "model_output",
  ]);
  for (const at of [1, 3]) {
    const picture = seen[at].result.find((block) => block.type === "image");
    assert.match(picture.data, /^iVBOR/);
  }
  assert.deepEqual(rebuilt(events), seen);
  const replayed = [];
  for await (const event of await interactions.get(id, { stream: true })) replayed.push(event);
  assert.deepEqual(replayed, events);
});

test("a function of the client's is waited for, beside tools of the server's", async () => {
  const tools = [{ type: "code_execution" }, price];
  const asked = await interactions.create({
    agent,
    input: "What does tea cost?",
    environment: "remote",
    tools,
  });
  assert.equal(asked.status, "requires_action");
  const answered = new Set(
    asked.steps.filter((s) => s.type === "function_result").map((s) => s.call_id),
  );
  const open = asked.steps.filter((s) => s.type === "function_call" && !answered.has(s.id));
  assert.deepEqual(open.map((s) => [s.name, s.arguments]), [["get_price", { item: "tea" }]]);
  const ran = asked.steps.find((s) => s.type === "code_execution_result");
  assert.equal(ran.result, "noted\n");
  const done = await interactions.create({
    agent,
    previous_interaction_id: asked.id,
    environment: asked.environment_id,
    tools,
    input: [
      { type: "function_result", call_id: open[0].id, name: "get_price", result: { euros: 3 } },
    ],
  });
  assert.equal(done.status, "completed");
  assert.equal(done.environment_id, asked.environment_id);
  assert.equal(done.steps.find((s) => s.type === "code_execution_result").result, "tea: asked\n");
  assert.match(done.output_text, /"euros": ?3/);
});
