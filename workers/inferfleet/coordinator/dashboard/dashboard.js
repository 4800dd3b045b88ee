// The fleet at a glance, from the same JSON that every other client reads.
//
// All names and texts come from outside and may be anything: they are set as text, never as markup.

const EVERY_MS = 2000;
const PATIENCE_MS = 5000;
const STALE_MS = 10000;
const MOST_ROWS = 500;
const MOST_RUNNING = 8;
const BUCKETS = 10000;
const PLACES = {
  routes: `/v1/routes?limit=${MOST_ROWS}`,
  rollouts: "/v1/rollouts?limit=50",
  workers: `/v1/workers?limit=${MOST_ROWS}`,
  audit: "/v1/audit?newest=true&limit=25",
};

const byId = (id) => document.getElementById(id);

// Elements

function element(name, { text, kind, title } = {}, ...children) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = String(text);
  if (kind) made.className = kind;
  if (title) made.title = title;
  made.append(...children);
  return made;
}

function lines(texts, kind) {
  return element("div", { kind }, ...texts.map((text) => element("div", { text })));
}

function table(headings, rows) {
  const head = element("tr", {}, ...headings.map((text) => element("th", { text })));
  const body = rows.map((cells) =>
    element("tr", {}, ...cells.map((cell) => {
      if (cell instanceof Node) return element("td", {}, cell);
      return element("td", { text: cell ?? "", kind: typeof cell === "number" ? "number" : "" });
    })));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

function shareBar(shares) {
  const space = "http://www.w3.org/2000/svg";
  const bar = document.createElementNS(space, "svg");
  bar.setAttribute("class", "shares");
  bar.setAttribute("viewBox", "0 0 100 1");
  bar.setAttribute("preserveAspectRatio", "none");
  let from = 0;
  shares.forEach((share, index) => {
    const part = document.createElementNS(space, "rect");
    part.setAttribute("class", `share-${index % 4}`);
    part.setAttribute("x", String(from));
    part.setAttribute("width", String(share));
    part.setAttribute("height", "1");
    bar.append(part);
    from += share;
  });
  return bar;
}

// What is shown is only replaced where it has changed, so that an opened detail stays open.
const shown = new Map();

function show(id, content, key) {
  if (shown.get(id) === key) return;
  shown.set(id, key);
  byId(id).replaceChildren(content);
}

// Words

const percent = (share) => `${Number(share.toFixed(2))} %`;
const clock = (ms) => new Date(ms).toLocaleTimeString();
const counted = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const moment = (ms) => new Date(ms).toLocaleString();

function span(ms) {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

function ownShare(variant) {
  const owned = variant.ranges.reduce((sum, [low, high]) => sum + high - low, 0);
  return (100 * owned) / BUCKETS;
}

// Sections

function versionsOf(route) {
  if (!route) return element("span", { text: route === null ? "taken away" : "nothing yet", kind: "wait" });
  const shares = route.variants.map(ownShare);
  const words = route.variants.map(
    (each, i) => `${each.name}: version ${each.version}, ${percent(shares[i])}`);
  const shadows = (route.shadows ?? []).map((each) => `${each.name} (shadow): version ${each.version}`);
  return element("div", {}, shareBar(shares), lines([...words, ...shadows]));
}

function pausedBy(route, workers) {
  const found = workers.filter((each) => route in each.paused);
  if (!found.length) return "";
  const reasons = [...new Set(found.map((each) => each.paused[route]))];
  return lines([`paused on ${found.length} of ${counted(workers.length, "worker")}`, ...reasons], "bad");
}

function pendingOf(route, workers) {
  if (!route.pending) return "";
  const pool = (route.pending.route ?? route.standing?.route ?? {}).pool ?? "default";
  const pooled = workers.filter((each) => each.pool === pool && !each.draining);
  const late = pooled.filter((each) => (each.adopted[route.name] ?? 0) < route.pending.number);
  const told = `revision ${route.pending.number} waits for ${late.length} of ${counted(pooled.length, "worker")}`;
  return element("div", { kind: "wait", title: late.map((each) => each.worker).join(", ") },
    element("div", { text: told }), versionsOf(route.pending.route));
}

function routesTable({ routes }, workers) {
  if (!routes.length) return element("p", { text: "No routes yet.", kind: "quiet" });
  return table(["route", "takes from", "model", "answers", "revision", "since", ""], routes.map((each) => {
    const route = each.standing?.route ?? each.pending?.route;
    const since = each.standing?.effective_from_ms;
    const state = element("div", {});
    state.append(pendingOf(each, workers), pausedBy(each.name, workers));
    return [each.name, route?.source, route?.model, versionsOf(each.standing?.route), each.revision,
      since ? moment(since) : "", state];
  }));
}

// Which details are open, so that they stay so when what is in them changes.
const opened = new Set();

function details(key, title, value) {
  const text = JSON.stringify(value, null, 1);
  const made = element("details", {}, element("summary", { text: title }), element("pre", { text }));
  made.open = opened.has(key);
  made.addEventListener("toggle", () => (made.open ? opened.add(key) : opened.delete(key)));
  return made;
}

const PHASES = { done: "good", aborted: "bad", inconclusive: "wait" };

function rolloutsTable({ rollouts }) {
  if (!rollouts.length) return element("p", { text: "No rollouts yet.", kind: "quiet" });
  return table(["rollout", "route", "versions", "phase", "share", "reasons", "evidence"],
    rollouts.map((each) => {
      const last = each.history.at(-1);
      const reasons = [...each.waits_for, each.outcome, last ? `${last.action}: ${last.reason}` : ""];
      const phase = each.step >= 0 && !each.ended ? `${each.phase} ${each.step + 1}` : each.phase;
      return [`${each.id} (${each.kind})`, each.route, `${each.from_version} → ${each.to_version}`,
        element("span", { text: phase, kind: PHASES[each.phase] ?? (each.waits_for.length ? "wait" : "") }),
        percent(each.percent), lines(reasons.filter(Boolean)), details(`rollout ${each.id}`, "show", each.evidence)];
    }));
}

function workersTable({ workers, now_ms: now }, head) {
  if (!workers.length) return element("p", { text: "No worker has reported lately.", kind: "bad" });
  return table(["worker", "pool", "device", "routes", "said", "ready", "lag", "rows/s", ""],
    workers.map((each) => {
      const behind = head.number - each.head[1];
      const quiet = now - each.at_ms;
      const sum = (values) => Object.values(values).reduce((total, value) => total + value, 0);
      const marks = [each.stale, each.draining ? "draining" : "", each.loading.length ? `loads ${each.loading.join(", ")}` : "",
        ...Object.entries(each.refused).map(([version, reason]) => `refuses ${version}: ${reason}`)];
      const followed = behind > 0 ? `${behind} behind` : behind < 0 ? `${-behind} ahead` : "current";
      return [`${each.worker}${each.release ? ` (${each.release})` : ""}`, each.pool, each.device,
        element("span", { text: `${each.head[1]}, ${followed}`, kind: behind ? "wait" : "good" }),
        element("span", { text: `${span(quiet)} ago`, kind: quiet > STALE_MS ? "bad" : "" }),
        lines(each.ready), sum(each.lag), Math.round(sum(each.rows_per_s)), lines(marks.filter(Boolean), "bad")];
    }));
}

function auditTable({ entries }) {
  if (!entries.length) return element("p", { text: "Nothing was changed yet.", kind: "quiet" });
  return table(["when", "who", "what", "why", ""], entries.toReversed().map((each) => [
    moment(each.at_ms), each.actor, `${each.action} ${each.subject}`, each.reason,
    details(`change ${each.number}`, "before, after", { before: each.before, after: each.after })]));
}

// Asking

class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function ask(place) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(place, { headers, signal: AbortSignal.timeout(PATIENCE_MS) });
  if (answer.ok) return answer.json();
  const said = await answer.json().catch(() => ({ error: `HTTP ${answer.status}` }));
  throw new Refused(answer.status, said.error);
}

// The list leaves out what a rollout is judged by; it is asked for of those that still run.
async function withEvidence(rollouts) {
  const running = rollouts.filter((each) => !each.ended).slice(0, MOST_RUNNING);
  const whole = await Promise.all(running.map((each) => ask(`/v1/rollouts/${encodeURIComponent(each.id)}`)));
  return rollouts.map((each) => whole.find((other) => other.id === each.id) ?? each);
}

async function look() {
  // One first: where a token is wanted, that is to be told once.
  const [first, ...names] = Object.keys(PLACES);
  const answers = [await ask(PLACES[first]), ...await Promise.all(names.map((name) => ask(PLACES[name])))];
  const found = Object.fromEntries([first, ...names].map((name, i) => [name, answers[i]]));
  found.rollouts.rollouts = await withEvidence(found.rollouts.rollouts);
  const { workers } = found.workers;
  show("routes", routesTable(found.routes, workers), JSON.stringify([found.routes, workers.map((each) =>
    [each.worker, each.adopted, each.paused, each.draining])]));
  show("rollouts", rolloutsTable(found.rollouts), JSON.stringify(found.rollouts));
  show("workers", workersTable(found.workers, found.routes.head), JSON.stringify(found.workers));
  show("audit", auditTable(found.audit), JSON.stringify(found.audit));
  byId("state").textContent =
    `Revision ${found.routes.head.number}, ${counted(workers.length, "worker")}, seen at ${clock(Date.now())}`;
}

function tokenWanted(wanted) {
  byId("login").hidden = !wanted;
  byId("board").hidden = wanted;
}

let waiting; // The next look, so that a token that is given twice does not look twice as often.

async function poll() {
  clearTimeout(waiting);
  try {
    await look();
    tokenWanted(false);
  } catch (error) {
    byId("state").textContent = error instanceof Refused ? error.message : "The coordinator does not answer.";
    if (error.status === 401) {
      sessionStorage.removeItem("token");
      tokenWanted(true);
      return; // Asked again when a token is given.
    }
  }
  clearTimeout(waiting);
  waiting = setTimeout(poll, EVERY_MS);
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  byId("token").value = "";
  poll();
});

poll();
