// xxh3, 64 bits, seed 0, after the published specification of xxHash. Written for clearness: BigInt throughout.

const MASK = (1n << 64n) - 1n;
const LOW = (1n << 32n) - 1n;
const P32_1 = 0x9e3779b1n;
const P32_2 = 0x85ebca77n;
const P32_3 = 0xc2b2ae3dn;
const P64_1 = 0x9e3779b185ebca87n;
const P64_2 = 0xc2b2ae3d27d4eb4fn;
const P64_3 = 0x165667b19e3779f9n;
const P64_4 = 0x85ebca77c2b2ae63n;
const P64_5 = 0x27d4eb2f165667c5n;
const MIX_1 = 0x165667919e3779f9n;
const MIX_2 = 0x9fb21c651e98df25n;

const SECRET = Buffer.from(
  "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221" +
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8" +
    "fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb17" +
    "0ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e",
  "hex",
);
const STRIPE = 64;
const STRIPES_PER_BLOCK = (SECRET.length - STRIPE) / 8;

const u32 = (from, at) => BigInt(from.readUInt32LE(at));
const u64 = (from, at) => from.readBigUInt64LE(at);
const secret = (at) => u64(SECRET, at);
const wrap = (value) => value & MASK;
const rotated = (value, bits) => wrap(value << bits) | (value >> (64n - bits));
const folded = (a, b) => {
  const product = a * b;
  return (product & MASK) ^ (product >> 64n);
};
const swapped = (value) => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(value);
  return bytes.readBigUInt64BE();
};

function avalancheOfXxh64(value) {
  value = wrap((value ^ (value >> 33n)) * P64_2);
  value = wrap((value ^ (value >> 29n)) * P64_3);
  return value ^ (value >> 32n);
}

function avalanche(value) {
  value = wrap((value ^ (value >> 37n)) * MIX_1);
  return value ^ (value >> 32n);
}

function upTo16(input) {
  const length = input.length;
  if (length > 8) {
    const low = u64(input, 0) ^ secret(24) ^ secret(32);
    const high = u64(input, length - 8) ^ secret(40) ^ secret(48);
    return avalanche(wrap(BigInt(length) + swapped(low) + high + folded(low, high)));
  }
  if (length > 3) {
    const joined = u32(input, length - 4) + (u32(input, 0) << 32n);
    let value = joined ^ secret(8) ^ secret(16);
    value ^= rotated(value, 49n) ^ rotated(value, 24n);
    value = wrap(value * MIX_2);
    value ^= wrap((value >> 35n) + BigInt(length));
    value = wrap(value * MIX_2);
    return value ^ (value >> 28n);
  }
  if (length > 0) {
    const bytes = [input[0], input[length >> 1], input[length - 1]].map(BigInt);
    const joined = (bytes[0] << 16n) | (bytes[1] << 24n) | bytes[2] | (BigInt(length) << 8n);
    return avalancheOfXxh64(joined ^ u32(SECRET, 0) ^ u32(SECRET, 4));
  }
  return avalancheOfXxh64(secret(56) ^ secret(64));
}

const mixed = (input, at, key) => folded(u64(input, at) ^ secret(key), u64(input, at + 8) ^ secret(key + 8));

function upTo128(input) {
  const length = input.length;
  let sum = BigInt(length) * P64_1;
  for (let pair = ((length - 1) >> 5); pair >= 0; pair--) {
    sum += mixed(input, 16 * pair, 32 * pair);
    sum += mixed(input, length - 16 * (pair + 1), 32 * pair + 16);
  }
  return avalanche(wrap(sum));
}

function upTo240(input) {
  const length = input.length;
  const rounds = length >> 4;
  let sum = BigInt(length) * P64_1;
  for (let i = 0; i < 8; i++) sum += mixed(input, 16 * i, 16 * i);
  sum = avalanche(wrap(sum));
  for (let i = 8; i < rounds; i++) sum += mixed(input, 16 * i, 16 * (i - 8) + 3);
  return avalanche(wrap(sum + mixed(input, length - 16, 136 - 17)));
}

function accumulate(lanes, input, at, key) {
  for (let i = 0; i < 8; i++) {
    const data = u64(input, at + 8 * i);
    const keyed = data ^ secret(key + 8 * i);
    lanes[i ^ 1] = wrap(lanes[i ^ 1] + data);
    lanes[i] = wrap(lanes[i] + (keyed & LOW) * (keyed >> 32n));
  }
}

function scramble(lanes) {
  const key = SECRET.length - STRIPE;
  for (let i = 0; i < 8; i++) {
    lanes[i] = wrap((lanes[i] ^ (lanes[i] >> 47n) ^ secret(key + 8 * i)) * P32_1);
  }
}

function long(input) {
  const length = input.length;
  const lanes = [P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1];
  const stripes = Math.floor((length - 1) / STRIPE);
  for (let stripe = 0; stripe < stripes; stripe++) {
    const within = stripe % STRIPES_PER_BLOCK;
    accumulate(lanes, input, STRIPE * stripe, 8 * within);
    if (within === STRIPES_PER_BLOCK - 1) scramble(lanes);
  }
  accumulate(lanes, input, length - STRIPE, SECRET.length - STRIPE - 7);
  let sum = BigInt(length) * P64_1;
  for (let i = 0; i < 4; i++) {
    sum += folded(lanes[2 * i] ^ secret(11 + 16 * i), lanes[2 * i + 1] ^ secret(11 + 16 * i + 8));
  }
  return avalanche(wrap(sum));
}

/** Return the hash of a Buffer as a BigInt. */
export function xxh3(input) {
  if (input.length <= 16) return upTo16(input);
  if (input.length <= 128) return upTo128(input);
  return input.length <= 240 ? upTo240(input) : long(input);
}
