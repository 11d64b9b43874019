"use strict";
// The table sorts; the problems can be chosen, read token by token, and linked to: #policy=..&seed=..&problem=..&token=..
// Every text goes into the page as text, never as markup.

const PAGE_SIZE = 20;
const $ = (id) => document.getElementById(id);
const json = (id) => JSON.parse($(id).textContent);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// -------------------------------------------------------------------------------------------------------------------
// The table

function setUpTable() {
  const table = $("policies");
  const bodies = [...table.tBodies];
  const flat = make("tbody", { hidden: true });
  table.append(flat);
  const rows = bodies.map((body) => [...body.rows].slice(1));
  let column = null, down = true;

  function value(row) {
    const text = row.cells[column].dataset.v;
    return text === "" ? null : Number(text);
  }
  function sorted(list) {
    if (column === null) return list;
    return [...list].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);  // nothing goes last either way
      return down ? y - x : x - y;
    });
  }
  function arrange() {
    const together = $("keep-groups").checked;
    bodies.forEach((body, place) => {
      body.hidden = !together;
      if (together) body.append(...sorted(rows[place]));
    });
    flat.hidden = together;
    if (!together) flat.append(...sorted(rows.flat()));
  }
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const chosen = Number(button.dataset.column);
    down = chosen === column ? !down : chosen !== 0;
    column = chosen;
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    button.parentElement.setAttribute("aria-sort", down ? "descending" : "ascending");
    arrange();
  });
  $("keep-groups").addEventListener("change", arrange);
  arrange();
}

// -------------------------------------------------------------------------------------------------------------------
// The problems

function setUpProblems() {
  const data = json("data");
  const special = new Set(data.special);
  const cache = new Map();
  const runOf = (place) => {
    if (!cache.has(place)) cache.set(place, json("run-" + place));
    return cache.get(place);
  };
  const greedyPlace = data.runs.findIndex((run) => run.label === "greedy");
  const greedy = greedyPlace < 0 ? null : runOf(greedyPlace);
  const choices = data.runs.filter((run) => run.label !== "greedy" || data.runs.length === 1);
  const SHOWS = greedy
    ? { all: "all", helped: "helped", hurt: "hurt", wrong: "both wrong", right: "both right" }
    : { all: "all", wrong: "wrong", right: "right" };
  const state = { label: null, seed: 0, show: "all", query: "", page: 0, problem: null, token: null };
  let run = null, found = [], pinned = null;

  // A token is its place in the vocabulary.
  const nameOf = (id) => (special.has(id) ? "end" : data.tokens[id] ?? "⟨" + data.ids[id] + "⟩");
  const visible = (id) => {
    if (special.has(id)) return "(end)";
    const text = nameOf(id).replaceAll("\n", "¶");
    return text.trim() === "" ? text.replaceAll(" ", "·") : text;
  };

  function textOf(from, i) {
    if (from.text && from.text[i] !== null) return from.text[i];
    if (from.tokens && data.tokens.length) return pieces(from.tokens[i]).join("");
    return "";
  }

  // What each token adds to the text. Several tokens may be one character between them: the first one gets it.
  function pieces(ids) {
    const out = ids.map((id) => (special.has(id) ? "" : nameOf(id)));
    for (let start = 0; start < ids.length; start++) {
      let end = start;
      while (end < ids.length && out[end].includes("\uFFFD")) end++;
      if (end > start) {
        const whole = data.joined[ids.slice(start, end).join(" ")];
        if (whole !== undefined) out.fill("", start, end), (out[start] = whole);
        start = end;
      }
    }
    return out;
  }

  function outcome(i) {
    const now = run.correct[i] === "1";
    if (!greedy) return now ? "right" : "wrong";
    const before = greedy.correct[i] === "1";
    return now === before ? (now ? "right" : "wrong") : now ? "helped" : "hurt";
  }

  const haystacks = new Map();
  function haystack(i) {
    if (!haystacks.has(i)) {
      const [id, prompt, gold] = data.problems[i];
      const parts = [i + 1, id, prompt, gold, greedy && greedy.answer[i], greedy && textOf(greedy, i)];
      haystacks.set(i, [...parts, run.answer[i], textOf(run, i)].join("\n").toLowerCase());
    }
    return haystacks.get(i);
  }

  function choose() {
    const seeds = data.runs.filter((item) => item.label === state.label);
    if (!seeds.length) return;
    const chosen = seeds.find((item) => (item.seed ?? 0) === state.seed) ?? seeds[0];
    state.seed = chosen.seed ?? 0;
    run = runOf(data.runs.indexOf(chosen));
    haystacks.clear();
    $("policy").value = state.label;
    $("seed").replaceChildren(...seeds.map((item) => make("option", { value: item.seed ?? 0 }, String(item.seed ?? 0))));
    $("seed").value = state.seed;
    $("seed-label").hidden = seeds.length < 2;
    filter();
  }

  function filter() {
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    const counts = { all: data.problems.length };
    found = [];
    data.problems.forEach((_, i) => {
      const kind = outcome(i);
      counts[kind] = (counts[kind] ?? 0) + 1;
      if (state.show !== "all" && kind !== state.show) return;
      if (words.every((word) => haystack(i).includes(word))) found.push(i);
    });
    for (const name of Object.keys(SHOWS)) {
      $("show-" + name).textContent = SHOWS[name] + " " + (counts[name] ?? 0);
    }
    const pages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
    state.page = Math.min(state.page, pages - 1);
    $("found").textContent = found.length === 1 ? "1 problem" : found.length + " problems";
    if (state.problem === null && found.length) state.problem = found[0];
    showList(pages);
    showDetail();
  }

  function showList(pages) {
    const start = state.page * PAGE_SIZE;
    $("list").replaceChildren(
      ...found.slice(start, start + PAGE_SIZE).map((i) => {
        const [, prompt, gold] = data.problems[i];
        const kind = outcome(i);
        const answers = (greedy ? "greedy " + (greedy.answer[i] ?? "none") + " → " : "") + (run.answer[i] ?? "none");
        const button = make(
          "button",
          { type: "button", "data-i": i, "aria-current": i === state.problem ? "true" : null },
          make("span", { class: "prompt" }, (prompt ?? data.problems[i][0]).replaceAll("\n", " ")),
          make("span", { class: "badge " + kind }, SHOWS[kind]),
          make("span", { class: "answers" }, answers + (gold === null || gold === undefined ? "" : " · right: " + gold)),
        );
        return make("li", {}, button);
      }),
    );
    $("page").textContent = "page " + (state.page + 1) + " of " + pages;
    $("back").disabled = state.page === 0;
    $("forth").disabled = state.page >= pages - 1;
    saveHash();
  }

  function answer(from, i) {
    const right = from.correct[i] === "1";
    return make("span", { class: right ? "right" : "wrong" }, (from.answer[i] ?? "no answer") + (right ? " ✓ right" : " ✗ wrong"));
  }

  function showDetail() {
    hideTip(true);
    const i = state.problem;
    if (i === null) return $("detail").replaceChildren(make("p", { class: "caption" }, "No problem to show."));
    const [id, prompt, gold] = data.problems[i];
    const place = found.indexOf(i);
    const step = (text, to) => {
      const button = make("button", { type: "button", disabled: to === undefined }, text);
      button.addEventListener("click", () => open(to, false));
      return button;
    };
    const toList = make("button", { type: "button", class: "to-list" }, "↑ List");
    toList.addEventListener("click", () => $("problems").scrollIntoView());
    const entry = data.runs.find((item) => item.label === run.label && item.seed === run.seed);
    const title = entry.name + (entry.seeds > 1 ? ", seed " + run.seed : "");
    const parts = [
      make(
        "div",
        { class: "step" },
        make("h3", {}, "Problem " + (i + 1) + " of " + data.problems.length),
        toList,
        step("← Previous", place > 0 ? found[place - 1] : undefined),
        step("Next →", found[place + 1]),
      ),
      make("p", { class: "label" }, "Prompt " + id),
      make("p", { class: "text prompt-text" }, (prompt ?? "not at hand").replace(/\n+$/, "")),
    ];
    if (gold !== null && gold !== undefined) parts.push(make("p", { class: "label" }, "Right answer: ", make("b", {}, gold)));
    if (greedy && run !== greedy) {
      parts.push(make("p", { class: "label" }, make("b", {}, "greedy"), ": ", answer(greedy, i)));
      parts.push(make("p", { class: "text" }, textOf(greedy, i)));
    }
    parts.push(make("p", { class: "label" }, make("b", {}, title), ": ", answer(run, i)));
    if (run.votes) parts.push(votes(i));
    else if (run.tokens && data.tokens.length) parts.push(tokens(i), key());
    else parts.push(make("p", { class: "text" }, textOf(run, i)));
    $("detail").replaceChildren(...parts);
    if (state.token !== null) {
      const token = $("detail").querySelector('[data-step="' + state.token + '"][role="button"]');
      if (token) pin(token);
      else state.token = null;
    }
    saveHash();
  }

  function votes(i) {
    return make(
      "ul",
      { class: "votes" },
      ...run.votes[i].map((vote) => make("li", { class: vote !== null && vote === run.answer[i] ? "won" : null }, vote ?? "none")),
    );
  }

  function tokens(i) {
    const box = make("div", { class: "text tokens", role: "group", "aria-label": "Generated text, token by token" });
    const texts = pieces(run.tokens[i]);
    const asked = run.asked ? run.asked[i] ?? {} : {};
    run.tokens[i].forEach((id, step) => {
      const kind = run.kinds[i][step];
      const isEnd = special.has(id);
      if (kind !== "k" && kind !== "f") {
        if (isEnd) box.append(make("span", { class: "tok end" }, " (end)"));
        else box.append(texts[step]);
        return;
      }
      const flipped = kind === "f";
      const text = texts[step];
      const blank = text.trim() === "";
      const shown = isEnd ? "(end)" : blank ? visible(id) : text;
      const was = flipped ? run.student_tokens[i][step] : null;
      const says = flipped ? "asked, took " + visible(id) + " in place of " + visible(was) : "asked, kept " + visible(id);
      const attributes = { class: "tok " + (flipped ? "flipped" : "kept"), "data-step": step };
      if (asked[step]) Object.assign(attributes, { role: "button", tabindex: 0, "aria-label": says });
      else attributes.title = says;
      const inside = flipped ? make("ruby", {}, shown, make("rt", {}, visible(was))) : shown;
      box.append(make("span", attributes, inside));
      if (blank && text.includes("\n")) box.append(text);
    });
    box.addEventListener("pointerover", (event) => event.pointerType === "mouse" && !pinned && showTip(tokenAt(event)));
    box.addEventListener("pointerout", (event) => event.pointerType === "mouse" && !pinned && hideTip());
    box.addEventListener("focusin", (event) => showTip(tokenAt(event)));
    box.addEventListener("focusout", () => hideTip(true));
    box.addEventListener("click", (event) => tokenAt(event) && (pinned === tokenAt(event) ? hideTip(true) : pin(tokenAt(event))));
    box.addEventListener("keydown", (event) => {
      const all = [...box.querySelectorAll('[role="button"]')];
      const at = all.indexOf(tokenAt(event));
      if (at < 0) return;
      if (event.key === "Enter" || event.key === " ") pin(all[at]);
      else if (event.key === "ArrowRight") (all[at + 1] ?? all[at]).focus();
      else if (event.key === "ArrowLeft") (all[at - 1] ?? all[at]).focus();
      else return;
      event.preventDefault();
    });
    return box;
  }

  const tokenAt = (event) => event.target.closest('[role="button"]');

  function key() {
    const item = (sign, text) => make("li", {}, sign, text);
    return make(
      "ul",
      { class: "key" },
      item(make("span", { class: "tok" }, "27"), "not asked"),
      item(make("span", { class: "tok kept" }, "27"), "asked, kept the student's token"),
      item(make("span", { class: "tok flipped" }, "27"), "asked, took another candidate"),
      item(make("span", { class: "was" }, "27"), "the student's own token there"),
      run.asked ? make("li", {}, "Point at or tap an asked token for its candidates.") : null,
    );
  }

  // ---- what was asked

  const number = (value) => (value === null ? "–" : Number(value.toPrecision(4)).toString().replace("-", "−"));

  // Shares of the candidates under the softmax of their scores.
  function shares(scores) {
    const top = Math.max(...scores.map((score) => score ?? -Infinity));
    const powers = scores.map((score) => (score === null ? 0 : Math.exp(score - top)));
    const sum = powers.reduce((a, b) => a + b, 0);
    return powers.map((power) => power / sum);
  }

  function bar(share, text) {
    const fill = make("i", {});
    fill.style.width = (100 * share).toFixed(1) + "%";
    return make("td", {}, make("span", { class: "small", "aria-hidden": "true" }, fill), text);
  }

  function showTip(token) {
    if (!token) return;
    const step = Number(token.dataset.step), i = state.problem;
    const [value, candidates] = run.asked[i][step];
    const chosen = run.tokens[i][step];
    const first = make("p", {});
    if (run.trigger === "always") first.append("asked at every step with a choice");
    else {
      first.append("trigger " + run.trigger + ": ", make("b", {}, number(value)));
      if (typeof run.threshold === "number") first.append(" (asks from " + number(run.threshold) + ")");
    }
    const parts = [first];
    if (candidates.length) {
      const fused = candidates[0].length > 3;
      const columns = [candidates.map((c) => (c[2] === null ? 0 : Math.exp(c[2]))), shares(candidates.map((c) => c[1]))];
      if (fused) columns.push(shares(candidates.map((c) => c[3])));
      const heads = ["token", "student's p", "selector's score", ...(fused ? ["fused score"] : [])];
      const body = candidates.map((candidate, k) =>
        make(
          "tr",
          { class: candidate[0] === chosen ? "chosen" : null },
          make("td", {}, visible(candidate[0]) + (candidate[0] === chosen ? " ✓" : "")),
          bar(columns[0][k], columns[0][k].toFixed(3)),
          bar(columns[1][k], number(candidate[1])),
          fused ? bar(columns[2][k], number(candidate[3])) : null,
        ),
      );
      parts.push(
        make(
          "table",
          {},
          make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))),
          make("tbody", {}, ...body),
        ),
        make("p", { class: "note" }, "✓ taken. Bars of scores: their softmax over the candidates above the floor."),
      );
    } else parts.push(make("p", { class: "note" }, "No candidates: the larger model wrote its own token."));
    const tip = $("tip");
    tip.replaceChildren(...parts);
    tip.hidden = false;
    for (const other of document.querySelectorAll(".tok.open")) other.classList.remove("open");
    token.classList.add("open");
    const at = token.getBoundingClientRect();
    const wide = document.documentElement.clientWidth;
    tip.style.left = "0";
    const left = Math.max(12, Math.min(at.left - 12, wide - tip.offsetWidth - 12));
    const below = at.bottom + tip.offsetHeight + 12 < window.innerHeight || at.top < tip.offsetHeight + 12;
    tip.style.left = left + window.scrollX + "px";
    tip.style.top = (below ? at.bottom + 10 : at.top - tip.offsetHeight - 10) + window.scrollY + "px";
  }

  function pin(token) {
    pinned = token;
    state.token = Number(token.dataset.step);
    showTip(token);
    saveHash();
  }

  function hideTip(unpin = false) {
    if (unpin && pinned) {
      pinned = null;
      if (!opening) state.token = null;
      saveHash();
    }
    $("tip").hidden = true;
    for (const token of document.querySelectorAll(".tok.open")) token.classList.remove("open");
  }

  // ---- the address

  let opening = false;

  function open(i, jump) {
    state.problem = i;
    state.token = null;
    const place = found.indexOf(i);
    if (place >= 0) state.page = Math.floor(place / PAGE_SIZE);
    showList(Math.max(1, Math.ceil(found.length / PAGE_SIZE)));
    showDetail();
    if (jump && window.matchMedia("(max-width: 860px)").matches) $("detail").scrollIntoView({ block: "start" });
    if (jump) $("detail").focus({ preventScroll: true });
  }

  function saveHash() {
    if (opening || !touched) return;
    const parts = new URLSearchParams({ policy: state.label });
    if (state.seed) parts.set("seed", state.seed);
    if (state.show !== "all") parts.set("show", state.show);
    if (state.query) parts.set("q", state.query);
    if (state.problem !== null) parts.set("problem", data.problems[state.problem][0]);
    if (state.token !== null) parts.set("token", state.token);
    history.replaceState(null, "", "#" + parts);
  }

  let touched = false;

  function readHash() {
    const parts = new URLSearchParams(location.hash.slice(1));
    const asked = parts.has("policy") || parts.has("problem");
    opening = true;
    const label = parts.get("policy");
    if (choices.some((item) => item.label === label)) state.label = label;
    state.seed = Number(parts.get("seed") ?? 0);
    state.show = parts.get("show") in SHOWS ? parts.get("show") : "all";
    state.query = parts.get("q") ?? "";
    const i = data.problems.findIndex(([id]) => id === parts.get("problem"));
    state.problem = i < 0 ? null : i;
    state.token = parts.has("token") ? Number(parts.get("token")) : null;
    state.page = 0;
    $("query").value = state.query;
    const radio = document.querySelector('#show input[value="' + state.show + '"]');
    radio.checked = true;
    choose();
    if (i >= 0 && found.includes(i) && state.page !== Math.floor(found.indexOf(i) / PAGE_SIZE)) {
      state.page = Math.floor(found.indexOf(i) / PAGE_SIZE);
      showList(Math.ceil(found.length / PAGE_SIZE));
    }
    opening = false;
    if (asked) {
      touched = true;
      $("problems").scrollIntoView();
      if (pinned) showTip(pinned);
    }
  }

  // ---- listeners

  for (const [title, labels] of data.groups) {
    const group = make("optgroup", { label: title });
    for (const label of new Set(labels)) {
      const item = choices.find((choice) => choice.label === label);
      if (item) group.append(make("option", { value: label }, item.name));
    }
    if (group.children.length) $("policy").append(group);
  }
  for (const name of Object.keys(SHOWS)) {
    const input = make("input", { type: "radio", name: "show", value: name, checked: name === "all" });
    $("show").append(make("label", {}, input, make("span", { id: "show-" + name })));
  }
  const change = (event, update) => {
    touched = true;
    update(event.target.value);
    state.page = 0;
    state.token = null;
  };
  $("policy").addEventListener("change", (e) => (change(e, (value) => (state.label = value)), choose()));
  $("seed").addEventListener("change", (e) => (change(e, (value) => (state.seed = Number(value))), choose()));
  $("show").addEventListener("change", (e) => (change(e, (value) => (state.show = value, state.problem = null)), filter()));
  $("query").addEventListener("input", (e) => (change(e, (value) => (state.query = value)), filter()));
  $("back").addEventListener("click", () => (state.page--, showList(Math.ceil(found.length / PAGE_SIZE))));
  $("forth").addEventListener("click", () => (state.page++, showList(Math.ceil(found.length / PAGE_SIZE))));
  $("list").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    touched = true;
    if (button) open(Number(button.dataset.i), true);
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip(true));
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("#tip, [role=button]")) hideTip(true);
  });
  window.addEventListener("resize", () => hideTip(true));
  window.addEventListener("hashchange", readHash);

  const local = choices.find((item) => item.label === "s2t-local:always") ?? choices.find((item) => item.label.startsWith("s2t-local"));
  state.label = (local ?? choices[0]).label;
  readHash();
}

setUpTable();
if ($("problems")) setUpProblems();
