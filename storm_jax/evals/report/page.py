"""Style and script of report.html."""

STYLE = """
:root {
  --text: #1b1f24; --muted: #5f6b7a; --line: #dfe3e8; --page: #f6f7f9; --card: #fff; --accent: #2f6fde;
  --right: #1a7f4b; --wrong: #c2362b; --other: #9a6700; --band: #a9c4f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e4e8ee; --muted: #98a3b3; --line: #333a44; --page: #14171b; --card: #1c2026;
    --accent: #7aa7f7; --right: #55c78a; --wrong: #f1857c; --other: #d9a941; --band: #34517f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1080px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 0; font-size: 1.6rem; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.15rem; }
code { font-size: .88em; overflow-wrap: anywhere; }
.muted { color: var(--muted); }
.headline { margin: 1rem 0 .25rem; font-size: 2.6rem; font-weight: 650; line-height: 1.1; }
.note { padding: .6rem .9rem; border-left: 4px solid var(--other); background: var(--card); }
.counts { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: 0; list-style: none; }
.counts b { font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; background: var(--card); }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
td { font-variant-numeric: tabular-nums; }
tr.total td { font-weight: 600; }
tbody th { padding-top: .9rem; text-align: left; }
.bar { position: relative; width: 220px; height: 14px; background: var(--page); border-radius: 2px; }
.bar i { position: absolute; top: 0; bottom: 0; }
.bar .interval { background: var(--band); border-radius: 2px; }
.bar .value { width: 3px; margin-left: -1.5px; background: var(--accent); }
.bar .chance { width: 0; border-left: 2px dotted var(--muted); }
.bar .ceiling { width: 0; border-left: 2px solid var(--other); }
.legend { margin: .4rem 0; font-size: .85rem; }
.legend .bar { display: inline-block; width: 16px; height: 11px; margin: 0 .3rem 0 1rem; vertical-align: -1px; }
details { margin-top: 1rem; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .5rem 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
form {
  position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center;
  padding: .6rem 0; background: var(--page); border-bottom: 1px solid var(--line);
}
form input[type=search] { flex: 1 1 14rem; }
form input[type=search], form select {
  padding: .35rem .5rem; border: 1px solid var(--line); border-radius: 6px; background: var(--card);
  color: inherit; font: inherit; max-width: 18rem;
}
form label { white-space: nowrap; }
article {
  margin: 1rem 0; padding: .9rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; content-visibility: auto; contain-intrinsic-size: auto 300px;
}
article.still { display: flex; flex-wrap: wrap; gap: 0 1.25rem; }
article.still .questions { flex: 1 1 20rem; }
figure { position: relative; margin: 0 0 .5rem; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 3px; }
figure img.small { image-rendering: pixelated; }
figcaption {
  position: absolute; inset: 0; display: grid; grid-template-columns: repeat(var(--columns), 1fr);
  grid-auto-rows: 1fr;
}
figcaption span {
  display: flex; align-items: flex-end; padding: 0 5px 3px; overflow: hidden; font-size: .68rem;
  color: #fff; text-shadow: 0 0 3px #000, 0 0 2px #000; box-shadow: inset 0 0 0 1.5px var(--card);
}
.question:not([hidden]) ~ .question { margin-top: .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
.question header { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: baseline; font-size: .85rem; }
.question p { margin: .3rem 0; white-space: pre-line; }
.badge { font-weight: 650; color: var(--other); }
.right .badge { color: var(--right); }
.wrong .badge { color: var(--wrong); }
ol { margin: .3rem 0; padding: 0; list-style: none; }
ol li { padding: .05rem .5rem; border-left: 3px solid transparent; }
ol li.key { border-color: var(--right); font-weight: 600; }
ol li.chosen:not(.key) { border-color: var(--wrong); }
li.chosen::after { content: "  \\2190  model"; color: var(--muted); font-weight: 400; font-size: .85em; white-space: pre; }
.reply { font-size: .9rem; }
.reply q { quotes: none; font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
[hidden] { display: none !important; }
"""

SCRIPT = """
const form = document.querySelector("form");
const questions = [...document.querySelectorAll(".question")];
const articles = [...document.querySelectorAll("article")];
const shown = document.querySelector("#shown");
const texts = new Map();
function textOf(question) {
  if (!texts.has(question)) {
    texts.set(question, (question.dataset.video + " " + question.textContent).toLowerCase());
  }
  return texts.get(question);
}
function filter() {
  const words = form.search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const group = form.group.value;
  const statuses = new Set([...form.querySelectorAll("[name=status]:checked")].map((box) => box.value));
  let count = 0;
  for (const question of questions) {
    const matches = statuses.has(question.dataset.status)
      && (!group || question.dataset.groups.split(" ").includes(group))
      && words.every((word) => textOf(question).includes(word));
    question.hidden = !matches;
    count += matches;
  }
  for (const article of articles) {
    article.hidden = !article.querySelector(".question:not([hidden])");
  }
  shown.textContent = `${count.toLocaleString("en")} of ${questions.length.toLocaleString("en")} questions`;
}
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
filter();
"""
