"use strict";
// Puts in place of each section what the server sends; what the reader has opened, focused or scrolled stays so.
(() => {
  const link = document.getElementById("link");
  const say = (text, style) => { if (link.textContent !== text) { link.textContent = text; } link.className = style; };
  const place = (html) => {
    const fresh = new DOMParser().parseFromString(html, "text/html").body.firstElementChild;
    const old = fresh && document.getElementById(fresh.id);
    if (!old) { return; }
    const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
    for (const seen of old.querySelectorAll("details[open], .scroll")) {
      const same = seen.id && fresh.querySelector("#" + CSS.escape(seen.id));
      if (same && seen.open) { same.open = true; }
      if (same) { same.dataset.left = seen.scrollLeft; }
    }
    // What is read aloud has to stay in the document: a live region that is new says nothing.
    for (const name of fresh.getAttributeNames()) { old.setAttribute(name, fresh.getAttribute(name)); }
    old.replaceChildren(...fresh.childNodes);
    for (const moved of old.querySelectorAll("[data-left]")) { moved.scrollLeft = moved.dataset.left; }
    if (focused) { document.getElementById(focused)?.focus({ preventScroll: true }); }
  };
  const source = new EventSource("events");
  let again = 0;
  const follow = (from) => {
    from.onopen = () => say("Live", "good");
    from.onmessage = (event) => {
      const sent = JSON.parse(event.data);
      for (const html of Object.values(sent.sections)) { place(html); }
      document.title = sent.title;
      say("Live", "good");
    };
    from.onerror = () => {
      say("Not connected: what is shown may be old", "bad");
      if (from.readyState === EventSource.CLOSED) {
        clearTimeout(again);
        again = setTimeout(() => follow(new EventSource("events")), 3000);
      }
    };
  };
  follow(source);
})();
