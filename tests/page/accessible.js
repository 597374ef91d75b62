// What an accessibility checker finds: a list of sentences, empty if all is well.
() => {
  const wrong = [];
  const check = (good, what, element) => { if (!good) { wrong.push(`${what}: ${element.outerHTML.slice(0, 120)}`); } };
  const all = (selector) => [...document.querySelectorAll(selector)];
  const named = (element) => {
    const by = element.getAttribute("aria-labelledby");
    const text = by ? document.getElementById(by)?.textContent : element.getAttribute("aria-label");
    return Boolean((text || "").trim());
  };
  check(document.documentElement.lang, "no language", document.documentElement);
  check(document.title.trim(), "no title", document.head);
  for (const one of ["main", "header", "footer", "h1"]) {
    check(all(one).length === 1, `not one <${one}>`, document.body.firstElementChild);
  }
  const ids = all("[id]").map((element) => element.id);
  check(new Set(ids).size === ids.length, "an id twice", document.body.firstElementChild);
  let level = 0;
  for (const heading of all("h1, h2, h3, h4, h5, h6")) {
    check(Number(heading.tagName[1]) <= level + 1, "a level of headings is left out", heading);
    level = Number(heading.tagName[1]);
  }
  for (const section of all("section, [role=region], [role=img]")) { check(named(section), "no name", section); }
  for (const svg of all("svg")) {
    check(svg.getAttribute("role") === "img" || svg.closest("[aria-hidden=true]"), "a picture without a role", svg);
  }
  for (const table of all("table")) {
    check(table.caption?.textContent.trim(), "no caption", table);
    for (const head of table.querySelectorAll("th")) { check(head.scope, "no scope", head); }
    for (const row of table.tBodies[0].rows) { check(row.querySelector("th[scope=row]"), "no head of the row", row); }
    check(table.parentElement.tabIndex === 0, "cannot be scrolled by keyboard", table);
  }
  for (const link of all("a, button, summary")) { check(link.textContent.trim(), "says nothing", link); }
  for (const element of all("*")) {
    for (const attribute of element.getAttributeNames()) {
      check(!/^on/.test(attribute), "an inline handler", element);
      check(attribute !== "style", "an inline style", element);
      if (attribute === "src" || attribute === "href" || attribute === "action") {
        check(!/^[a-z]+:(?!,)|^\/\//.test(element.getAttribute(attribute).replace(/^data:/, "")), "from elsewhere", element);
      }
    }
  }
  // Contrast as WCAG 2.2 counts it; 4.5 for text.
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const light = ([red, green, blue]) => {
    const [r, g, b] = [red, green, blue].map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) { return colour; }
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [13, 17, 23] : [255, 255, 255];
  };
  for (const element of all("body *")) {
    const speaks = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!speaks || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) { continue; }
    const [one, two] = [light(rgb(getComputedStyle(element).color)), light(behind(element))].sort((a, b) => b - a);
    check((one + 0.05) / (two + 0.05) >= 4.5, "too little contrast", element);
  }
  return wrong;
}
