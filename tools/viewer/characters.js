// Tokens that are parts of a character: a trace gives their bytes as \\xf0\\x9f, and the page shows the
// character that they are together, with the part marked.

const BYTE = /\\x[0-9a-f]{2}/g, LONGEST = 12;  // tokens of which a character may be made

// A piece's bytes; what stands in it as a character too.
function bytesOf(piece) {
  const bytes = [], encoder = new TextEncoder();
  for (const [text] of piece.matchAll(/\\x[89a-f][0-9a-f]|[^\\]+|\\/gi)) {
    if (/^\\x..$/i.test(text)) bytes.push(parseInt(text.slice(2), 16));
    else bytes.push(...encoder.encode(text));
  }
  return bytes;
}
function decoded(bytes) {  // null: these are no whole characters
  try { return new TextDecoder("utf-8", {fatal: true}).decode(Uint8Array.from(bytes)); } catch { return null; }
}

// pieces: of the tokens, in order. Gives of each position that holds a part of a character what to show for it.
export function partsOfCharacters(pieces) {
  const parts = new Map(), broken = piece => piece !== undefined && piece.search(BYTE) >= 0;
  for (let i = 0; i < pieces.length; i++) {
    if (!broken(pieces[i])) continue;
    let bytes = [];
    for (let n = 1; n <= LONGEST && broken(pieces[i + n - 1]); n++) {
      bytes = [...bytes, ...bytesOf(pieces[i + n - 1])];
      const text = n > 1 && decoded(bytes);
      if (!text) continue;
      for (let k = 0; k < n; k++) parts.set(i + k, `${text} ${k + 1}/${n}`);
      i += n - 1;
      break;
    }
  }
  return parts;
}
