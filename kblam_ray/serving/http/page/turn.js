// One question and its answer on the page: text as it streams, what it rests on, and what went wrong.

import { openEditor, toldOf } from "./editor.js";
import { canChange, chosen, parseModel, servedVersion } from "./knowledge.js";
import { askedFor, button, element, make, nameTools, part, percent, plural, questionAbout, say } from "./parts.js";
import { seconds, showFact, tell } from "./parts.js";

const MARKED_CHARS = 200;

export class Turn {
  /**
   * `messages` is the history with the question last, `settings` what else is asked for.
   * `onAsk(turn, {inPlace, alone})` asks again, `onQuestion(text)` something else; `onAdd(guess)` adds a fact.
   */
  constructor({ question, model, messages, settings }, { onAsk, onQuestion, onAdd }) {
    Object.assign(this, { question, model, messages, settings, onAsk, onQuestion, onAdd });
    this.element = make("turn-template");
    this.part("question").textContent = question;
    this.part("again").addEventListener("click", () => onAsk(this, {}));
    this.part("link").href = `?${new URLSearchParams({ model, q: question })}`;
    this.part("link").setAttribute("aria-label", `Link to the question: ${question}`);
    this.reset();
  }

  part(name) {
    return part(this.element, name);
  }

  /** Before it is asked: nothing is known. */
  reset() {
    Object.assign(this, { text: "", state: "waiting", result: null, isReplaced: false, started: performance.now() });
    clearInterval(this.countdown);
    this.element.className = "turn";
    this.element.setAttribute("aria-busy", "true");
    for (const name of ["answer", "trouble", "chips", "cards"]) this.part(name).replaceChildren();
    for (const name of ["cited", "actions", "changed"]) this.part(name).hidden = true;
    const facts = chosen.description?.num_facts;
    const isGrounded = chosen.name !== null && facts !== undefined && facts !== null;
    tell(this.part("waiting"), isGrounded ? `Attending to ${plural(facts, "fact")}` : "Thinking");
  }

  addText(piece) {
    this.text += piece;
    tell(this.part("waiting"), "");
    this.part("answer").textContent = this.text;
  }

  finish(result) {
    this.settle("done");
    this.result = result;
    this.element.classList.toggle("refused", result.refused);
    if (!this.text) this.part("answer").append(element("span", { text: "(an empty answer)", className: "muted" }));
    this.markValues();
    result.citations.forEach((fact, index) => this.part("cards").append(this.card(fact, index + 1)));
    this.part("cited").hidden = result.citations.length === 0;
    if (result.refused && this.canEdit()) {
      this.tellChange("No fact answers this.", button("Add one", () => this.onAdd(askedFor(this.question)), ""));
    }
    this.update();
    const version = result.kb_version === null ? "" : ` Version ${result.kb_version}.`;
    const cited = result.citations.length ? ` ${plural(result.citations.length, "fact")} cited.` : "";
    say(`${result.refused ? "Refused" : "Answer"}: ${this.text}${version}${cited}`);
  }

  stop() {
    this.settle("stopped");
    this.update();
    say("Stopped.");
  }

  fail(error) {
    this.settle("failed");
    const place = this.part("trouble");
    const again = button("Try again", () => this.onAsk(this, { inPlace: true }));
    tell(place, error.message, again);
    if (error.code === "context_length_exceeded" && this.messages.length > 1) {
      again.textContent = "Ask without the earlier questions";
      again.onclick = null;
      again.replaceWith(button(again.textContent, () => this.onAsk(this, { inPlace: true, alone: true })));
    } else if (error.retryAfter) this.countDown(again, error.retryAfter);
    this.update();
  }

  settle(state) {
    this.state = state;
    this.seconds = (performance.now() - this.started) / 1000;
    this.element.setAttribute("aria-busy", "false");
    tell(this.part("waiting"), "");
    this.part("actions").hidden = state === "failed";
  }

  /** A server that is busy said when to come back. */
  countDown(again, retryAfter) {
    let left = Math.min(retryAfter, 600);
    const show = () => {
      again.disabled = left > 0;
      again.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    };
    show();
    this.countdown = setInterval(() => {
      left -= 1;
      show();
      if (left <= 0) clearInterval(this.countdown);
    }, 1000);
  }

  /** Another answer to the same question stands further down. */
  replace() {
    this.isReplaced = true;
    this.element.classList.add("replaced");
    this.part("changed").hidden = true;
    this.part("again").hidden = false;
    this.update();
  }

  /** Say again what may have changed since: the version served, whether facts can be changed. */
  update() {
    if (this.state === "waiting") return;
    const chips = [];
    const version = this.result?.kb_version ?? null;
    if (version !== null) {
      const now = this.model === chosen.model ? servedVersion() : null;
      const isStale = now !== null && now !== version;
      chips.push([isStale ? `version ${version}, now ${now}` : `version ${version}`, isStale ? "stale" : "version"]);
    }
    if (this.isReplaced) chips.push(["asked again below", "replaced"]);
    if (this.result?.refused) chips.push(["refused", "refused"]);
    if (this.state === "stopped") chips.push(["stopped", "stopped"]);
    if (this.result?.finish_reason === "length") chips.push(["cut short", "stopped"]);
    if (this.state !== "failed") {
      chips.push([seconds(this.seconds), "time"]);
      chips.push([parseModel(this.model).name === null ? "base model alone" : this.settings.grounding, "grounding"]);
    }
    const shown = chips.map(([text, kind]) => element("li", { text, className: kind }));
    this.part("chips").replaceChildren(...shown);
    for (const edit of this.element.querySelectorAll('[data-part="edit"]')) edit.hidden = !this.canEdit();
  }

  canEdit() {
    return canChange() && parseModel(this.model).name === chosen.name;
  }

  /** Mark in the answer what is word for word a cited fact's value, with the number of its card. */
  markValues() {
    const numbers = new Map();
    this.result.citations.forEach(({ value }, index) => {
      if (value && value.length <= MARKED_CHARS && !numbers.has(value)) numbers.set(value, index + 1);
    });
    if (!numbers.size || this.result.refused) return;
    const values = [...numbers.keys()].sort((a, b) => b.length - a.length);
    const escaped = values.map((value) => value.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
    const whole = new RegExp(`(?<![\\p{L}\\p{N}])(${escaped.join("|")})(?![\\p{L}\\p{N}])`, "u");
    const pieces = this.text.split(whole).map((piece, index) => {
      if (index % 2 === 0) return piece;
      const mark = element("mark", { text: piece });
      mark.dataset.number = numbers.get(piece);
      return mark;
    });
    this.part("answer").replaceChildren(...pieces);
  }

  card(fact, number) {
    const card = make("fact-template");
    card.dataset.number = number;
    showFact(card, fact);
    nameTools(card, fact);
    part(card, "share").hidden = false;
    part(card, "bar").style.width = `${Math.min(100, Math.max(0, 100 * fact.score))}%`;
    part(card, "percent").textContent = percent(fact.score);
    part(card, "delete").remove();
    const cited = fact.value;
    const question = questionAbout(fact);
    if (fact.entity === null || question === this.question) part(card, "ask").remove();
    else part(card, "ask").addEventListener("click", () => this.onQuestion(question));
    const edit = part(card, "edit");
    if (fact.entity === null) edit.remove();
    edit.addEventListener("click", () => {
      const [tools, place] = [part(card, "tools"), part(card, "place")];
      tools.hidden = true;
      openEditor(place, {
        fact,
        onClosed: () => {
          tools.hidden = false;
          edit.focus();
        },
        onSaved: (saved, now) => {
          const [before, after] = [element("del", { text: cited }), element("ins", { text: now.value })];
          part(card, "value").replaceChildren(...(now.value === cited ? [cited] : [before, " ", after]));
          fact = { ...fact, ...now, fact_id: saved.factId ?? fact.fact_id };
          const again = button("Ask again", () => this.onAsk(this, {}), "primary");
          this.tellChange(toldOf(saved), again);
          this.part("again").hidden = true;
          again.focus();
        },
      });
    });
    return card;
  }

  /** A note below the answer, with what can be done next. */
  tellChange(text, action) {
    tell(this.part("changed"), text, action);
    say(text);
    this.part("changed").hidden = false;
  }
}
