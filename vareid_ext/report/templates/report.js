"use strict";
const form = document.getElementById("filters");
const rows = [...document.querySelectorAll("article.query")];
function filter() {
  const chosen = new FormData(form);
  for (const row of rows) {
    row.hidden = ["view", "camera", "outcome"].some((name) => chosen.get(name) && chosen.get(name) !== row.dataset[name]);
  }
  document.body.classList.toggle("show-activation", chosen.has("activation"));
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("shown").textContent = `${shown} of ${rows.length} queries shown`;
}
form.addEventListener("change", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
filter();
