// What modules of other projects are called, and what that is in the script's words: tools/dumps.py has the
// same tables, and a test compares the two.

// "silu x": the tensor is what comes before silu.
const TABLE = {
  "layers.{}": "layers.{}.out",
  "trf_blocks.{}": "layers.{}.out",
  "layers.{}.self_attn": "layers.{}.attention.out",
  "layers.{}.attention": "layers.{}.attention.out",
  "trf_blocks.{}.att": "layers.{}.attention.out",
  "layers.{}.self_attn.1": "layers.{}.attention.probs",
  "layers.{}.mlp": "layers.{}.feed_forward.out",
  "layers.{}.feed_forward": "layers.{}.feed_forward.out",
  "trf_blocks.{}.ff": "layers.{}.feed_forward.out",
  "layers.{}.mlp.act_fn": "layers.{}.feed_forward.gate",
  "attentions.{}": "layers.{}.attention.probs",
  "last_hidden_state": "norm",
  "past_key_values.{}.0": "layers.{}.attention.k_rotated",
  "past_key_values.{}.1": "layers.{}.attention.v",
  "input_ids": "tokens",
  "tok_embeddings": "tok_embeddings",
  "embed_tokens": "tok_embeddings",
  "tok_emb": "tok_embeddings",
  "layers.{}.attention_norm": "layers.{}.attention_norm",
  "layers.{}.input_layernorm": "layers.{}.attention_norm",
  "trf_blocks.{}.norm1": "layers.{}.attention_norm",
  "layers.{}.attention.wq": "layers.{}.attention.q",
  "layers.{}.self_attn.q_proj": "layers.{}.attention.q",
  "trf_blocks.{}.att.W_query": "layers.{}.attention.q",
  "layers.{}.attention.wk": "layers.{}.attention.k",
  "layers.{}.self_attn.k_proj": "layers.{}.attention.k",
  "trf_blocks.{}.att.W_key": "layers.{}.attention.k",
  "layers.{}.attention.wv": "layers.{}.attention.v",
  "layers.{}.self_attn.v_proj": "layers.{}.attention.v",
  "trf_blocks.{}.att.W_value": "layers.{}.attention.v",
  "layers.{}.attention.wo": "layers.{}.attention.out",
  "layers.{}.attention.wo.input": "layers.{}.attention.heads",
  "layers.{}.self_attn.o_proj": "layers.{}.attention.out",
  "layers.{}.self_attn.o_proj.input": "layers.{}.attention.heads",
  "trf_blocks.{}.att.out_proj": "layers.{}.attention.out",
  "trf_blocks.{}.att.out_proj.input": "layers.{}.attention.heads",
  "layers.{}.ffn_norm": "layers.{}.ffn_norm",
  "layers.{}.ffn_norm.input": "layers.{}.after_attention",
  "layers.{}.post_attention_layernorm": "layers.{}.ffn_norm",
  "layers.{}.post_attention_layernorm.input": "layers.{}.after_attention",
  "trf_blocks.{}.norm2": "layers.{}.ffn_norm",
  "trf_blocks.{}.norm2.input": "layers.{}.after_attention",
  "layers.{}.feed_forward.w1": "silu layers.{}.feed_forward.gate",
  "layers.{}.mlp.gate_proj": "silu layers.{}.feed_forward.gate",
  "trf_blocks.{}.ff.fc1": "silu layers.{}.feed_forward.gate",
  "layers.{}.feed_forward.w3": "layers.{}.feed_forward.up",
  "layers.{}.mlp.up_proj": "layers.{}.feed_forward.up",
  "trf_blocks.{}.ff.fc2": "layers.{}.feed_forward.up",
  "layers.{}.feed_forward.w2": "layers.{}.feed_forward.out",
  "layers.{}.feed_forward.w2.input": "layers.{}.feed_forward.hidden",
  "layers.{}.mlp.down_proj": "layers.{}.feed_forward.out",
  "layers.{}.mlp.down_proj.input": "layers.{}.feed_forward.hidden",
  "trf_blocks.{}.ff.fc3": "layers.{}.feed_forward.out",
  "trf_blocks.{}.ff.fc3.input": "layers.{}.feed_forward.hidden",
  "norm": "norm",
  "final_norm": "norm",
  "output": "logits",
  "output.input": "norm",
  "lm_head": "logits",
  "lm_head.input": "norm",
  "out_head": "logits",
  "out_head.input": "norm"
};
const WRAPPERS = ["_checkpoint_wrapped_module", "_forward_module", "_fsdp_wrapped_module", "_orig_mod", "module"];

function patternOf(name) {  // without what frameworks put around it, {} for its layer; and the layer
  let parts = name.split(".").filter(part => !WRAPPERS.includes(part));
  while (parts[0] === "model") parts = parts.slice(1);
  if (/^(output|input)$/.test(parts.at(-2)) && parts.at(-1) === "0") parts = parts.slice(0, -1);
  if (parts.at(-1) === "output" && parts.length > 1) parts = parts.slice(0, -1);  // alone it is Meta's head
  const layer = parts.findIndex(part => /^\d+$/.test(part));
  if (layer < 0) return [parts.join("."), ""];
  let pattern = [...parts.slice(0, layer), "{}", ...parts.slice(layer + 1)].join(".");
  if (!(pattern in TABLE) && pattern.endsWith(".0")) pattern = pattern.slice(0, -2);  // a module's first output
  return [pattern, `${+parts[layer]}`];
}

// The script's name of another project's tensor, in a model of L layers: [name, is it before silu?]; null: unknown.
export function ourName(name, L) {
  const [pattern, layer] = patternOf(name);
  if (pattern === "hidden_states.{}")  // L + 1 of them; the last one is after the norm
    return [+layer === 0 ? "tok_embeddings" : +layer === L ? "norm" : `layers.${layer - 1}.out`, false];
  const found = TABLE[pattern]?.replace("{}", layer);
  return found === undefined ? null : [found.replace("silu ", ""), found.startsWith("silu ")];
}

// A dict in a dict, {"trace": {…}}, gives all names one beginning that is nobody's: what it is, or "".
export function wrapperOf(names) {
  const first = new Set(names.map(name => name.split(".")[0]));
  const known = new Set(["model", "hidden_states", ...WRAPPERS, ...Object.keys(TABLE).map(it => it.split(".")[0])]);
  const [one] = first;
  return first.size === 1 && !known.has(one) && names.every(name => name.includes(".")) ? `${one}.` : "";
}

// Do q and k of these names hold the first half of all pairs, then the second?
export const inHalves = names => names.some(name => /self_attn\.[qk]_proj|W_(query|key)|past_key_values/.test(name));
