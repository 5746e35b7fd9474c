"use strict";
const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B9A82B"];
const OTHERS = "#8a8f96";

function megabytes(bytes) {
  const size = bytes / 1e6;
  return size.toLocaleString("en", { minimumFractionDigits: size >= 1000 ? 0 : size >= 10 ? 1 : 3, maximumFractionDigits: size >= 1000 ? 0 : size >= 10 ? 1 : 3 });
}

function element(name, attributes = {}, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.addEventListener("click", value); else made.setAttribute(key, value);
  }
  made.append(...content);
  return made;
}

function head(table, columns, sort, change) {
  const row = element("tr");
  for (const [key, text, kind] of columns) {
    const attributes = { scope: "col" };
    if (kind) attributes.class = kind;
    if (sort && sort.key === key) attributes["aria-sort"] = sort.down ? "descending" : "ascending";
    row.append(element("th", attributes, change ? element("button", { type: "button", onclick: () => change(key) }, text) : text));
  }
  table.tHead.replaceChildren(row);
}
