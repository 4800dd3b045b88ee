// Routing in event time, a second time: reads a file of test vectors and prints what this implementation says.
//
//   node routing.mjs hashes  < JSON list of hex texts      -> JSON list of their xxh3 as hex
//   node routing.mjs FILE                                  -> JSON list, one answer for each case of the file

import { readFileSync } from "node:fs";
import { xxh3 } from "./xxh3.mjs";

const BUCKETS = 10_000n;

function bucketOf(salt, key) {
  return Number((xxh3(Buffer.concat([Buffer.from(`${salt}:`, "utf8"), key])) * BUCKETS) >> 64n);
}

/** Return the revision of a route that answers a record: the highest number whose time is not after it. */
function inForce(revisions, timeMs) {
  const timed = revisions.filter((each) => each.effective_from_ms !== null);
  const begun = timed.filter((each) => each.effective_from_ms <= timeMs);
  if (begun.length > 0) return begun.reduce((a, b) => (b.number > a.number ? b : a));
  // Before all of them: the first that is in force at any time, which no later one has taken the place of.
  const earliest = Math.min(...timed.map((each) => each.effective_from_ms));
  return inForce(revisions, earliest);
}

function answer(document, [route, keyHex, head, timeMs]) {
  const known = document.revisions.filter((each) => each.name === route && each.number <= head);
  const revision = inForce(known, timeMs);
  const key = Buffer.from(keyHex, "hex");
  const found = revision.route;
  const bucket = bucketOf(found.salt, key);
  const owner = found.variants.find((each) => each.ranges.some(([low, high]) => low <= bucket && bucket < high));
  const shadows = (found.shadows ?? [])
    .filter((each) => bucketOf(`${found.salt}/shadow/${each.name}`, key) < each.sample * Number(BUCKETS))
    .map((each) => each.name);
  return [route, keyHex, head, timeMs, bucket, revision.number, owner.name, shadows];
}

const argument = process.argv[2];
if (argument === "hashes") {
  const texts = JSON.parse(readFileSync(0, "utf8"));
  const hashes = texts.map((hex) => xxh3(Buffer.from(hex, "hex")).toString(16).padStart(16, "0"));
  process.stdout.write(JSON.stringify(hashes));
} else {
  const document = JSON.parse(readFileSync(argument, "utf8"));
  process.stdout.write(JSON.stringify(document.cases.map((each) => answer(document, each))));
}
