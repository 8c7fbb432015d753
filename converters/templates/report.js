"use strict";
(() => {
  const table = document.getElementById("tensors");
  if (!table) return;
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const byNumber = heads.map((head) => head.classList.contains("n"));
  const order = new Intl.Collator("en", {numeric: true});
  const place = (row) => Number(row.dataset.i);
  const value = (cell) => {
    const found = cell.dataset.v ?? cell.textContent;
    return found === "" ? -Infinity : Number.isNaN(Number(found)) ? 0 : Number(found);
  };
  const keys = (at) => {
    if (at === 0) return rows.map(place);  // names in the order of the model
    if (byNumber[at]) return rows.map((row) => value(row.cells[at]));
    const texts = rows.map((row) => row.cells[at].textContent);
    const ranks = new Map([...new Set(texts)].sort(order.compare).map((text, rank) => [text, rank]));
    return texts.map((text) => ranks.get(text));
  };
  const sort = (at, down) => {
    const found = keys(at), sign = down ? -1 : 1;
    const keyed = rows.map((row, nth) => [found[nth], place(row), row]);
    keyed.sort((a, b) => (a[0] === b[0] ? a[1] - b[1] : a[0] < b[0] ? -sign : sign));
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[at].setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...keyed.map((entry) => entry[2]));
  };
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.onclick = () => sort(at, head.hasAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : byNumber[at]);
    head.replaceChildren(button);
  });

  const tools = document.querySelector(".tools"), [input, select, shown] = tools.querySelectorAll("input, select, output");
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const kinds = rows.map((row) => row.cells[1].textContent);
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    rows.forEach((row, at) => {
      row.hidden = (select.value && kinds[at] !== select.value) || !words.every((word) => texts[at].includes(word));
      left += !row.hidden;
    });
    shown.textContent = left === rows.length ? `${left.toLocaleString("en")} tensors` : `${left.toLocaleString("en")} of ${rows.length.toLocaleString("en")} tensors`;
  };
  input.oninput = select.onchange = filter;
  tools.hidden = false;
  filter();

  const field = document.querySelector(".field");
  if (!field) return;
  const [low, high, floor] = ["low", "high", "floor"].map((name) => Number(field.dataset[name]));
  const errorAt = heads.findIndex((head) => head.textContent.startsWith("rel. RMS"));
  const points = rows.flatMap((row) => {
    const cell = row.cells[errorAt], error = Number(cell.dataset.v);
    const y = error ? (high - Math.log10(error)) / (high - low) * floor : (floor + 100) / 2;
    return cell.textContent ? [{row, x: (Number(row.dataset.i) + 0.5) / rows.length * 100, y}] : [];
  });
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  field.append(tip);
  const nearest = (event) => {
    const box = field.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null, least = 24 * 24;
    for (const point of points) {
      const away = (point.x / 100 * box.width - x) ** 2 + (point.y / 100 * box.height - y) ** 2;
      if (away < least) [best, least] = [point, away];
    }
    return best;
  };
  field.onpointermove = (event) => {
    const found = nearest(event);
    tip.hidden = !found;
    field.style.cursor = found ? "pointer" : "";
    if (!found) return;
    tip.textContent = `${found.row.cells[0].textContent}: ${found.row.cells[errorAt].textContent}`;
    tip.style.left = `${found.x}%`;
    tip.style.top = `${found.y}%`;
  };
  field.onpointerleave = () => { tip.hidden = true; };
  field.onclick = (event) => {
    const found = nearest(event);
    if (!found) return;
    rows.forEach((row) => row.classList.remove("here"));
    found.row.hidden = false;
    found.row.classList.add("here");
    found.row.scrollIntoView({block: "center"});
  };
})();
