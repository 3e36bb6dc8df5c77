// Asks rbee by OpenAI's own client for node; prints what came of each scene as one JSON object.
import OpenAI from "openai";

const [baseURL, model, alias] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const story = [{ role: "user", content: "Tell a long story about a river." }];

async function collected(stream) {
  const found = [];
  for await (const item of stream) found.push(item);
  return found;
}

const scenes = {
  async whole() {
    const call = client.chat.completions.create({ model: alias, messages: story, max_tokens: 5 });
    const { data, response, request_id } = await call.withResponse();
    return {
      model: data.model,
      text: data.choices[0].message.content,
      usage: data.usage,
      request_id,
      job_id: response.headers.get("x-job-id"),
    };
  },
  async streamed() {
    const stream = await client.chat.completions.create({
      model,
      messages: story,
      max_tokens: 5,
      n: 2,
      stream: true,
      stream_options: { include_usage: true },
    });
    const chunks = await collected(stream);
    return {
      indexes: [...new Set(chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.index)))].sort(),
      usages: chunks.filter((chunk) => chunk.usage).map((chunk) => chunk.usage),
      is_usage_last: Boolean(chunks.at(-1).usage),
    };
  },
  async helped() {
    const runner = client.chat.completions.stream({ model, messages: story, max_tokens: 5 });
    const completion = await runner.finalChatCompletion();
    return { text: completion.choices[0].message.content, reason: completion.choices[0].finish_reason };
  },
  async schema() {
    const schema = { type: "object", properties: { cold: { type: "boolean" } }, required: ["cold"] };
    const completion = await client.chat.completions.create({
      model,
      messages: [{ role: "user", content: "How is the weather?" }],
      max_tokens: 40,
      response_format: { type: "json_schema", json_schema: { name: "weather", schema } },
    });
    return JSON.parse(completion.choices[0].message.content);
  },
  async completions() {
    const stream = await client.completions.create({ model, prompt: ["One", "Two"], max_tokens: 2, stream: true });
    const chunks = await collected(stream);
    return { are_whole: chunks.every((chunk) => chunk !== null && chunk.object === "text_completion") };
  },
  async embeddings() {
    const packed = await client.embeddings.create({ model, input: ["a river", "a stone"] });
    const short = await client.embeddings.create({ model, input: "a river", dimensions: 8 });
    return {
      widths: packed.data.map((one) => one.embedding.length),
      short: short.data[0].embedding.length,
      usage: packed.usage,
    };
  },
  async responses() {
    const whole = await client.responses.create({ model: alias, input: "Say hello.", max_output_tokens: 5 });
    const runner = client.responses.stream({ model, input: "Say hello.", max_output_tokens: 5 });
    const events = await collected(runner);
    const last = await runner.finalResponse();
    return {
      model: whole.model,
      text: whole.output_text,
      numbers: events.map((event) => event.sequence_number),
      deltas: events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta),
      streamed: last.output_text,
    };
  },
  async models() {
    const listed = await collected(client.models.list());
    const one = await client.models.retrieve(alias);
    return { ids: listed.map((found) => found.id), one: one.id, alias_of: one.alias_of };
  },
  async errors() {
    const told = {};
    const calls = {
      unknown: () => client.chat.completions.create({ model: "gtp-4", messages: story }),
      empty: () => client.chat.completions.create({ model, messages: [] }),
      long: () =>
        client.chat.completions.create({ model, messages: [{ role: "user", content: "word ".repeat(6000) }] }),
    };
    for (const [name, call] of Object.entries(calls)) {
      await call().catch((error) => {
        told[name] = [error.constructor.name, error.status, error.code, error.requestID !== null];
      });
    }
    return told;
  },
  async left() {
    const call = client.chat.completions.create({ model, messages: story, max_tokens: 3000, stream: true, ignore_eos: true });
    const { data, response } = await call.withResponse();
    for await (const _ of data) break;
    return { job_id: response.headers.get("x-job-id") };
  },
  async given_up() {
    try {
      await client.chat.completions.create(
        { model, messages: story, max_tokens: 3000, ignore_eos: true },
        { timeout: 1000, headers: { "x-correlation-id": "given-up-node" } },
      );
    } catch (error) {
      return { error: error.constructor.name };
    }
  },
};

const results = {};
for (const [name, scene] of Object.entries(scenes)) {
  try {
    results[name] = await scene();
  } catch (error) {
    results[name] = { failed: String(error.stack) };
  }
}
console.log(JSON.stringify(results));
