// Returns what is wrong with the page for people who use a keyboard, a screen reader or a narrow window.
(() => {
  const wrong = [];
  const say = (what, element) => wrong.push(what + (element ? ": " + element.outerHTML.slice(0, 120) : ""));
  const all = (selector) => [...document.querySelectorAll(selector)];
  const nameOf = (e) => (e.getAttribute("aria-label") || (e.labels && [...e.labels].map((l) => l.textContent).join(" ")) || e.textContent).trim();

  if (document.documentElement.lang !== "en") say("no language");
  if (!document.title.trim()) say("no title");
  for (const [selector, count] of [["body > header", 1], ["main", 1], ["body > footer", 1], ["h1", 1], ["[role=status]", 1], ["script", 1], ["link[rel=stylesheet]", 1]])
    if (all(selector).length !== count) say(`${all(selector).length} of ${selector}, want ${count}`);
  for (const e of all("nav, section, form[role=search]"))
    if (!e.getAttribute("aria-label") && !document.getElementById(e.getAttribute("aria-labelledby"))) say("landmark without a name", e);
  if (new Set(all("nav").map(nameOf)).size !== all("nav").length) say("two navigations have one name");

  const ids = all("[id]").map((e) => e.id);
  if (new Set(ids).size !== ids.length) say("an id occurs twice");
  for (const a of all("a[href^='#']")) if (!document.getElementById(a.getAttribute("href").slice(1))) say("link without a target", a);

  let level = 0;
  for (const h of all("h1, h2, h3, h4")) {
    if (+h.tagName[1] > level + 1) say("heading skips a level", h);
    level = +h.tagName[1];
  }
  for (const e of all("a, button, input, [tabindex='0']")) if (!nameOf(e)) say("control without a name", e);
  for (const e of all("button, input, nav a")) {
    const box = e.getBoundingClientRect();
    const label = e.closest("label")?.getBoundingClientRect();
    if (!e.hidden && Math.max(box.height, label?.height ?? 0) < 24) say("target lower than 24 pixels", e);
  }
  for (const table of all("table")) {
    const heads = table.querySelectorAll("thead th[scope=col]").length;
    if (heads === 0) say("table without headers", table);
    if (!table.caption && !table.previousElementSibling?.matches("h3")) say("table without a caption", table);
    for (const row of table.tBodies[0].rows) {
      if (row.cells.length !== heads) say("row with other cells than headers", row);
      if (row.querySelectorAll("th[scope=row]").length !== 1) say("row without a header", row);
      for (const cell of row.cells) if (!cell.dataset.label) say("cell without a label for narrow windows", cell);
    }
  }
  for (const e of all("*")) {
    for (const attribute of e.attributes) if (/^on|^style$/.test(attribute.name)) say("attribute " + attribute.name, e);
    if (e.closest("svg") === null && e.matches("img, iframe, object, embed, style, base")) say("unexpected element", e);
  }
  for (const svg of all("svg")) if (svg.getAttribute("aria-hidden") !== "true") say("image without an alternative", svg);
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) {
    say(`page of ${document.documentElement.scrollWidth} pixels in a window of ${width}`);
    const wide = all("body *").find((e) => e.getBoundingClientRect().right > width + 1 && !e.closest(".hidden, thead, .skip"));
    if (wide) say("too wide", wide);
  }
  for (const cell of all("td, tbody th, dd, li")) if (cell.scrollWidth > cell.clientWidth + 1 && !cell.closest(".hidden")) say("text beyond its cell", cell);
  if (/[\p{Cc}\p{Cf}]/u.test(document.body.textContent.replaceAll("\n", ""))) say("characters that nobody sees");
  if (window.attacked) say("a text from the cluster became a script");

  // Contrast, as in WCAG 2.2, section 1.4.3.
  const channels = (text) => text.match(/[\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = channels(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || e.closest(".hidden, .skip, script, noscript, [hidden]")) continue;
    texts++;
    const [a, b] = [luminance(channels(getComputedStyle(e).color)), luminance(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) say(`contrast ${ratio.toFixed(2)}`, e);
  }
  if (texts < 20) say(`only ${texts} texts`);
  return wrong;
})();
