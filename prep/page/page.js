// Comfort only: a field that narrows the table of rejected images. Without scripts it stays hidden.
for (const field of document.querySelectorAll("[data-filter]")) {
  const rows = [...document.querySelectorAll(`#${field.dataset.filter} tbody tr`)];
  const told = document.getElementById(`${field.dataset.filter}-told`);
  field.closest("label").hidden = false;
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      shown += row.hidden ? 0 : 1;
    }
    told.textContent = wanted ? `${shown} of ${rows.length} rows` : "";
  });
}
