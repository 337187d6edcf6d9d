// Leafing through the questions: filters, ten at a time. All text is set as text, never as markup.
"use strict";

const STEP = 10;

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function chooser(label, options) {
  const select = element("select");
  for (const [value, text] of options) {
    const option = element("option", "", text);
    option.value = value;
    select.append(option);
  }
  return { select, field: element("label", "", label, select) };
}

function key(system) {
  const made = element("span", "swatch");
  made.style.borderTopColor = `var(--ink-${system.role})`;
  made.style.borderTopStyle = system.line;
  return made;
}

function answerRow(system, answer, isChosen) {
  const mark = answer.is_right === null ? "" : answer.is_right ? "✓" : "✗";
  const verdict = element("span", answer.is_right ? "right" : "wrong", mark);
  if (mark) verdict.title = answer.is_right ? "right" : "wrong";
  let said = answer.text;
  if (said === null) said = answer.place === null ? "" : `ranks the fact number ${answer.place.toLocaleString("en")}`;
  else if (said === "") said = "(nothing)";
  const text = element("span", "said", said);
  if (answer.refused) text.append(" ", element("span", "tag", "refused"));
  const who = element("span", "who", system.name);
  return element("div", isChosen ? "answer chosen" : "answer", verdict, key(system), who, text);
}

function questionOf(data, question, chosen) {
  const tags = element("div", "tags", element("span", "tag", question.kind));
  if (question.reason) tags.append(element("span", "tag", question.reason));
  tags.append(element("span", "", question.where));
  const made = element("article", "question", tags);
  for (const turn of question.before) made.append(element("p", "turn", turn));
  made.append(element("p", "asked", question.question));
  const wanted = element("p", "wanted");
  if (question.should_answer === false) wanted.append("wanted: ", element("b", "", "a refusal"));
  else if (question.wanted.length) wanted.append("wanted: ", element("b", "", question.wanted.join("; ")));
  made.append(wanted);
  const answers = element("div", "answers");
  data.systems.forEach((system, at) => {
    const answer = question.answers[at];
    if (answer && (answer.text !== null || answer.place !== null)) answers.append(answerRow(system, answer, at === chosen));
  });
  made.append(answers);
  return made;
}

function leaf(card) {
  const data = JSON.parse(card.querySelector("script.questions").textContent);
  const place = card.querySelector(".leaf");
  const kinds = [...new Set(data.questions.map((question) => question.kind))];
  const places = [...new Set(data.questions.map((question) => question.where))];
  const kind = chooser("kind of question", [["", "all"], ...kinds.map((name) => [name, name])]);
  const where = chooser("knowledge base", [["", "all"], ...places.map((name) => [name, name])]);
  const way = chooser("way of answering", data.systems.map((system, at) => [String(at), system.name]));
  const verdict = chooser("its answer", [["", "right or wrong"], ["right", "right"], ["wrong", "wrong"]]);
  const search = element("input");
  search.type = "search";
  const controls = element("div", "controls", kind.field);
  if (places.length > 1) controls.append(where.field);
  controls.append(way.field, verdict.field, element("label", "", "with the words", search));
  const count = element("p", "soft");
  count.setAttribute("role", "status");
  const list = element("div");
  const more = element("button", "", "Show more");
  more.type = "button";
  let shown = STEP;

  function fits(question) {
    if (kind.select.value && question.kind !== kind.select.value) return false;
    if (where.select.value && question.where !== where.select.value) return false;
    const answer = question.answers[way.select.value];
    if (verdict.select.value) {
      if (!answer || answer.is_right !== (verdict.select.value === "right")) return false;
    }
    const wanted = search.value.trim().toLowerCase();
    if (!wanted) return true;
    return [question.question, ...question.wanted, answer?.text ?? ""].join("\n").toLowerCase().includes(wanted);
  }

  function show() {
    const chosen = Number(way.select.value);
    const found = data.questions.filter(fits);
    count.textContent = `${Math.min(shown, found.length)} of ${found.length} shown`;
    list.replaceChildren(...found.slice(0, shown).map((question) => questionOf(data, question, chosen)));
    more.hidden = shown >= found.length;
  }

  for (const control of [kind.select, where.select, way.select, verdict.select, search]) {
    control.addEventListener("input", () => {
      shown = STEP;
      show();
    });
  }
  more.addEventListener("click", () => {
    shown += 2 * STEP;
    show();
  });
  place.append(controls, count, list, more);
  place.hidden = false;
  show();
}

for (const card of document.querySelectorAll(".browser")) leaf(card);
