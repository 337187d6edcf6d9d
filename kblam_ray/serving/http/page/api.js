// Speaks with the server: requests with the key, errors as one class, and answers that stream.

const KEY = "kblam-ray-key";
let heldKey = read();

function read() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null; // a browser that forbids storage: the key lives as long as the page
  }
}

export const key = {
  get: () => heldKey,
  set(value) {
    heldKey = value || null;
    try {
      if (heldKey) sessionStorage.setItem(KEY, heldKey);
      else sessionStorage.removeItem(KEY);
    } catch {
      // as in `read`
    }
  },
};

/** What the server refused, or that it could not be reached (`status` 0). */
export class ServerError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null, kbVersion = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter, kbVersion });
  }
}

let askForKey = async () => false;
/** `ask(error)` shows a dialog and resolves to whether there is another key to try. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

async function errorOf(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? {};
  const retryAfter = Number.parseInt(response.headers.get("retry-after"), 10);
  return new ServerError(error.message ?? `The server answered ${response.status} ${response.statusText}`.trim(), {
    status: response.status,
    code: error.code ?? null,
    retryAfter: Number.isFinite(retryAfter) ? retryAfter : null,
    kbVersion: error.kb_version ?? body.kb_version ?? null,
  });
}

/**
 * One request; the response if it is a good one.
 * `quiet` requests are the page's own: they never ask the reader for a key.
 */
async function send(path, { method = "GET", body = null, signal = null, quiet = false } = {}) {
  for (;;) {
    const headers = {};
    if (body !== null) headers["Content-Type"] = "application/json";
    if (heldKey) headers.Authorization = `Bearer ${heldKey}`;
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: body === null ? null : JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(navigator.onLine ? "The server cannot be reached." : "This device is offline.");
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    // Who has no key and is told 403 would not be let in with one: the server has no keys.
    const mayHelp = error.status === 401 || (error.status === 403 && heldKey !== null);
    if (quiet || !mayHelp || !(await askForKey(error))) throw error;
  }
}

/** Whole numbers that JavaScript would round stay as they are written: metadata is sent back as it came. */
function exact(name, value, context) {
  const isRounded = Number.isInteger(value) && !Number.isSafeInteger(value);
  return isRounded && context?.source && JSON.rawJSON ? JSON.rawJSON(context.source) : value;
}

/** One request; the JSON of its answer. */
export async function json(path, options) {
  const response = await send(path, options);
  const text = await response.text();
  try {
    return text ? JSON.parse(text, exact) : null;
  } catch {
    throw new ServerError("The server answered something that is no JSON.", { status: response.status });
  }
}

/** The events of a stream of server-sent events: `{event, data}`. */
async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? "\n\n" : value;
      // A carriage return at the very end may be the first half of a line's end.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          [event, data] = ["message", []];
          continue;
        }
        const colon = line.indexOf(":");
        const field = colon < 0 ? line : line.slice(0, colon);
        const content = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
        if (field === "event") event = content;
        else if (field === "data") data.push(content);
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Ask a question; `onText(piece)` as the answer comes.
 * Resolves to `{kb_version, refused, citations, finish_reason}`.
 */
export async function ask(request, { signal, onText }) {
  const response = await send("v1/chat/completions", { method: "POST", body: { ...request, stream: true }, signal });
  const found = { kb_version: null, refused: false, citations: [], finish_reason: null };
  try {
    for await (const { event, data } of serverEvents(response)) {
      if (data === "[DONE]") return found;
      const chunk = JSON.parse(data, exact);
      if (event === "error" || chunk.error) {
        const error = chunk.error ?? chunk;
        throw new ServerError(error.message ?? "The answer broke off.", { code: error.code ?? null });
      }
      for (const name of ["kb_version", "refused", "citations"]) {
        if (chunk[name] !== undefined && chunk[name] !== null) found[name] = chunk[name];
      }
      const choice = chunk.choices?.[0];
      if (choice?.finish_reason) found.finish_reason = choice.finish_reason;
      if (choice?.delta?.content) onText(choice.delta.content);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection broke off in the middle of the answer.");
  }
  throw new ServerError("The answer broke off before its end.");
}
