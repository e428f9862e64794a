// Pages are complete without this script. It brings the values of a page up to date in place.
const INTERVAL_MS = 5000;
const DEADLINE_MS = 15000;

const main = document.querySelector("main[data-live='1']");

function isEdited() {
  const active = document.activeElement;
  return Boolean(active && active.closest("form, summary"));
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
  if (next && !isEdited()) {
    const open = [...main.querySelectorAll("details")].map((each) => each.open);
    main.replaceChildren(...next.childNodes);
    main.querySelectorAll("details").forEach((each, place) => (each.open = open[place] ?? false));
  }
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

if (main) follow();
