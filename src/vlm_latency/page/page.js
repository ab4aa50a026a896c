"use strict";
// Tables: a click on a heading sorts by it, a second click turns the order round. Rows without a
// value stay last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const numeric = head.classList.contains("number");
    const value = (row) => row.cells[column].dataset.value;
    const order = (a, b) => numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
    const rows = [...table.tBodies[0].rows].sort((first, second) => {
      const [a, b] = [value(first), value(second)];
      if (a === "" || b === "") return (a === "") - (b === "");
      return down ? order(b, a) : order(a, b);
    });
    table.tBodies[0].append(...rows);
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }));
}
// Figures: a click shows one as large as the window, another click or Escape puts it back.
const lightbox = document.getElementById("lightbox");
for (const button of document.querySelectorAll("button.zoom")) {
  button.addEventListener("click", () => {
    const [shown, figure] = [lightbox.querySelector("img"), button.querySelector("img")];
    shown.src = figure.src;
    shown.alt = figure.alt;
    lightbox.showModal();
  });
}
lightbox.addEventListener("click", () => lightbox.close());
// Commands: a button copies the one beside it, or selects it where the browser does not let us.
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
  });
}
