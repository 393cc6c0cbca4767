// Custom agents with the official JavaScript SDK; see `../test_agents_sdk.py`.
import assert from "node:assert/strict";
import { test } from "node:test";
import { GoogleGenAI } from "@google/genai";

const baseUrl = process.env.OI_URL;
const apiKey = process.env.OI_KEY;
const { agents } = new GoogleGenAI({ apiKey, httpOptions: { baseUrl } });
const once = { maxRetries: 0 };
const base_agent = "antigravity-preview-09-2026";

async function rejects(promise, status, word) {
  await assert.rejects(promise, (error) => {
    assert.equal(error.status, status);
    assert.match(error.message, word);
    return true;
  });
}

test("create, list, get, delete", async () => {
  const made = await agents.create({
    id: "js-1",
    base_agent,
    system_instruction: "Be kind.",
    tools: [{ type: "code_execution" }, { type: "mcp_server", name: "m", url: "https://h/mcp" }],
    base_environment: { type: "remote", network: "disabled" },
  });
  assert.deepEqual([made.id, made.base_agent, made.version], ["js-1", base_agent, 1]);
  assert.deepEqual(made.tools.map((tool) => tool.type), ["code_execution", "mcp_server"]);
  assert.deepEqual(made.base_environment, { type: "remote", network: "disabled" });
  await rejects(agents.create({ id: "js-1", base_agent }, once), 409, /'js-1' already exists/);
  await rejects(agents.create({ id: "Gemini-x", base_agent }, once), 400, /prefix 'gemini-'/);
  await agents.create({ id: "js-2", base_agent });
  const listed = await agents.list({ page_size: 1 });
  assert.deepEqual(listed.agents.map((one) => one.id), ["js-2"]);
  const rest = await agents.list({ page_token: listed.next_page_token });
  assert.ok(rest.agents.some((one) => one.id === "js-1"));
  const shown = ({ sdkHttpResponse: _, ...agent }) => agent;
  for (const name of ["js-1", "agents/js-1"]) {
    assert.deepEqual(shown(await agents.get(name)), shown(made));
  }
  await agents.delete("js-1");
  await agents.delete("js-2");
  await rejects(agents.get("js-1"), 404, /Agent 'js-1' not found/);
});
