"use strict";

const at = id => document.getElementById(id);
const KINDS = {
  "equal-to": {least: 8, most: 512, first: 64, told: n => `equal to ${n} tokens`},
  "at-most": {least: 8, most: 512, first: 64, told: n => `at most ${n} tokens`},
  "at-least": {least: 8, most: 512, first: 64, told: n => `at least ${n} tokens`},
  "tilt": {least: -50, most: 50, first: -10, told: n => `tilt ${n}: ${n < 0 ? "shorter" : n > 0 ? "longer" : "as it is"}`},
};
let model = null, guides = false, abort = null;

function headers() {
  const key = at("key").value;
  return {"content-type": "application/json", ...(key ? {authorization: `Bearer ${key}`} : {})};
}

/** The JSON of an answer; an error with the server's own sentence where it is none. */
async function ask(path, body, signal) {
  const answer = await fetch(path, {method: body ? "POST" : "GET", headers: headers(), signal,
    body: body ? JSON.stringify(body) : undefined});
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `status ${answer.status}`);
}

/** Give what each server-sent event holds to a function. */
async function readEvents(answer, take) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const events = (left + value).split("\n\n");
    left = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      if (data !== "[DONE]") take(JSON.parse(data));
    }
  }
}

async function messages() {
  const text = at("prompt").value, [file] = at("image").files;
  if (!file) return [{role: "user", content: text}];
  const url = await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(file);
  });
  return [{role: "user", content: [{type: "image_url", image_url: {url}}, {type: "text", text}]}];
}

/** Stream one answer into its column. */
async function write(name, control, signal) {
  const text = at(`text-${name}`), count = at(`count-${name}`), bar = at(`bar-${name}`);
  text.textContent = ""; count.textContent = "waits"; bar.style.width = "0";
  const body = {model, messages: await messages(), seed: Number(at("seed").value), stream: true, top_k: 15,
    stream_options: {include_usage: true}, ...(control ? {lenvm: control} : {})};
  let written = 0, remaining = null;
  await readEvents(await ask("v1/chat/completions", body, signal), piece => {
    if (piece.error) throw new Error(piece.error.message);
    if (piece.usage) {
      count.textContent = `${piece.usage.completion_tokens} tokens`;
      bar.style.width = "100%";
      return;
    }
    const [choice] = piece.choices;
    if (choice.delta.role === undefined) written += 1;
    text.append(choice.delta.content ?? "");
    remaining = choice.lenvm?.remaining_tokens ?? remaining;
    const come = remaining === null ? "" : `, about ${Math.round(remaining)} to come`;
    count.textContent = `${written} pieces${come}`;
    if (remaining !== null) bar.style.width = `${100 * written / (written + remaining)}%`;
  });
}

function control() {
  return `${at("kind").value}:${at("amount").value}`;
}

function tellAmount() {
  at("told").textContent = KINDS[at("kind").value].told(at("amount").value);
}

function changeKind() {
  const kind = KINDS[at("kind").value];
  Object.assign(at("amount"), {min: kind.least, max: kind.most});
  at("amount").value = kind.first;
  tellAmount();
}

function tell(error) {
  if (error.name !== "AbortError") at("error").textContent = error.message;
}

async function start(event) {
  event.preventDefault();
  if (abort) return;
  at("error").textContent = "";
  abort = new AbortController();
  at("write").disabled = true; at("stop").disabled = false;
  const both = [write("base", null, abort.signal)];
  if (guides) both.push(write("guided", control(), abort.signal));
  const ended = await Promise.allSettled(both);
  for (const one of ended) if (one.status === "rejected") tell(one.reason);
  for (const count of document.querySelectorAll(".count"))
    if (!/tokens$/.test(count.textContent)) count.textContent = count.textContent && "stopped";
  abort = null;
  at("write").disabled = false; at("stop").disabled = true;
}

let waiting = null;
/** What the length value model expects of the prompt, a moment after the last key. */
function expect() {
  clearTimeout(waiting);
  if (!guides) return;
  waiting = setTimeout(async () => {
    const asked = at("prompt").value;
    if (!asked.trim() || at("image").files.length) { at("expected").textContent = ""; return; }
    try {
      const found = await (await ask("v1/lengths", {prompts: [asked]})).json();
      if (at("prompt").value !== asked) return;  // an answer that others have overtaken
      at("expected").textContent = `About ${Math.round(found.data[0].expected_tokens)} tokens are expected of the base model.`;
    } catch (error) { tell(error); }
  }, 300);
}

async function greet() {
  try {
    model = (await (await ask("v1/models")).json()).data[0].id;
    guides = true;
    at("model").textContent = model;
    await ask("v1/lengths", {prompts: ["?"]}).catch(() => { guides = false; });
    if (!guides) at("text-guided").textContent = "There is no length value model here: start the server with --lenvm.";
    at("error").textContent = "";
    expect();
  } catch (error) { tell(error); }
}

at("form").addEventListener("submit", start);
at("stop").addEventListener("click", () => abort?.abort());
at("kind").addEventListener("change", changeKind);
at("amount").addEventListener("input", tellAmount);
at("prompt").addEventListener("input", expect);
at("image").addEventListener("change", expect);
at("key").addEventListener("change", greet);
changeKind();
greet();
