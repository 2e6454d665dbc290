// The built book in a real browser: node check.mjs <folder of the pages> [page ...]
//
// Every page, in light and dark, on a desk and on a phone: axe finds nothing serious, the console is silent, nothing is
// asked of the network, formulas are set, the page does not scroll sideways, the text of figures can be read, links lead
// somewhere. Then, once each: search, the scorecard's filter and permalinks, the switch for code, guesses, the keyboard.
import { createReadStream, existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import { createGzip } from "node:zlib";
import { chromium } from "playwright-core";

const [folder, ...only] = process.argv.slice(2);
const root = path.resolve(folder);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const AT_ONCE = 2;
const DESK = { width: 1280, height: 900 }, PHONE = { width: 390, height: 844 };
const LEGIBLE = { desk: 11.9, phone: 9 }; // pixels: 9 points on a desk, and at full size on a phone
const LIMIT = { landing: 1.5e6, chapter: 4e6 }; // bytes over the wire
const TYPES = { html: "text/html", js: "text/javascript", css: "text/css", svg: "image/svg+xml", json: "application/json",
  png: "image/png", woff: "font/woff", woff2: "font/woff2", ipynb: "application/json", txt: "text/plain" };

const problems = [], counts = { pages: 0, views: 0, serious: 0, critical: 0, moderate: 0, minor: 0 };
const fail = (page, text) => problems.push(`${page}: ${text}`);

function walk(at = "") {
  return readdirSync(path.join(root, at), { withFileTypes: true }).flatMap((entry) => {
    const name = path.posix.join(at, entry.name);
    return entry.isDirectory() ? (name.startsWith("_") ? [] : walk(name)) : name.endsWith(".html") ? [name] : [];
  });
}

const begun = Date.now();
const server = createServer((request, response) => {
  const name = decodeURIComponent(new URL(request.url, "http://x").pathname).slice(1);
  const file = path.join(root, name);
  if (!existsSync(file) || !statSync(file).isFile()) { response.writeHead(404).end(); return; }
  const type = TYPES[name.split(".").pop()] || "application/octet-stream";
  const packed = /text|json|svg|javascript/.test(type);
  response.writeHead(200, { "content-type": type, ...(packed && { "content-encoding": "gzip" }) });
  const stream = createReadStream(file);
  (packed ? stream.pipe(createGzip()) : stream).pipe(response);
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const base = `http://127.0.0.1:${server.address().port}/`;
const executablePath = process.env.CHROMIUM || ["/usr/bin/chromium", "/usr/bin/chromium-browser",
  "/usr/bin/google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"].find(existsSync);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });

// Links, from the files themselves -------------------------------------------------------------------------------------

const texts = Object.fromEntries(walk().map((name) => [name, readFileSync(path.join(root, name), "utf8")]));
const ids = Object.fromEntries(Object.entries(texts).map(([name, text]) =>
  [name, new Set([...text.matchAll(/\s(?:id|name)="([^"]+)"/g)].map((m) => m[1]))]));
for (const [name, text] of Object.entries(texts)) {
  const found = [...ids[name]].length, all = [...text.matchAll(/\sid="([^"]+)"/g)].length;
  if (all > found) fail(name, `${all - found} ids are given twice`);
  for (const [, raw] of text.replace(/<script.*?<\/script>/gs, "").matchAll(/\s(?:href|src)="([^"]+)"/g)) {
    if (/^(https?:|mailto:|data:|javascript:)/.test(raw)) continue;
    const [target, hash] = raw.replaceAll("&amp;", "&").split("#");
    const file = target ? path.posix.join(path.posix.dirname(name), decodeURIComponent(target.split("?")[0])) : name;
    if (!existsSync(path.join(root, file))) fail(name, `dead link ${raw}`);
    else if (hash && !hash.includes("=") && texts[file] && !ids[file].has(decodeURIComponent(hash))) fail(name, `dead anchor ${raw}`);
  }
}

// Every page in every view ----------------------------------------------------------------------------------------------

const heights = {};
async function open(name, context) {
  const page = await context.newPage();
  const sizes = [];
  page.on("console", (m) => { if (m.type() === "error") fail(name, `console: ${m.text()}`); });
  page.on("pageerror", (error) => fail(name, `script: ${error.message}`));
  page.on("request", (r) => { if (!r.url().startsWith(base) && !/^(data|blob):/.test(r.url())) fail(name, `asks ${r.url()}`); });
  page.on("requestfinished", (r) => sizes.push(r.sizes().then((s) => s.responseBodySize + s.responseHeadersSize, () => 0)));
  await page.goto(base + name, { waitUntil: "load" });
  await page.evaluate(() => window.MathJax?.startup?.promise);
  return { page, weight: async () => (await Promise.all(sizes)).reduce((a, b) => a + b, 0) };
}

// What can change with the theme or the width; all other rules are checked in the first view. Colours are compared three
// times: what is light and narrow has those of light and wide.
const VARYING = { desk: ["color-contrast", "link-in-text-block"], light: ["scrollable-region-focusable"],
  dark: ["color-contrast", "link-in-text-block", "scrollable-region-focusable"] };

async function view(page, name, theme, size) {
  const first = theme === "light" && size === DESK;
  counts.views += 1;
  const where = `${theme}, ${size === DESK ? "desk" : "phone"}`;
  await page.setViewportSize(size);
  if (size === PHONE && theme === "light") await page.waitForTimeout(600); // the theme looks for what scrolls
  await page.evaluate((theme) => {
    document.documentElement.dataset.theme = document.documentElement.dataset.mode = theme;
    document.getAnimations().forEach((a) => a.finish());
  }, theme);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  if (wide > 1) fail(name, `${where}: scrolls sideways by ${wide} px`);
  heights[name] ??= {};
  heights[name][size === DESK ? "desk" : "phone"] = await page.evaluate(() => document.documentElement.scrollHeight);
  const { violations } = await page.evaluate((options) => axe.run({ exclude: [["svg.plot > *"]] }, options), {
    resultTypes: ["violations"], ...(first ? { rules: { region: { enabled: false } } } : { runOnly: VARYING[size === DESK ? "desk" : theme] }) });
  for (const v of violations) {
    counts[v.impact] += v.nodes.length;
    if (/serious|critical/.test(v.impact)) {
      fail(name, `${where}: ${v.impact} ${v.id} ×${v.nodes.length}: ${v.nodes[0].html.slice(0, 120)}`);
    }
  }
}

async function figures(page, name, size) {
  await page.setViewportSize(size);
  const least = size === DESK ? LEGIBLE.desk : LEGIBLE.phone;
  const small = await page.evaluate(([least, full]) => {
    document.querySelectorAll("details").forEach((d) => { d.open = true; });
    document.querySelectorAll(".waiting").forEach((d) => d.classList.remove("waiting"));
    if (full) document.querySelectorAll("figure a.full-size").forEach((link) => link.click());
    const found = [];
    document.querySelectorAll("svg.plot, .widget svg").forEach((svg) => {
      const box = svg.getBoundingClientRect();
      if (!box.width) return;
      const scale = svg.viewBox.baseVal ? box.width / svg.viewBox.baseVal.width : 1;
      const sizes = [...svg.querySelectorAll("text")].filter((t) => t.textContent.trim())
        .map((t) => parseFloat(getComputedStyle(t).fontSize) * scale);
      if (sizes.length && Math.min(...sizes) < least) {
        found.push(`${svg.closest("figure, .widget")?.id || "svg"} ${Math.min(...sizes).toFixed(1)} px`);
      }
    });
    return found;
  }, [least, size === PHONE]);
  if (small.length) fail(name, `text below ${least} px: ${small.join(", ")}`);
}

const weights = {};
async function check(name) {
  const begin = Date.now();
  counts.pages += 1;
  const context = await browser.newContext({ viewport: DESK, bypassCSP: true, reducedMotion: "reduce" });
  const { page, weight } = await open(name, context);
  weights[name] = await weight();
  await page.evaluate(axe);
  const maths = await page.evaluate(() => {
    const all = document.querySelectorAll(".math");
    return { unset: [...all].filter((m) => !m.querySelector("mjx-container")).length, wrong: document.querySelectorAll("mjx-merror").length };
  });
  if (maths.unset || maths.wrong) fail(name, `${maths.unset} formulas are not set, ${maths.wrong} are wrong`);
  for (const size of [DESK, PHONE]) {
    for (const theme of ["light", "dark"]) await view(page, name, theme, size);
  }
  if (name.startsWith("notebooks/")) {
    await figures(page, name, DESK);
    await figures(page, name, PHONE);
  }
  await context.close();
  if (process.env.VERBOSE) console.log(`${((Date.now() - begin) / 1000).toFixed(1)} s ${name}`);
}

const names = process.env.PARTS ? [] : only.length ? only : Object.keys(texts).filter((name) => !["index.html", "search.html"].includes(name));
const queue = [...names].sort((a, b) => texts[b].length - texts[a].length);
await Promise.all(Array.from({ length: AT_ONCE }, async () => { while (queue.length) await check(queue.shift()); }));

// Once each -------------------------------------------------------------------------------------------------------------

const context = await browser.newContext({ viewport: DESK });
const once = {
  async search() {
    for (const words of ["rewinding", "early stop", "density"]) {
      const { page } = await open(`search.html?q=${encodeURIComponent(words)}`, context);
      await page.waitForSelector("#search-results li a", { timeout: 10000 });
      await page.waitForTimeout(700);
      const first = await page.getAttribute("#search-results li a", "href");
      if (!first.includes("book/glossary.html#term-")) fail("search", `"${words}" finds ${first} first, not its definition`);
      const code = await page.evaluate(() => [...document.querySelectorAll("#search-results li:has(a[href*=notebooks]) p")]
        .filter((p) => /\bdef |\bimport |fig, axes|chapter\./.test(p.textContent)).map((p) => p.textContent.slice(0, 80)));
      if (code.length) fail("search", `"${words}" shows Python: ${code[0]}`);
      await page.close();
    }
  },
  async scorecard() {
    const { page } = await open("notebooks/scorecard.html#paper=lth&verdict=reproduced", context);
    const shown = () => page.$$eval("[data-verdict]", (rows) => rows.filter((r) => r.offsetParent).map((r) => ({ ...r.dataset, id: r.id })));
    const some = await shown();
    if (!some.length || some.some((r) => r.paper !== "lth" || r.verdict !== "reproduced")) fail("scorecard", "the address does not filter");
    await page.fill("form.claims-filter input[name=q]", "early stop");
    const fewer = await shown();
    if (!fewer.length || fewer.length >= some.length) fail("scorecard", "words do not filter");
    if (!page.url().includes("q=early+stop")) fail("scorecard", `the filter is not in the address: ${page.url()}`);
    const folded = await page.$eval("details.untested li", (row) => row.id);
    await page.goto(`${base}notebooks/scorecard.html#${folded}`);
    await page.reload();
    await page.waitForTimeout(300);
    if (!(await page.$eval(`[id="${folded}"]`, (row) => row.offsetParent !== null))) fail("scorecard", `the permalink ${folded} stays folded`);
    await page.close();
  },
  async code() {
    const chapters = Object.keys(texts).filter((name) => name.startsWith("notebooks/") && texts[name].includes("tag_code-hidden"));
    for (const name of chapters) {
      const { page } = await open(name, context);
      const shown = () => page.$$eval(".tag_code-hidden .code", (all) => all.filter((c) => c.offsetParent).length);
      if (await shown()) fail(name, "code is shown before the switch is on");
      await page.click(".code-switch");
      if (!(await shown())) fail(name, "the switch shows no code");
      await page.reload();
      if (!(await shown())) fail(name, "the page does not remember its switch");
      await page.click(".code-switch");
      await page.close();
    }
  },
  async guesses() {
    for (const name of Object.keys(texts).filter((n) => texts[n].includes('class="predict') || /admonition[^"]*predict/.test(texts[n]))) {
      const { page } = await open(name, context);
      const answer = () => page.$$eval(".tag_answer", (cells) => cells.filter((c) => c.offsetParent).length);
      if (await answer()) fail(name, "the answer stands below the question");
      await page.click("form.predict button");
      if (await answer()) fail(name, "the answer comes without a guess");
      await page.check("form.predict input >> nth=0");
      await page.click("form.predict button");
      if (!(await answer())) fail(name, "a guess reveals nothing");
      await page.close();
    }
  },
  async keyboard() {
    for (const name of ["book/index.html", ...Object.keys(texts).filter((n) => n.startsWith("notebooks/"))]) {
      const { page } = await open(name, context);
      const expected = await page.evaluate(() => {
        // Links follow controls; what a button of the listings copies can be selected as well.
        const controls = "main :is(button:not(.copybtn), input, select, summary), .article-header-buttons button";
        const all = [...document.querySelectorAll(controls)].filter((e) => e.offsetParent && !e.disabled && getComputedStyle(e).visibility !== "hidden");
        return all.filter((e) => e.type !== "radio").map((e, i) => (e.dataset.control = i)).length;
      });
      await page.evaluate(() => { window.reached = new Set(); document.addEventListener("focusin", (e) => {
        if (e.target.dataset.control) window.reached.add(e.target.dataset.control); }); document.activeElement.blur(); });
      const stops = await page.evaluate(() => document.querySelectorAll("a[href], button, input, select, summary, [tabindex]").length);
      for (let i = 0; i < Math.min(stops + 20, 1500); i++) {
        await page.keyboard.press("Tab");
        if (i % 20 === 19 && (await page.evaluate(() => window.reached.size)) >= expected) break;
      }
      const got = await page.evaluate(() => window.reached.size);
      if (got < expected) {
        const missed = await page.evaluate(() => [...document.querySelectorAll("[data-control]")].filter((e) => !window.reached.has(e.dataset.control)).map((e) => e.outerHTML.slice(0, 90)));
        fail(name, `the keyboard reaches ${got} of ${expected} controls, not ${missed[0]}`);
      }
      await page.close();
    }
  },
};
const started = Date.now(), took = [];
if (!only.length) {
  for (const [name, part] of Object.entries(once).filter(([name]) => !process.env.PARTS || process.env.PARTS.includes(name))) {
    const begin = Date.now();
    await part();
    took.push(`${name} ${((Date.now() - begin) / 1000).toFixed(0)} s`);
  }
}

await browser.close();
server.close();

for (const [name, bytes] of Object.entries(weights)) {
  const limit = name === "book/index.html" ? LIMIT.landing : name.startsWith("notebooks/") ? LIMIT.chapter : Infinity;
  if (bytes > limit) fail(name, `${(bytes / 1e6).toFixed(2)} MB over the wire, more than ${limit / 1e6}`);
}
const told = Object.entries(weights).filter(([name]) => /index|notebooks/.test(name) && !/api/.test(name))
  .map(([name, bytes]) => `${name.split("/").pop()} ${(bytes / 1e6).toFixed(2)} MB, ${heights[name].desk.toLocaleString()} and ${heights[name].phone.toLocaleString()} px high`);
console.log(`${counts.pages} pages in ${counts.views} views; axe: ${counts.critical} critical, ${counts.serious} serious, ` +
  `${counts.moderate} moderate, ${counts.minor} minor`);
console.log(told.join("\n"));
console.log(`pages ${((started - begun) / 1000).toFixed(0)} s${took.length ? `, ${took.join(", ")}` : ""}`);
const kinds = [...new Set(problems)];
kinds.forEach((text) => console.log(text));
console.log(kinds.length ? `${kinds.length} problems` : "no problems");
process.exit(kinds.length ? 1 : 0);
