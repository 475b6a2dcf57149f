"""The few lines of JavaScript by which the page's table is sorted and filtered; it stands without them."""

STYLE = """
.tools { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: baseline; margin: 0 0 0.75rem; }
.tools input { font: inherit; color: var(--ink); background: var(--panel); border: 1px solid var(--edge);
  border-radius: 0.4rem; padding: 0.35rem 0.7rem; width: min(22rem, 100%); }
.tools output { color: var(--muted); font-size: 0.875rem; }
.cells th button { all: unset; cursor: pointer; white-space: nowrap; }
.cells th button:focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; }
.cells th[aria-sort=ascending] button::after { content: " ▲"; font-size: 0.7em; }
.cells th[aria-sort=descending] button::after { content: " ▼"; font-size: 0.7em; }
.cells details { margin: 0; }
.cells pre { white-space: pre-wrap; width: 24rem; text-align: left; margin: 0.35rem 0; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.cells")) {
  const body = table.tBodies[0], rows = [...body.rows];
  const box = document.getElementById(table.dataset.filter);
  const count = box.parentElement.querySelector("output");
  const show = () => {
    const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.dataset.words;
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  box.addEventListener("input", show);
  show();
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => head.querySelector("button")?.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[place].dataset.value;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === y) return 0;
      if (x === "" || y === "") return x === "" ? 1 : -1;
      const numbers = !isNaN(x) && !isNaN(y);
      const found = numbers ? x - y : x.localeCompare(y);
      return down ? -found : found;
    };
    body.append(...rows.sort(order));
  }));
}
"""
