"use strict";
// Collects the answers of the page as CSV. Nothing leaves the page but the file that the rater saves.
(function () {
  let saved = true;
  function answers() {
    const rows = [["id", "answer"]];
    for (const question of document.querySelectorAll("article")) {
      const chosen = question.querySelector("input:checked") || question.querySelector("textarea");
      const value = chosen ? chosen.value.trim() : "";
      if (value) rows.push([question.id, /^[=+\-@\t\r']/.test(value) ? "'" + value : value]);
    }
    return rows;
  }
  function csv() {
    return answers().map((row) => row.map((v) => '"' + v.replace(/"/g, '""') + '"').join(",")).join("\r\n") + "\r\n";
  }
  function count() {
    saved = false;
    document.getElementById("count").textContent = String(answers().length - 1);
  }
  document.addEventListener("input", count);
  document.getElementById("save").addEventListener("click", function () {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = this.dataset.name + "_answers.csv";
    link.click();
    saved = true;
  });
  window.addEventListener("beforeunload", function (event) {
    if (!saved) event.preventDefault();
  });
  window.saejaxCsv = csv;
})();
