"""Writes tests/golden_tiny.safetensors, after weights/tiny was made anew: logits of the famous prompt.

python -m tests.write_golden
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from llama3_from_scratch import encode, forward, load_model, special

weights, params, tokenizer = load_model(dtype="float32")
text = "the answer to the ultimate question of life, the universe, and everything is "
tokens = torch.tensor([[special(tokenizer, "begin_of_text"), *encode(tokenizer, text)]])
save_file(
    {"tokens": tokens, "logits": forward(tokens, weights, params)},
    Path(__file__).with_name("golden_tiny.safetensors"),
)
