// Pages are complete without this script. It brings the values of a page up to date in place.
const INTERVAL_MS = 5000;
const DEADLINE_MS = 15000;

const main = document.querySelector("main[data-live='1']");

function isEdited() {
  return Boolean(document.activeElement?.closest("form"));
}

// A link or form that leads elsewhere is another one: a press of a key must not lead to a new place.
function isOther(old, next) {
  if (old.nodeName !== next.nodeName) return true;
  if (old.nodeType !== Node.ELEMENT_NODE) return false;
  return ["href", "action"].some((name) => old.getAttribute(name) !== next.getAttribute(name));
}

// Keeps each element that stays, and with it the focus, the selection and the place of scrolling.
function update(old, next) {
  if (isOther(old, next)) {
    old.replaceWith(next);
  } else if (old.nodeType === Node.ELEMENT_NODE) {
    updateAttributes(old, next);
    const [before, after] = [[...old.childNodes], [...next.childNodes]];
    after.forEach((each, place) => (before[place] ? update(before[place], each) : old.append(each)));
    before.slice(after.length).forEach((each) => each.remove());
  } else if (old.data !== next.data) {
    old.data = next.data;
  }
}

function updateAttributes(old, next) {
  for (const { name, value } of next.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const name of old.getAttributeNames()) {
    if (name !== "open" && !next.hasAttribute(name)) old.removeAttribute(name);
  }
}

async function refresh() {
  const response = await fetch(location.href, {
    headers: { Accept: "text/html" },
    signal: AbortSignal.timeout(DEADLINE_MS),
  });
  if (response.redirected) {
    location.assign(response.url);
    return;
  }
  if (!response.ok) throw new Error(String(response.status));
  const text = await response.text();
  const next = new DOMParser().parseFromString(text, "text/html").querySelector("main");
  if (next && !isEdited()) update(main, next);
}

async function follow() {
  for (;;) {
    await new Promise((done) => setTimeout(done, INTERVAL_MS));
    if (document.hidden) continue;
    try {
      await refresh();
    } catch {
      const stale = document.getElementById("stale");
      if (stale) stale.textContent = " No connection to the server; these values are old.";
    }
  }
}

document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
if (main) follow();
