// Starts the page: the chooser of knowledge bases, the state of the chosen one, notices, and links with a question.

import { ServerError } from "./api.js";
import { askQuestion, startConversation, updateTurns } from "./conversation.js";
import { addFact, chosenChanged, describedChanged, startFacts } from "./facts.js";
import { KEY_NEEDED, startKey } from "./key.js";
import { changes, choose, chosen, describe, findFacts, listModels } from "./knowledge.js";
import { parseModel, servedVersion, unpin } from "./knowledge.js";
import { button, byId, count, element, plural, questionAbout, seconds, tell } from "./parts.js";

const NUM_EXAMPLES = 3;
let isExampled = false;
let linkTrouble = null;
let isLinkAsked = false;

/** Which of the two panes a narrow screen shows. */
function show(view) {
  document.body.dataset.view = view;
  byId("view-ask").setAttribute("aria-pressed", view === "ask");
  byId("view-facts").setAttribute("aria-pressed", view === "facts");
}

/** Fill the chooser; `wanted` is chosen if there is such a model, and the first knowledge base else. */
async function fillChooser(wanted, { quiet = false } = {}) {
  const models = await listModels({ quiet });
  // A version is not listed; what is chosen stays chosen, and its notice says if it is gone.
  if (wanted && !models.includes(wanted) && (quiet || parseModel(wanted).asked !== null)) models.push(wanted);
  const select = byId("model");
  const options = models.map((model) => {
    const { base, name, asked } = parseModel(model);
    const option = element("option", { text: name === null ? `no knowledge base (${base})` : name });
    if (asked !== null) option.textContent = `${name}, version ${asked}`;
    option.value = model;
    return option;
  });
  options.sort((a, b) => (parseModel(a.value).name === null) - (parseModel(b.value).name === null));
  select.replaceChildren(...options);
  select.disabled = models.length === 0;
  const isThere = wanted && models.includes(wanted);
  select.value = isThere ? wanted : (options[0]?.value ?? "");
  if (select.value && select.value !== chosen.model) choose(select.value);
  else describe();
  return isThere || !wanted;
}

async function start() {
  const link = new URLSearchParams(location.search);
  const wanted = link.get("model");
  tell(byId("notice"), "");
  try {
    const isThere = await fillChooser(wanted);
    linkTrouble = isThere ? null : `There is no model ${wanted} here; another one is chosen.`;
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    byId("notice").className = "notice bad";
    if (error.status === 401) return tell(byId("notice"), KEY_NEEDED, button("Enter a key", start));
    return tell(byId("notice"), error.message, button("Try again", start));
  }
  const question = link.get("q")?.trim();
  if (question && !isLinkAsked) askQuestion(question);
  isLinkAsked = true;
}

/** Questions that the knowledge base can answer, made of facts that it holds. */
async function showExamples() {
  if (isExampled || !chosen.description?.num_facts) return;
  isExampled = true;
  const mine = chosen.name;
  const { data } = await findFacts({ limit: 50, quiet: true }).catch(() => ({ data: [] }));
  if (mine !== chosen.name) return;
  const short = data.filter((fact) => fact.value.length < 60 && questionAbout(fact).length < 80);
  // Different properties show more of what is there than the first few facts.
  const varied = [...new Map(short.map((fact) => [fact.property, fact])).values(), ...short];
  const questions = [...new Set(varied.map(questionAbout))].slice(0, NUM_EXAMPLES);
  const items = questions.map((question) =>
    element("li", { children: [button(question, () => askQuestion(question), "example")] }),
  );
  byId("example-list").replaceChildren(...items);
  byId("examples").hidden = items.length === 0;
}

/** What the reader must know about the state of things: text, kind and a button, or null. */
function noticeOf() {
  const { name, asked, description, trouble } = chosen;
  const nothing = linkTrouble && [linkTrouble, ""];
  if (name === null) return nothing;
  if (trouble?.status === 404) {
    return [`The knowledge base ${name} is not served any more.`, "bad", ["Choose another", start]];
  }
  if (trouble?.status === 401) return [KEY_NEEDED, "bad", ["Enter a key", start]];
  if (trouble) {
    const known = description ? " Shown is what was last known." : "";
    return [`${trouble.message}${known}`, "bad", ["Try again", describe]];
  }
  const { status, version, latest_version: latest, pinned, error } = description;
  const because = error ? ` (${error})` : "";
  if (status === "failed") return [`${name} cannot be served${because}.`, "bad"];
  if (status === "loading" && version === null) return [`${name} is being loaded…`, ""];
  if (status === "unreachable") {
    return [`The table of ${name} cannot be reached${because}. Version ${version} goes on answering.`, "warn"];
  }
  if (asked !== null && asked !== version) {
    return [`Asking version ${asked}. The facts listed are those of version ${version}.`, ""];
  }
  if (pinned) {
    const newest = latest !== null && latest > version ? ` The newest is ${latest}.` : "";
    const text = `Pinned at version ${version}: its facts cannot be changed.${newest}`;
    return [text, "warn", ["Follow the newest", follow]];
  }
  return nothing;
}

async function follow() {
  try {
    await unpin();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    tell(byId("notice"), error.message, button("Try again", follow));
  }
}

let noticed = null;
function showState() {
  const { name, description } = chosen;
  const [text, kind, action] = noticeOf() ?? ["", ""];
  // A live region speaks at every change: the same notice is left alone.
  if (noticed !== text) {
    noticed = text;
    byId("notice").className = `notice ${kind}`;
    tell(byId("notice"), text, ...(action ? [button(...action)] : []));
  }
  byId("state").hidden = name === null || description === null;
  byId("served").textContent = "";
  if (name === null || description === null) return;
  const { version, latest_version: latest, num_facts: facts, lag_s: lag } = description;
  const isBehind = latest !== null && version !== null && latest > version && !description.pinned;
  byId("state-version").textContent = version ?? "none yet";
  byId("state-latest").textContent = latest ?? "unknown";
  byId("state-facts").textContent = facts === null ? "unknown" : count(facts);
  byId("state-lag").textContent = isBehind || lag > 0 ? seconds(lag) : "none";
  byId("state").classList.toggle("behind", isBehind);
  byId("served").dataset.status = chosen.trouble ? "failed" : description.status;
  if (version !== null) byId("served").textContent = `version ${servedVersion()} · ${plural(facts ?? 0, "fact")}`;
  if (facts) {
    byId("lead").textContent =
      `It attends to all ${plural(facts, "fact")} of ${name} at once and shows which of them its answer rests on.`;
  }
}

function startStates() {
  changes.addEventListener("chosen", () => {
    isExampled = false;
    byId("examples").hidden = true;
    byId("grounding-setting").hidden = byId("advanced").hidden = chosen.name === null;
    [noticed, linkTrouble] = [null, null];
    chosenChanged();
    updateTurns();
    if (chosen.name === null || chosen.description === null) {
      byId("state").hidden = true;
      byId("served").textContent = "";
      tell(byId("notice"), "");
    }
  });
  changes.addEventListener("described", () => {
    showState();
    describedChanged();
    updateTurns();
    showExamples();
  });
  byId("model").addEventListener("change", ({ target }) => choose(target.value));
  byId("view-ask").addEventListener("click", () => show("ask"));
  byId("view-facts").addEventListener("click", () => show("facts"));
  for (const event of ["online", "offline"]) addEventListener(event, describe);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden || chosen.model === null) return;
    fillChooser(chosen.model, { quiet: true }).catch(describe);
  });
}

startStates();
startConversation((guess) => {
  show("facts");
  addFact(guess);
});
startFacts(() => show("ask"));
startKey(() => (chosen.model === null ? start() : describe()));
start();
