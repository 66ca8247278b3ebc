"use strict";
const rows = [...document.querySelectorAll("article")];
const texts = rows.map((row) => row.textContent.toLowerCase());
const search = document.querySelector("#search");
const shown = document.querySelector("#shown");

function show() {
  const only = document.querySelector("input[name=only]:checked").value;
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  rows.forEach((row, i) => {
    const fits = (only === "all" || row.classList.contains("is-" + only)) && words.every((word) => texts[i].includes(word));
    row.hidden = !fits;
    count += fits;
  });
  shown.textContent = `${count} of ${rows.length}`;
}

document.querySelectorAll("input[name=only]").forEach((input) => input.addEventListener("change", show));
search.addEventListener("input", show);
document.querySelector(".controls").hidden = false;
show(); // a reloaded page keeps what was typed
