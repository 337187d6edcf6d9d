// The dialog that asks for a key, and the button that changes or forgets it.

import { key, onKeyNeeded } from "./api.js";
import { byId } from "./parts.js";

export const KEY_NEEDED = "This server answers only those who have a key.";

let asking = null;

/** Ask for a key; resolves to whether there is one to try. Whoever asks meanwhile waits for the same answer. */
function askForKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-reason").textContent = reason;
    byId("key-forget").hidden = !key.get();
    byId("key").value = "";
    dialog.returnValue = "cancel";
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        const given = byId("key").value.trim();
        byId("key").value = "";
        const used = dialog.returnValue === "use" && given !== "";
        if (used) key.set(given);
        byId("key-button").classList.toggle("held", Boolean(key.get()));
        resolve(used);
      },
      { once: true },
    );
    dialog.showModal();
    byId("key").focus();
  });
  return asking;
}

function reasonOf(error) {
  if (error.status === 403) return "The key may ask, but not change anything. This needs an admin key.";
  return key.get() ? "The server does not know this key." : KEY_NEEDED;
}

/** `onChange` is called after the reader gave another key or forgot it. */
export function startKey(onChange) {
  onKeyNeeded((error) => askForKey(reasonOf(error)));
  const held = byId("key-button");
  held.classList.toggle("held", Boolean(key.get()));
  held.addEventListener("click", async () => {
    const before = key.get();
    await askForKey(before ? "A key is in use." : "Without keys, a server answers its own machine only.");
    if (key.get() !== before) onChange();
  });
  byId("key").addEventListener("input", ({ target }) => {
    // What is no visible ASCII cannot stand in a header.
    const isSendable = /^[\x21-\x7e\s]*$/.test(target.value);
    target.setCustomValidity(isSendable ? "" : "A key holds only letters, digits and signs.");
  });
  byId("key-forget").addEventListener("click", () => {
    key.set(null);
    byId("key-dialog").close("cancel");
  });
}
