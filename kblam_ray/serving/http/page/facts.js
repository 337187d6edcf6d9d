// The facts of the chosen knowledge base: look them up, page, add, edit, delete.

import { ServerError } from "./api.js";
import { askQuestion, lastQuestion } from "./conversation.js";
import { openEditor, toldOf } from "./editor.js";
import { canChange, chosen, deleteFact, findFacts } from "./knowledge.js";
import { button, byId, make, nameTools, part, plural, questionAbout, showFact, tell } from "./parts.js";

const PAGE = 20;
const LARGEST_PAGE = 100;
const TYPING_MS = 200;

/** What is listed: of which search and version, where the next page begins, and how many facts. */
let listed = { text: null, version: null, next: null, count: 0 };
let looking = null;
let typing;
let showAsk = () => {};

/** List the facts that the search box asks for; or go on where the list ends. */
async function list({ goOn = false, limit = PAGE, quiet = false } = {}) {
  looking?.abort();
  const mine = (looking = new AbortController());
  const text = goOn ? listed.text : byId("search").value.trim();
  let page;
  try {
    page = await findFacts({ text, limit, after: goOn ? listed.next : null, signal: mine.signal, quiet });
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ServerError)) throw error;
    if (!quiet) tell(byId("facts-note"), error.message, button("Try again", () => list({ goOn, limit })));
    return;
  }
  if (mine.signal.aborted) return;
  const rows = page.data.map(row);
  if (goOn) {
    byId("rows").append(...rows);
    rows[0]?.querySelector("button:not([hidden])")?.focus();
  } else byId("rows").replaceChildren(...rows);
  const count = (goOn ? listed.count : 0) + rows.length;
  listed = { text, version: page.kb_version, next: page.next, count };
  byId("more").hidden = page.next === null;
  tell(byId("facts-note"), noteOf(text, count, page.next !== null));
}

function noteOf(text, count, isMore) {
  if (count === 0) return text ? `No fact holds “${text}”.` : "There is no fact yet. Add the first one.";
  if (isMore) return `The first ${plural(count, "fact")}${text ? ` that hold “${text}”` : ""}.`;
  return text ? `${plural(count, "fact")} with “${text}”.` : "";
}

function row(fact) {
  const made = make("fact-template");
  showFact(made, fact);
  nameTools(made, fact);
  const [tools, place] = [part(made, "tools"), part(made, "place")];
  const close = (back) => () => {
    place.replaceChildren();
    tools.hidden = false;
    if (back.isConnected) back.focus();
  };
  part(made, "ask").addEventListener("click", () => {
    showAsk();
    askQuestion(questionAbout(fact), { alone: true });
  });
  part(made, "edit").addEventListener("click", ({ currentTarget }) => {
    tools.hidden = true;
    openEditor(place, { fact, onClosed: close(currentTarget), onSaved: (saved) => afterWrite(saved, "Saved") });
  });
  part(made, "delete").addEventListener("click", ({ currentTarget }) => {
    tools.hidden = true;
    confirmDeletion(place, fact, close(currentTarget));
  });
  showTools(made);
  return made;
}

function showTools(made) {
  for (const name of ["edit", "delete"]) part(made, name).hidden = !canChange();
}

function confirmDeletion(place, fact, close) {
  const group = document.createElement("div");
  group.className = "confirm";
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", `Delete the ${fact.property} of ${fact.entity}?`);
  const keep = button("Keep", close, "");
  const remove = async () => {
    tell(group, "Deleting…");
    try {
      const saved = await deleteFact(fact.fact_id);
      close();
      byId("search").focus();
      await afterWrite(saved, "Deleted");
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      tell(group, error.message, button("Close", close, ""));
    }
  };
  tell(group, "Delete this fact?", button("Delete", remove, "danger"), keep);
  group.addEventListener("keydown", ({ key }) => key === "Escape" && close());
  place.replaceChildren(group);
  keep.focus();
}

/** Show what is there now, and offer to ask again. */
async function afterWrite(saved, done) {
  const told = toldOf(saved, done);
  await list({ limit: Math.min(LARGEST_PAGE, Math.max(PAGE, listed.count)), quiet: true });
  const last = lastQuestion();
  const again = last && button("Ask again", () => (showAsk(), last.again()), "primary");
  if (again) again.setAttribute("aria-label", `Ask again: ${last.question}`);
  tell(byId("facts-note"), told, ...(again ? [again] : []));
  again?.focus();
}

/** Another knowledge base is chosen. */
export function chosenChanged() {
  listed = { text: null, version: null, next: null, count: 0 };
  byId("rows").replaceChildren();
  byId("add-place").replaceChildren();
  byId("add").disabled = false;
  byId("search").value = "";
  byId("more").hidden = true;
  const isNone = chosen.name === null;
  byId("search").hidden = isNone;
  byId("add").hidden = true;
  tell(byId("facts-note"), isNone ? "The base model alone knows no facts. Choose a knowledge base." : "");
  if (!isNone) list({ quiet: true });
}

/** The server has said what it serves: follow it, unless the reader is in the middle of something. */
export function describedChanged() {
  byId("add").hidden = !canChange();
  for (const made of byId("rows").children) showTools(made);
  const version = chosen.description?.version ?? null;
  if (chosen.name === null || version === null || version === listed.version) return;
  const isBusy = byId("rows").querySelector("form, .confirm");
  if (isBusy || listed.count > LARGEST_PAGE) {
    const reload = button("Show them", () => list());
    return tell(byId("facts-note"), `Facts have changed: version ${version} is served.`, reload);
  }
  list({ limit: Math.max(PAGE, listed.count), quiet: true });
}

/** `onAsk()` shows the conversation where only one of the two fits. */
export function startFacts(onAsk) {
  showAsk = onAsk;
  byId("search").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(list, TYPING_MS);
  });
  byId("more").addEventListener("click", () => list({ goOn: true }));
  byId("add").addEventListener("click", () => addFact({}));
}

/** Open the form for a new fact; `guess` holds the entity and property that it may be about. */
export function addFact(guess) {
  byId("add").disabled = true;
  openEditor(byId("add-place"), {
    guess,
    onClosed: () => {
      byId("add").disabled = false;
      byId("add").focus();
    },
    onSaved: (saved) => afterWrite(saved, "Added"),
  });
}
