"""Writes tests/golden_tiny.safetensors, after weights/tiny was made anew: logits of the famous prompt."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from llama3_from_scratch import encode, forward, load_model, special

weights, params, tokenizer = load_model(ROOT / "weights" / "tiny", dtype=torch.float32)
text = "the answer to the ultimate question of life, the universe, and everything is "
tokens = torch.tensor([[special(tokenizer, "begin_of_text"), *encode(tokenizer, text)]])
save_file(
    {"tokens": tokens, "logits": forward(tokens, weights, params)}, ROOT / "tests" / "golden_tiny.safetensors"
)
