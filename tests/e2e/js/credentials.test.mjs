// Credentials with the official JavaScript SDK; see `../test_credentials_sdk.py`.
import assert from "node:assert/strict";
import { test } from "node:test";
import { GoogleGenAI } from "@google/genai";

const baseUrl = process.env.OI_URL;
const apiKey = process.env.OI_KEY;
const { credentials } = new GoogleGenAI({ apiKey, httpOptions: { baseUrl } });
const once = { maxRetries: 0 };

async function rejects(promise, status, word) {
  await assert.rejects(promise, (error) => {
    assert.equal(error.status, status);
    assert.match(error.message, word);
    return true;
  });
}

test("create, list, get, update, delete", async () => {
  const made = await credentials.create({ id: "js-1", type: "bearer_token", token: "t" });
  assert.deepEqual([made.id, made.type, made.status], ["js-1", "bearer_token", "active"]);
  assert.ok(Number.isFinite(new Date(made.create_time).getTime()));
  await rejects(
    credentials.create({ id: "js-1", type: "bearer_token", token: "t" }, once),
    409,
    /Credential 'js-1' already exists/,
  );
  await credentials.create({
    id: "js-2",
    type: "environment_variable",
    value: "v",
    injection_location: ["header", "query"],
    trusted_domains: ["api.example.com"],
  });
  const listed = await credentials.list({ page_size: 1 });
  assert.deepEqual(listed.credentials.map((one) => one.id), ["js-2"]);
  const rest = await credentials.list({ page_token: listed.next_page_token });
  assert.ok(rest.credentials.some((one) => one.id === "js-1"));
  assert.equal((await credentials.get("js-1")).type, "bearer_token");
  const changed = await credentials.update("js-1", { type: "bearer_token", prefix: "" });
  assert.ok(changed.update_time > made.update_time);
  await rejects(
    credentials.update("js-1", { type: "environment_variable", value: "v" }),
    400,
    /is of type 'bearer_token'/,
  );
  await credentials.delete("js-1");
  await credentials.delete("js-2");
  await rejects(credentials.get("js-1"), 404, /Credential 'js-1' not found/);
});
