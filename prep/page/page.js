// Comfort only: without scripts all is there to be read.
// A field that narrows a table stays hidden.
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

// A reference over its target: without scripts the two stand side by side.
for (const stage of document.querySelectorAll("[data-slider]")) {
  const range = stage.querySelector("input");
  const show = () => {
    stage.style.setProperty("--at", `${range.value}%`);
    range.setAttribute("aria-valuetext", `${range.value}% reference`);
  };
  const follow = (event) => {
    const { left, width } = stage.getBoundingClientRect();
    range.value = (100 * (event.clientX - left)) / width;
    show();
  };
  range.hidden = false;
  stage.closest(".slider").classList.add("live");
  range.addEventListener("input", show);
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    follow(event);
  });
  stage.addEventListener("pointermove", (event) => stage.hasPointerCapture(event.pointerId) && follow(event));
  stage.addEventListener("pointerup", () => range.focus({ preventScroll: true }));
  show();
}
for (const hint of document.querySelectorAll(".hint")) hint.hidden = false;
