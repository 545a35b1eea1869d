// The likeliest tokens by their logits.

export function likeliest(logits, n) {  // [id, probability, logit]
  let most = -Infinity;
  for (const x of logits) if (x > most) most = x;
  const top = [];
  let sum = 0;
  logits.forEach((x, id) => {
    sum += Math.exp(x - most);
    if (top.length === n && !(x > top.at(-1)[1])) return;
    top.push([id, x]);
    top.sort((a, b) => b[1] - a[1]);
    if (top.length > n) top.pop();
  });
  return top.map(([id, x]) => [id, Math.exp(x - most) / sum, x]);
}
