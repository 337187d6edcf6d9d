// Which model and knowledge base are chosen, what the server says of them now, and changes to their facts.

import { json, ServerError } from "./api.js";

const POLL_MS = 2_000;
const SLOWEST_POLL_MS = 15_000;
const WAIT_S = 30;

/**
 * What is chosen. `name` is null for the base model alone; `asked` a version that the model's name asks for;
 * `description` what the server last said of the knowledge base, `trouble` why it says nothing now;
 * `written` the newest version that this page has committed.
 */
export const chosen = { model: null, name: null, asked: null, description: null, trouble: null, written: null };

/** "chosen": another model; "described": the server has said something, or could not. */
export const changes = new EventTarget();

let timer;
let delayMs = POLL_MS;
let turn = 0;

/** `base`, `base:kb` or `base:kb@version`. */
export function parseModel(model) {
  const found = /^(.+):([A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@(\d+))?$/.exec(model);
  return found
    ? { base: found[1], name: found[2], asked: found[3] === undefined ? null : Number(found[3]) }
    : { base: model, name: null, asked: null };
}

export async function listModels(options) {
  return (await json("v1/models", options)).data.map((model) => model.id);
}

export function choose(model) {
  const { name, asked } = parseModel(model);
  const written = name === chosen.name ? chosen.written : null;
  Object.assign(chosen, { model, name, asked, written, description: null, trouble: null });
  changes.dispatchEvent(new Event("chosen"));
  describe();
}

const place = () => `v1/knowledge_bases/${encodeURIComponent(chosen.name)}`;

/** Ask the server about the knowledge base now, and go on asking. */
export async function describe() {
  clearTimeout(timer);
  const mine = ++turn;
  if (chosen.name === null) return;
  let [description, trouble] = [chosen.description, null];
  try {
    description = await json(place(), { quiet: true });
    delayMs = POLL_MS;
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    trouble = error;
    delayMs = Math.min(2 * delayMs, SLOWEST_POLL_MS);
  }
  if (mine !== turn) return; // something else was chosen, or asked for, meanwhile
  Object.assign(chosen, { description, trouble });
  changes.dispatchEvent(new Event("described"));
  timer = setTimeout(describe, document.hidden ? SLOWEST_POLL_MS : delayMs);
}

/** The version that answers come from now; null where it is not known. */
export function servedVersion() {
  return chosen.asked ?? chosen.description?.version ?? null;
}

/** Facts can be changed: something is served, and it follows the newest version. */
export function canChange() {
  return chosen.name !== null && chosen.asked === null && chosen.description !== null && !chosen.description.pinned;
}

/** `{data, next, kb_version}` of the facts in which `text` occurs. */
export function findFacts({ text = "", limit = 20, after = null, signal = null, quiet = false }) {
  const query = new URLSearchParams({ limit });
  if (text) query.set("q", text);
  if (after !== null) query.set("after", after);
  return json(`${place()}/facts?${query}`, { signal, quiet });
}

/**
 * A write that every replica shall serve: `{version, isServed, added}`; time running out is no failure of the write.
 */
async function write(path, method, body) {
  let outcome;
  try {
    const done = await json(`${place()}/facts${path}?wait=true&timeout_s=${WAIT_S}`, { method, body });
    outcome = { version: done.kb_version, isServed: true, added: done.added ?? 0 };
  } catch (error) {
    if (error.status !== 503 || error.kbVersion === null) throw error;
    outcome = { version: error.kbVersion, isServed: false, added: 0 };
  }
  chosen.written = Math.max(chosen.written ?? 0, outcome.version);
  await describe();
  return outcome;
}

/** Add a fact, or give `old` another value; `factId` is of the fact that stands then, where it can be told. */
export async function saveFact(fact, old = null) {
  const { entity, property, value, metadata } = fact;
  const row = metadata === null || metadata === undefined ? { entity, property, value } : fact;
  const saved = await write("", "POST", { facts: [row] });
  if (old === null || saved.added === 0 || old.value === value) return { ...saved, factId: old?.fact_id ?? null };
  // A table that holds many values side by side has kept the old one: there, changing is adding and deleting.
  const beside = await factsOf(entity, property);
  const factId = beside.find((other) => other.value === value)?.fact_id ?? null;
  const isKept = beside.some((other) => other.fact_id === old.fact_id && other.value === old.value);
  return { ...(isKept ? await deleteFact(old.fact_id) : saved), factId };
}

async function factsOf(entity, property) {
  const query = new URLSearchParams({ entity, property, limit: 1000 });
  const found = [];
  for (;;) {
    const { data, next } = await json(`${place()}/facts?${query}`);
    found.push(...data);
    if (next === null) return found;
    query.set("after", next);
  }
}

export function deleteFact(factId) {
  return write(`/${encodeURIComponent(factId)}`, "DELETE", null);
}

/** Follow the newest version again. */
export async function unpin() {
  await json(place(), { method: "PUT", body: { uri: chosen.description.uri, version: null } });
  await describe();
}
