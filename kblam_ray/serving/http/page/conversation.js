// The conversation: the question box, the turns so far, and which of them the model is told again.

import { ask, ServerError } from "./api.js";
import { changes, chosen, parseModel } from "./knowledge.js";
import { byId, say } from "./parts.js";
import { Turn } from "./turn.js";

let turns = [];
let running = null;
let addFact = () => {};

/** What the reader has set below the question box; null where that is no number it can be. */
function settings() {
  if (chosen.name === null) return { grounding: "off" };
  if (!byId("composer").checkValidity()) {
    byId("advanced").open = true;
    byId("composer").reportValidity();
    return null;
  }
  const asked = { grounding: byId("grounding").value };
  const selection = byId("selection").value;
  if (selection) asked.selection = selection === "similar" ? `similar:${byId("similar").valueAsNumber}` : selection;
  if (asked.grounding !== "off") asked.max_citations = byId("max-citations").valueAsNumber;
  return asked;
}

/** What was said so far, as chat messages: finished answers of this model that no later one replaces. */
function history() {
  return turns
    .filter((turn) => turn.state === "done" && !turn.isReplaced && turn.model === chosen.model)
    .flatMap((turn) => [
      { role: "user", content: turn.question },
      { role: "assistant", content: turn.text },
    ]);
}

/**
 * Ask, as a new turn at the end. `old` is the turn whose question it is, if it was asked before; a question that is
 * `alone` follows on nothing.
 */
export async function askQuestion(question, { old = null, alone = false } = {}) {
  if (running) return say("An answer is still on its way.");
  const asked = settings();
  if (!question || chosen.model === null || asked === null) return;
  const earlier = alone ? [] : (old?.messages.slice(0, -1) ?? history());
  const messages = [...earlier, { role: "user", content: question }];
  const turn = new Turn(
    { question, model: chosen.model, messages, settings: asked },
    { onAsk: askAgain, onQuestion: (text) => askQuestion(text, { alone: true }), onAdd: addFact },
  );
  turns.push(turn);
  byId("turns").append(turn.element);
  byId("empty").hidden = true;
  byId("fresh").hidden = false;
  await run(turn);
  if (turn.state === "done") old?.replace();
}

async function askAgain(turn, { inPlace = false, alone = false }) {
  if (running) return say("An answer is still on its way.");
  if (!inPlace) return askQuestion(turn.question, { old: turn });
  if (alone) turn.messages = turn.messages.slice(-1);
  turn.reset();
  await run(turn);
}

/** The last question once more. */
export function lastQuestion() {
  const turn = turns.findLast((each) => !each.isReplaced);
  return turn ? { question: turn.question, again: () => askAgain(turn, {}) } : null;
}

async function run(turn) {
  const controller = new AbortController();
  running = { turn, controller };
  setBusy(true);
  show(turn);
  const request = { model: turn.model, messages: turn.messages, temperature: 0, ...turn.settings };
  const served = chosen.description?.version ?? 0;
  // Who has changed a fact sees the change in the next answer, whichever replica gives it.
  if (parseModel(turn.model).asked === null && chosen.name !== null && (chosen.written ?? 0) > served) {
    request.min_kb_version = chosen.written;
  }
  try {
    turn.finish(await ask(request, { signal: controller.signal, onText: (piece) => turn.addText(piece) }));
  } catch (error) {
    if (error.name === "AbortError") turn.stop();
    else if (error instanceof ServerError) turn.fail(error);
    else throw error;
  } finally {
    running = null;
    setBusy(false);
    show(turn);
  }
}

/** Bring a turn into view: all of it, or its beginning where it is long. */
function show(turn) {
  const room = Math.min(byId("conversation").clientHeight, innerHeight - byId("composer").offsetHeight);
  turn.element.scrollIntoView({ block: turn.element.offsetHeight > room ? "start" : "nearest" });
}

function setBusy(isBusy) {
  const hadFocus = [byId("stop"), byId("send"), document.body].includes(document.activeElement);
  byId("stop").hidden = !isBusy;
  byId("send").hidden = isBusy;
  if (hadFocus) (isBusy ? byId("stop") : byId("question")).focus({ preventScroll: true });
}

/** Forget what was asked; an answer on its way is stopped. */
function startAfresh() {
  running?.controller.abort();
  turns = [];
  byId("turns").replaceChildren();
  byId("empty").hidden = false;
  byId("fresh").hidden = true;
  byId("question").focus();
  say("New conversation.");
}

/** Tell the turns that the knowledge base has changed. */
export function updateTurns() {
  for (const turn of turns) turn.update();
}

/** `onAdd(guess)` lets the reader add a fact. */
export function startConversation(onAdd) {
  addFact = onAdd;
  const question = byId("question");
  const submit = () => byId("composer").requestSubmit();
  const grow = () => {
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight + 2}px`;
  };
  question.addEventListener("input", grow);
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (!text) return question.focus();
    // Asked before the server has said which models there are: as soon as it has.
    if (chosen.model === null) return changes.addEventListener("chosen", submit, { once: true });
    if (running || settings() === null) return;
    question.value = "";
    grow();
    askQuestion(text);
  });
  byId("stop").addEventListener("click", () => running?.controller.abort());
  byId("fresh").addEventListener("click", startAfresh);
  new ResizeObserver(() => {
    // On a narrow screen the question box lies over the end of the page.
    document.documentElement.style.scrollPaddingBottom = `${byId("composer").offsetHeight + 16}px`;
    if (turns.length) show(turns.at(-1));
  }).observe(byId("composer"));
  byId("selection").addEventListener("change", ({ target }) => {
    byId("similar-setting").hidden = byId("similar").disabled = target.value !== "similar";
  });
}
