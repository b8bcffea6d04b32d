// Replaces the parts of the page that have changed. Without this file, the page reloads itself.
"use strict";
{
  const every = 10000;
  const pause = document.getElementById("pause");
  const offline = document.getElementById("offline");
  const announce = document.getElementById("announce");
  let paused = false;

  pause.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    if (!paused) update();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) update(); });

  // inUse reports whether the reader has the focus or a selection in a part, which a replacement would take away.
  function inUse(part) {
    const selection = document.getSelection();
    return part.contains(document.activeElement) || (!selection.isCollapsed && selection.containsNode(part, true));
  }

  async function update() {
    if (paused || document.hidden) return;
    let text;
    try {
      const response = await fetch(location.pathname + location.search, { cache: "no-store", redirect: "error" });
      if (!response.ok) throw new Error(String(response.status));
      text = await response.text();
      offline.textContent = "";
    } catch {
      const message = "Failed: credence dashboard does not respond. Does the command still run? What you see is old.";
      if (offline.textContent !== message) offline.textContent = message;
      return;
    }
    const next = new DOMParser().parseFromString(text, "text/html");
    const before = document.getElementById("summary").textContent;
    for (const part of document.querySelectorAll("[id^=part-]")) {
      const found = next.getElementById(part.id);
      if (found && found.innerHTML !== part.innerHTML && !inUse(part)) part.replaceChildren(...found.childNodes);
    }
    const after = document.getElementById("summary").textContent;
    if (before !== after) announce.textContent = "Health: " + after;
    document.title = next.title;
  }
  setInterval(update, every);
}
