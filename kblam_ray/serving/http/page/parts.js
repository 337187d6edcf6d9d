// Small things that the other modules build the page from. Text of the server enters the document as text only.

const LONG_TEXT = 400;
const WIDE_TEXT = 24;

export const byId = (id) => document.getElementById(id);

/** A copy of a template's element. */
export const make = (template) => byId(template).content.firstElementChild.cloneNode(true);

/** The part of an element that a template names. */
export const part = (element, name) => element.querySelector(`[data-part="${name}"]`);

/** A new element with text and children. */
export function element(tag, { text = null, className = null, children = [] } = {}) {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export function button(text, onClick, className = "quiet") {
  const made = element("button", { text, className });
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

/** Fill an element with text, or empty it. */
export function tell(place, text, ...children) {
  place.replaceChildren(...(text ? [element("span", { text })] : []), ...children);
}

let saying;
/** Have a screen reader say it once the current sentence is over. */
export function say(text) {
  clearTimeout(saying);
  byId("said").textContent = "";
  // The same sentence twice is only noticed as a change from nothing.
  saying = setTimeout(() => (byId("said").textContent = text), 60);
}

export const count = (number) => number.toLocaleString("en");

export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

export function seconds(value) {
  return `${value.toFixed(value < 0.995 ? 2 : value < 9.95 ? 1 : 0)} s`;
}

export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${share < 0.0995 ? (100 * share).toFixed(1) : Math.round(100 * share)} %`;
}

export const questionAbout = (fact) => `What is the ${fact.property} of ${fact.entity}?`;

/** Show a text; a very long one is cut and can be unfolded. */
export function showLong(place, text) {
  if (text.length <= LONG_TEXT) {
    place.textContent = text;
    return;
  }
  place.textContent = `${text.slice(0, LONG_TEXT)}… `;
  place.append(button(`Show all ${count(text.length)} characters`, () => (place.textContent = text)));
}

/** Metadata as an object; the server gives JSON text. */
function metadataOf(fact) {
  if (typeof fact.metadata !== "string") return fact.metadata ?? {};
  try {
    return JSON.parse(fact.metadata) ?? {};
  } catch {
    return { metadata: fact.metadata };
  }
}

function isLink(text) {
  return /^https?:\/\/\S+$/i.test(text) && URL.canParse(text);
}

/** Fill the parts of a fact's template: property, entity, value and metadata. */
export function showFact(place, fact) {
  part(place, "property").textContent = fact.property ?? "";
  part(place, "entity").textContent = fact.entity ?? `fact ${fact.fact_id}`;
  showLong(part(place, "value"), fact.value ?? "");
  place.classList.toggle("wide", (fact.value ?? "").length > WIDE_TEXT);
  const list = part(place, "metadata");
  for (const [name, given] of Object.entries(metadataOf(fact))) {
    const text = typeof given === "string" ? given : JSON.stringify(given);
    const shown = element("dd");
    shown.dir = "auto";
    if (isLink(text)) {
      const link = element("a", { text });
      Object.assign(link, { href: text, target: "_blank", rel: "noopener noreferrer" });
      shown.append(link);
    } else showLong(shown, text);
    list.append(element("div", { children: [element("dt", { text: name }), shown] }));
  }
  list.hidden = list.childElementCount === 0;
}

/** The entity and property that a plain question asks for; nothing where it is none. */
export function askedFor(question) {
  const found = /^what(?: is|'s|’s) the (.+) of (?:the )?(.+?)\s*\?*$/i.exec(question.trim());
  return found ? { property: found[1], entity: found[2] } : {};
}

/** Name a control for those who do not see what it stands beside. */
export function nameTools(place, fact) {
  const name = `${fact.property ?? ""} of ${fact.entity ?? `fact ${fact.fact_id}`}`;
  part(place, "ask").setAttribute("aria-label", `Ask about ${name}`);
  part(place, "edit").setAttribute("aria-label", `Edit ${name}`);
  part(place, "delete").setAttribute("aria-label", `Delete ${name}`);
}
