// OpenAI's client for JavaScript. Run by test_clients.py as `node FILE URL MODEL EXPECTED`.
// EXPECTED: the text that gRPC gives for the message, 12 tokens, greedy.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const { OpenAI } = createRequire(process.env.OPENAI_NPM)("openai");
const [url, model, expected] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const messages = [{ role: "user", content: "Which experts answered?" }];
const greedy = { model, messages, temperature: 0, max_tokens: 12, repetition_penalty: 1.0, ignore_eos: true };

const answer = await client.chat.completions.create(greedy);
assert.equal(answer.choices[0].message.content, expected);
assert.equal(answer.usage.completion_tokens, 12);

let [text, usage] = ["", null];
for await (const chunk of await client.chat.completions.create({
  ...greedy,
  stream: true,
  stream_options: { include_usage: true },
})) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, expected);
assert.equal(usage.completion_tokens, 12);

const gathered = client.chat.completions.stream(greedy);
assert.equal(await gathered.finalContent(), expected);

// A stream that is given up leaves the client usable.
for await (const _ of await client.chat.completions.create({ ...greedy, max_tokens: 500, stream: true })) break;

const layer = { type: "integer", minimum: 0, maximum: 23 };
const parameters = { type: "object", properties: { layer }, required: ["layer"], additionalProperties: false };
const tool = { type: "function", function: { name: "look_at", parameters } };
const forced = { model, messages, tools: [tool], tool_choice: "required", temperature: 1, seed: 3, max_tokens: 400 };
const stream = client.chat.completions.stream({ ...forced, parallel_tool_calls: false });
const { message, finish_reason } = (await stream.finalChatCompletion()).choices[0];
assert.equal(finish_reason, "tool_calls");
assert.equal(message.tool_calls[0].function.name, "look_at");
assert.equal(typeof JSON.parse(message.tool_calls[0].function.arguments).layer, "number");
const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "busy" };
const after = await client.chat.completions.create({ ...greedy, messages: [...messages, message, result], tools: [tool] });
assert.equal(after.choices[0].finish_reason, "length");

const vectors = await client.embeddings.create({ model, input: ["one", "two"] });
for (const { embedding } of vectors.data) {
  const square = embedding.reduce((sum, x) => sum + x * x, 0);
  assert.ok(Math.abs(square - 1) < 1e-5, `${square}`);
}
assert.ok((await client.models.list()).data.some((one) => one.id === model));
await assert.rejects(client.chat.completions.create({ ...greedy, max_tokens: -1 }), OpenAI.BadRequestError);
await assert.rejects(client.chat.completions.create({ ...greedy, model: "gpt-5" }), OpenAI.NotFoundError);
