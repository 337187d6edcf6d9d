// The form that adds a fact or changes one's value, and waits until every replica serves it.

import { saveFact } from "./knowledge.js";
import { make, part, say, tell } from "./parts.js";

/**
 * Open the form in `place`, in place of anything there; of `fact` if one is to be changed, else for a new one, of which
 * `guess` says what the reader may mean.
 * `onSaved({version, isServed}, fact)` follows a write, `onClosed()` any end of the form.
 */
export function openEditor(place, { fact = null, guess = {}, onSaved, onClosed }) {
  const form = make("editor-template");
  const { entity, property, value } = form.elements;
  const what = fact ? `the ${fact.property} of ${fact.entity}` : "a new fact";
  form.setAttribute("aria-label", fact ? `Edit ${what}` : "Add a fact");
  part(form, "save").setAttribute("aria-label", `Save ${what}`);
  if (fact) {
    part(form, "names").remove();
    value.value = fact.value;
  } else {
    entity.value = guess.entity ?? "";
    property.value = guess.property ?? "";
  }

  const close = () => {
    form.remove();
    onClosed();
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (form.getAttribute("aria-busy") === "true") return;
    tell(part(form, "trouble"), "");
    const given = {
      entity: fact ? fact.entity : entity.value.trim(),
      property: fact ? fact.property : property.value.trim(),
      value: value.value.trim(),
      metadata: fact?.metadata ?? null,
    };
    const blank = ["entity", "property", "value"].find((name) => !given[name]);
    if (blank) {
      tell(part(form, "trouble"), `A fact needs ${blank === "entity" ? "an" : "a"} ${blank}.`);
      form.elements[blank].focus();
      return;
    }
    const saved = await save(form, given, fact);
    if (saved === null) return;
    close();
    onSaved(saved, given);
  });
  part(form, "cancel").addEventListener("click", close);
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });

  place.replaceChildren(form);
  (fact || guess.entity ? value : entity).focus();
  if (fact) value.select();
}

/** Write; null after trouble, which the form then shows. */
async function save(form, fact, old) {
  const button = part(form, "save");
  form.setAttribute("aria-busy", "true");
  button.setAttribute("aria-disabled", "true");
  const doing = "Embedding and committing, then waiting until every replica serves it…";
  tell(part(form, "progress"), doing);
  say(doing);
  try {
    return await saveFact(fact, old);
  } catch (error) {
    tell(part(form, "trouble"), error.message);
    return null;
  } finally {
    form.setAttribute("aria-busy", "false");
    button.removeAttribute("aria-disabled");
    tell(part(form, "progress"), "");
  }
}

/** What to tell of a write that stands. */
export function toldOf({ version, isServed }, done = "Saved") {
  return isServed
    ? `${done}. Version ${version} is served.`
    : `${done} as version ${version}; not every replica serves it yet.`;
}
