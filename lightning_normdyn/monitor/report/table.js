for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => {
      const cell = row.cells[column];
      return cell.classList.contains("number") ? parseFloat(cell.dataset.number ?? "NaN") : cell.textContent;
    };
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (typeof x === "number") {
        // What is missing comes last, either way.
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return up ? x - y : y - x;
      }
      return (up ? 1 : -1) * x.localeCompare(y, undefined, {numeric: true});
    };
    body.append(...[...body.rows].sort(order));
  }));
}
