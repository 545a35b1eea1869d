// Reads numpy's files: .npy, one array, and .npz, a zip of them. Of what lies there uncompressed only the
// headers are read at once.

const DTYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8",
                "|u1": "U8", "|b1": "BOOL"};
const END = 0x06054b50, TAIL = 22 + 0xffff;  // the end of a zip, and how far from its end it may begin
const MOST = 0xffffffff;  // bytes; beyond it a zip counts otherwise
const bytesOf = async blob => new DataView(await blob.arrayBuffer());
const textOf = (view, from, length) => new TextDecoder().decode(new Uint8Array(view.buffer, from, length));

// What begins a file: "npy", "zip", "pickle", "gguf" or "".
export async function kindOf(blob) {
  const first = new Uint8Array(await blob.slice(0, 6).arrayBuffer()), text = String.fromCharCode(...first);
  if (text === "\x93NUMPY") return "npy";
  if (text.startsWith("PK")) return "zip";
  if (text.startsWith("GGUF")) return "gguf";
  return first[0] === 0x80 && first[1] < 6 && first[1] > 1 ? "pickle" : "";
}

async function entriesOf(blob, fail) {  // of a zip: name, place of its own header, size, is it compressed?
  const tail = await bytesOf(blob.slice(Math.max(0, blob.size - TAIL)));
  let end = tail.byteLength - 22;
  while (end >= 0 && tail.getUint32(end, true) !== END) end--;
  if (end < 0) fail("it is a zip without an end; it is cut off");
  const count = tail.getUint16(end + 10, true), size = tail.getUint32(end + 12, true), from = tail.getUint32(end + 16, true);
  if (from === MOST) fail("it has more than 4 GB");
  const list = await bytesOf(blob.slice(from, from + size)), entries = [];
  for (let n = 0, at = 0; n < count; n++) {
    const [name, extra, comment] = [28, 30, 32].map(place => list.getUint16(at + place, true));
    entries.push({name: textOf(list, at + 46, name), compressed: list.getUint16(at + 10, true) !== 0,
      size: list.getUint32(at + 20, true), place: list.getUint32(at + 42, true)});
    at += 46 + name + extra + comment;
  }
  return entries;
}

async function contentOf(blob, {compressed, size, place}) {
  const head = await bytesOf(blob.slice(place, place + 30));
  const start = place + 30 + head.getUint16(26, true) + head.getUint16(28, true), held = blob.slice(start, start + size);
  if (!compressed) return held;
  return new Response(held.stream().pipeThrough(new DecompressionStream("deflate-raw"))).blob();
}

async function lastFastest(blob, shape, each) {  // numbers that stand there as Fortran has them, the first axis fastest
  const from = new Uint8Array(await blob.arrayBuffer()), to = new Uint8Array(from.length), at = shape.map(() => 0);
  const strides = shape.map((_, axis) => shape.slice(0, axis).reduce((a, b) => a * b, each));
  for (let place = 0; place < to.length; place += each) {
    const start = at.reduce((sum, n, axis) => sum + n * strides[axis], 0);
    to.set(from.subarray(start, start + each), place);
    for (let axis = shape.length - 1; axis >= 0 && ++at[axis] === shape[axis]; axis--) at[axis] = 0;
  }
  return new Blob([to]);
}

async function arrayOf(blob, key, bytes, fail) {
  const head = await bytesOf(blob.slice(0, 12));
  if (head.byteLength < 10 || await kindOf(blob) !== "npy") fail(`${key} is no array of numpy's`);
  const long = head.getUint8(6) > 1, length = long ? head.getUint32(8, true) : head.getUint16(8, true);
  const from = (long ? 12 : 10) + length, text = await blob.slice(long ? 12 : 10, from).text();
  const descr = text.match(/'descr':\s*'([^']*)'/)?.[1], sizes = text.match(/'shape':\s*\(([\d,\s]*)\)/)?.[1];
  if (sizes === undefined) fail(`${key} has no shape`);
  const dtype = DTYPES[descr], shape = sizes.split(",").map(one => one.trim()).filter(Boolean).map(Number);
  if (!dtype) fail(`${key} holds ${descr ?? "several kinds"}, which this page does not know; save it as float32`);
  const count = shape.reduce((a, b) => a * b, 1), size = count * bytes[dtype];
  if (from + size > blob.size) fail(`${key} would end behind the end of the file; it is cut off`);
  const turned = /'fortran_order':\s*True/.test(text) && shape.length > 1;
  const held = turned ? await lastFastest(blob.slice(from, from + size), shape, bytes[dtype]) : blob;
  return {dtype, shape, count, start: turned ? 0 : from, blob: held};
}

// The arrays of a file of numpy's by their names; each says the blob that it stands in. bytes: by dtype.
export async function arraysOf(blob, name, bytes, fail) {
  if (await kindOf(blob) === "npy") {
    const key = name.replace(/\.npy$/, "");
    return new Map([[key, await arrayOf(blob, key, bytes, fail)]]);
  }
  const entries = (await entriesOf(blob, fail)).filter(entry => entry.name.endsWith(".npy")), found = new Map();
  if (!entries.length) return null;
  for (const entry of entries) {
    const key = entry.name.slice(0, -4);
    found.set(key, await arrayOf(await contentOf(blob, entry), key, bytes, fail));
  }
  return found;
}
