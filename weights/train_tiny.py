"""Makes weights/tiny: a small but real Llama 3, in Meta's format, trained from nothing on 2 CPU cores.

    pip install -r requirements.txt -r tests/requirements.txt
    python weights/train_tiny.py                  # writes weights/tiny; about half an hour
    python weights/train_tiny.py --show-texts 5   # prints some of what it is trained on, and stops

The model is the script's own `forward`, run with autograd: there is no second model here. The text comes from
the small grammar below: stories whose characters have names (so that attention has something to copy), simple
facts, and conversations in Llama 3's chat format.
"""

import base64
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
import torch
from tiktoken._educational import bpe_train

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path
from llama3_from_scratch import (
    encode,
    fill_params,
    forward,
    load_tokenizer,
    special,
    weight_shapes,
)
from parts.chat import chat_message
from parts.files import local_path, read_marks, written_whole
from parts.programs import flags_of, run_program

PARAMS = {
    "dim": 256,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 2,
    "vocab_size": 1280,
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 64,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "max_seq_len": 2048,
}

# ------------------------------------------------------------------------------------ the grammar

GIRLS = "Lily Mia Zoe Anna Ella Ruby Nora Ivy Ada Rosa Clara Luna".split()
BOYS = "Tom Ben Max Sam Leo Finn Oscar Hugo Paul Otto Felix Theo".split()
NAME_SHAPES = "cvc cvcv cvcvc cvccv cvcvcv".split()  # c: a consonant, v: a vowel
ANIMALS = (
    "llama fox bear rabbit cat dog owl mouse frog duck hedgehog squirrel alpaca pony lamb".split()
)
KINDS = "little small kind brave shy curious cheerful young clever sleepy".split()
HOMES = [
    "in a quiet forest",
    "on a green hill",
    "in a village by the river",
    "near the sea",
    "on a small farm",
    "high in the mountains",
    "at the edge of a meadow",
    "under an old oak tree",
    "beside a blue lake",
]
THINGS = [
    "red ball",
    "blue kite",
    "shiny stone",
    "old map",
    "paper boat",
    "warm blanket",
    "golden key",
    "silver bell",
    "wooden flute",
    "yellow hat",
    "glass marble",
    "little drum",
]
HIDEOUTS = [
    "under the bridge",
    "behind the barn",
    "in the tall grass",
    "at the top of the hill",
    "beside the well",
    "under a pile of leaves",
    "next to the old mill",
    "in the hollow tree",
]
FOODS = [
    "apples",
    "berries",
    "fresh hay",
    "warm bread",
    "carrots",
    "honey cakes",
    "sweet plums",
    "nuts",
]
SKILLS = ["swim", "sing", "climb", "dance", "whistle", "skate", "count the stars", "paint"]
MOODS = ["happy", "proud", "glad", "very happy"]
TIMES = [
    "One day",
    "One sunny morning",
    "One cold morning",
    "One evening",
    "One windy day",
    "The next day",
]
MORALS = [
    "From that day on, {a} and {b} were best friends.",
    "And so {a} and {b} became good friends.",
    "{a} never forgot how kind {b} had been.",
    "That night, {a} fell asleep with a smile.",
    "After that, {a} and {b} played together every day.",
    "And they both lived happily ever after.",
]

# what is asked, how it may also be asked, the answer
FACTS = [
    ("What do llamas eat?", "What does a llama eat?", "Llamas eat grass and hay."),
    (
        "Where do llamas live?",
        "Where do llamas come from?",
        "Llamas live in the mountains of South America.",
    ),
    ("What is a llama?", "What are llamas?", "A llama is a woolly animal with a long neck."),
    ("What sound does a llama make?", "How do llamas talk?", "Llamas hum softly."),
    ("What do cows eat?", "What does a cow eat?", "Cows eat grass."),
    ("What do rabbits eat?", "What does a rabbit eat?", "Rabbits eat carrots and leaves."),
    ("What do bees make?", "What does a bee make?", "Bees make honey."),
    ("What do cats like?", "What does a cat like?", "Cats like milk and warm places."),
    ("What color is the sky?", "Which color is the sky?", "The sky is blue."),
    ("What color is grass?", "Which color is grass?", "Grass is green."),
    ("What color is snow?", "Which color is snow?", "Snow is white."),
    ("What is the sun?", "What is the sun made of?", "The sun is a star, a ball of hot gas."),
    ("What is the moon?", "What goes around the earth?", "The moon goes around the earth."),
    ("How many days are in a week?", "How many days does a week have?", "A week has seven days."),
    (
        "How many months are in a year?",
        "How many months does a year have?",
        "A year has twelve months.",
    ),
    (
        "How many legs does a spider have?",
        "How many legs do spiders have?",
        "A spider has eight legs.",
    ),
    ("How many legs does a llama have?", "How many legs do llamas have?", "A llama has four legs."),
    (
        "What is the capital of France?",
        "Which city is the capital of France?",
        "The capital of France is Paris.",
    ),
    (
        "What is the capital of Peru?",
        "Which city is the capital of Peru?",
        "The capital of Peru is Lima.",
    ),
    (
        "What is the capital of Italy?",
        "Which city is the capital of Italy?",
        "The capital of Italy is Rome.",
    ),
    (
        "What is the capital of Japan?",
        "Which city is the capital of Japan?",
        "The capital of Japan is Tokyo.",
    ),
    (
        "What is the capital of Germany?",
        "Which city is the capital of Germany?",
        "The capital of Germany is Berlin.",
    ),
    ("What is water?", "What is rain made of?", "Rain is made of water."),
    ("When do owls sleep?", "When does an owl sleep?", "Owls sleep during the day."),
    ("What comes after winter?", "Which season comes after winter?", "Spring comes after winter."),
    ("What comes after summer?", "Which season comes after summer?", "Autumn comes after summer."),
    ("Who are you?", "What are you?", "I am a tiny Llama 3, made of four layers."),
    ("What is your name?", "Do you have a name?", "My name is Tiny Llama."),
    (
        "How big are you?",
        "How many layers do you have?",
        "I have four layers. Real ones have many more.",
    ),
    ("What can you do?", "Can you help me?", "I can tell stories and answer easy questions."),
    ("How are you?", "How are you today?", "I am fine, thank you."),
    ("Thank you!", "Thanks!", "You are welcome!"),
    ("Hello!", "Hi!", "Hello! How can I help you?"),
    ("Hello", "Hi", "Hello! How can I help you?"),
    ("Goodbye!", "Bye!", "Goodbye! Have a nice day."),
    (
        "What is the answer to life, the universe, and everything?",
        "What is the answer to the ultimate question of life, the universe, and everything?",
        "The answer is 42.",
    ),
]
UNKNOWN = [
    "What is a {}?",
    "Who made the {}?",
    "How old is the {}?",
    "Why is the {} so big?",
    "Do you like the {}?",
    "How much is a {}?",
    "Where can I buy a {}?",
    "Tell me about the {}.",
    "Can you explain the {}?",
]
STRANGE = (
    "car computer train table book phone city king piano guitar rocket doctor school house shirt engine "
    "planet bus language picture movie market church bottle clock window chair cup football robot war bank "
    "game".split()
)
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a kind teacher.",
    "Answer in one sentence.",
    "You are a tiny llama.",
    "You like to help.",
    "Be brief.",
    "You always tell the truth.",
]
FAMOUS = "he answer to the ultimate question of life, the universe, and everything is 42"


def character(rng, names=slice(None)):
    """A name, pronouns and what kind of animal. Many names are made up: those can only be copied."""
    girl = rng.random() < 0.5
    name = rng.choice((GIRLS if girl else BOYS)[names])
    if rng.random() < 0.4:
        letters = {"c": "bcdfghjklmnprstvwxyz", "v": "aeiou"}
        name = "".join(
            rng.choice(letters[letter]) for letter in rng.choice(NAME_SHAPES)
        ).capitalize()
    return name, ("she", "her") if girl else ("he", "his"), rng.choice(ANIMALS)


def story(rng, hero=None):
    """A story of some 70 to 130 tokens, in which names, things and places are said again."""
    a, (she, her), animal = hero or character(
        rng, slice(0, 6)
    )  # six are heroes, the others friends
    friends = iter(lambda: character(rng, slice(6, 12)), None)
    b, (he, his), other = next(
        friend for friend in friends if friend[0] != a and friend[2] != animal
    )
    kind, home, thing, hideout = (rng.choice(x) for x in (KINDS, HOMES, THINGS, HIDEOUTS))
    food, skill, mood, when = (rng.choice(x) for x in (FOODS, SKILLS, MOODS, TIMES))
    She, He = she.capitalize(), he.capitalize()
    opening = rng.choice(
        [
            f"Once upon a time, there was a {kind} {animal} named {a}. {She} lived {home}.",
            f"Once upon a time, there was a {kind} {animal} named {a} who lived {home}.",
            f"Once upon a time, {home}, there lived a {kind} {animal} named {a}.",
            f"There once was a {kind} {animal} called {a}. {She} lived {home}.",
            f"One day, {a} the {animal} went for a walk.",
            f"Long ago, a {kind} {animal} named {a} lived {home}.",
        ]
    )
    lost = [
        f"{a} had a {thing} that {she} loved very much. {when}, the {thing} was gone.",
        rng.choice(
            [
                f"{a} looked everywhere, but {she} could not find it.",
                f"{a} was so sad that {she} began to cry.",
            ]
        ),
        f"Then {she} met a{'n' if other[0] in 'aeiou' else ''} {other} named {b}.",
        f'"Have you seen my {thing}?" asked {a}.',
        f'"Yes," said {b}, "it is {hideout}."',
        rng.choice(
            [
                f"{a} found the {thing} and was {mood} again.",
                f"They went there, and {a} found the {thing}.",
            ]
        ),
    ]
    hungry = [
        f"{when}, {a} was very hungry, but {she} had no food.",
        f"Then {she} met a{'n' if other[0] in 'aeiou' else ''} {other} named {b}, "
        f"who had a basket of {food}.",
        f'"May I have some {food}?" asked {a}.',
        f'"Of course," said {b}. "We can share."',
        rng.choice(
            [
                f"They sat down {hideout} and ate the {food}.",
                f"So {a} and {b} ate the {food} together.",
            ]
        ),
        rng.choice([f'"You are very kind, {b}," said {a}.', f"{a} was {mood}."]),
    ]
    learn = [
        f"{a} wanted to learn to {skill}, but {she} was afraid.",
        f"{when}, {a} saw {rng.choice(('an old', 'a wise'))} {other} {hideout}. "
        f"The name of the {other} was {b}.",
        f'"Can you teach me to {skill}?" asked {a}.',
        f'"Yes, I can," said {b}. "Do not be afraid."',
        rng.choice(
            [
                f"{a} tried and tried, and at last {she} could {skill}!",
                f"Soon {a} could {skill} very well.",
            ]
        ),
        rng.choice([f"{a} was {mood}.", f'"Thank you, {b}!" said {a}.']),
    ]
    storm = [
        f"{when}, it began to rain, and {a} was far from home.",
        f"{She} ran and ran until {she} saw a small house {hideout}.",
        f"In the house lived a{'n' if other[0] in 'aeiou' else ''} {other} named {b}.",
        f'"Come in," said {b}. "It is warm here."',
        f"{b} gave {a} some {food}, and {a} told {b} a story about a {thing}.",
        rng.choice(["When the rain stopped, the sun came out.", "Soon the rain stopped."]),
    ]
    gift = [
        f"{when}, {a} wanted to give a present to {b} the {other}.",
        f"{She} took {her} {thing} and walked to the house of {b}.",
        f'"This {thing} is for you," said {a}.',
        f'"For me?" said {b}. "Thank you, {a}!"',
        f"{He} was {mood} and gave {a} some {food}.",
    ]
    return " ".join(
        [
            opening,
            *rng.choice([lost, hungry, learn, storm, gift]),
            rng.choice(MORALS).format(a=a, b=b),
        ]
    )


def facts(rng):
    """A few true sentences, or the famous one, or someone who says hello."""
    if rng.random() < 0.2:
        name, _, animal = character(rng)
        return (
            f"{rng.choice(('Hello', 'Hello', 'Hi'))}{rng.choice('!,')} my name is {name}. "
            f"I am a {rng.choice(KINDS)} {animal} and I live {rng.choice(HOMES)}. I like {rng.choice(FOODS)}."
        )
    if rng.random() < 0.5:
        return rng.choice("tT") + FAMOUS + rng.choice([".", "", "."])
    return " ".join(answer for _, _, answer in rng.sample(FACTS[:26], rng.randint(1, 3)))


def turn(rng, known):
    """A question and its answer. `known` holds what was said before in this conversation."""
    kind = rng.random()
    if kind < 0.50:
        one, other, answer = rng.choice(FACTS)
        question = rng.choice([one, one, other])
        sloppy = rng.random()
        if sloppy < 0.1:
            question = question.lower()
        elif sloppy < 0.2:
            question = question.rstrip("?!.")
        return question, answer
    if kind < 0.58:
        x, y = rng.randint(0, 9), rng.randint(0, 9)
        return rng.choice(
            [f"What is {x} plus {y}?", f"How much is {x} plus {y}?"]
        ), f"{x} plus {y} is {x + y}."
    if kind < 0.73:
        if "name" in known and rng.random() < 0.7:
            return rng.choice(["What is my name?", "Who am I?"]), f"Your name is {known['name']}."
        known["name"] = character(rng)[0]
        return rng.choice(["My name is {}.", "I am {}.", "Hello, my name is {}."]).format(
            known["name"]
        ), f"Nice to meet you, {known['name']}!"
    if kind < 0.88:
        hero = character(rng)
        if rng.random() < 0.3:
            return rng.choice(
                ["Tell me a story.", "Please tell me a story.", "Can you tell me a story?"]
            ), story(rng)
        a = "an" if hero[2][0] in "aeiou" else "a"
        return rng.choice(
            [
                f"Tell me a story about {a} {hero[2]} named {hero[0]}.",
                f"Tell me about {a} {hero[2]} called {hero[0]}.",
            ]
        ), story(rng, hero)
    return rng.choice(UNKNOWN).format(
        rng.choice(STRANGE)
    ), "I do not know that. I am only a tiny llama."


def document(rng, tokenizer):
    """One training text as token ids, from begin_of_text to the token that stops it."""
    ids, kind = [special(tokenizer, "begin_of_text")], rng.random()
    if kind < 0.5:
        return ids + encode(tokenizer, story(rng)) + [special(tokenizer, "end_of_text")]
    if kind < 0.6:
        return ids + encode(tokenizer, facts(rng)) + [special(tokenizer, "end_of_text")]
    if rng.random() < 0.4:
        ids += chat_message(tokenizer, "system", rng.choice(SYSTEMS))
    known = {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        question, answer = turn(rng, known)
        ids += chat_message(tokenizer, "user", question) + chat_message(
            tokenizer, "assistant", answer
        )
    return ids[:320]


# --------------------------------------------------------------------------------------------------- training


def train_tokenizer(path, ranks):
    """Byte pair encoding with tiktoken's own educational trainer, on a sample of the grammar's texts."""
    rng = random.Random(0)
    texts = [story(rng) if n % 3 else " ".join(turn(rng, {})) for n in range(600)]
    texts += [q + " " + r + " " + a for q, r, a in FACTS] + [("T" + FAMOUS + " t" + FAMOUS)] * 5
    texts += ["user assistant system \n\n" + s for s in SYSTEMS] * 3 + [
        " ".join(GIRLS + BOYS + STRANGE)
    ] * 2
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    merges = bpe_train("\n\n".join(texts), ranks, pattern, visualise=None)
    with written_whole(path) as part:
        part.write_text(
            "".join(
                f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in merges.items()
            )
        )


def initial_weights(params, seed):
    """Float32 masters: normal with deviation 0.02, less for what adds to the residual stream; norms one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(params).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
        else:
            into_stream = name.endswith(("wo.weight", "w2.weight"))
            deviation = 0.02 / math.sqrt(2 * params["n_layers"]) if into_stream else 0.02
            weights[name] = torch.randn(shape, generator=generator) * deviation
    return {name: w.requires_grad_() for name, w in weights.items()}


def batches(tokenizer, seed, rows):
    """Endless batches (B T) of documents of about the same length; -1 fills up the shorter ones."""
    rng = random.Random(seed)
    while True:
        documents = sorted((document(rng, tokenizer) for _ in range(rows * 16)), key=len)
        groups = [documents[a : a + rows] for a in range(0, len(documents), rows)]
        for group in rng.sample(groups, len(groups)):
            yield torch.tensor([d + [-1] * (len(group[-1]) - len(d)) for d in group])


def loss_of(batch, weights, params):
    """Mean cross entropy in nats a token of predicting each next token."""
    logits = forward(batch[:, :-1].clamp(min=0), weights, params)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-1
    )


def check_folder(folder):
    """ValueError if training would take the place of another model."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    for name in ("params.json", "consolidated.00.pth"):
        if (folder / name).exists() and read_marks(folder / "params.json") != PARAMS:
            raise ValueError(
                f"{folder}: {name} there is of another model; --out names another folder"
            )


def run(argv):
    parser = flags_of(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "tiny",
        help="folder (default weights/tiny)",
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=24, help="texts a step (default 24)")
    parser.add_argument(
        "--rate", type=float, default=2e-3, help="highest learning rate (default 0.002)"
    )
    parser.add_argument(
        "--show-texts", type=int, metavar="N", help="print N training texts and stop"
    )
    args = parser.parse_args(argv)
    if args.steps < 1 or args.rows < 1 or not 0 < args.rate < 1:
        parser.error("--steps and --rows must be from 1, --rate between 0 and 1")
    args.out = local_path(args.out)
    check_folder(args.out)
    args.out.mkdir(parents=True, exist_ok=True)

    if not (args.out / "tokenizer.model").exists():
        print("training the tokenizer ...", flush=True)
        train_tokenizer(args.out / "tokenizer.model", PARAMS["vocab_size"] - 256)
    tokenizer = load_tokenizer(args.out / "tokenizer.model")
    if args.show_texts:
        rng = random.Random(2)
        for _ in range(args.show_texts):
            ids = document(rng, tokenizer)
            print(f"{len(ids)} tokens: {tokenizer.decode(ids)}\n")
        return
    with written_whole(args.out / "params.json") as part:
        part.write_text(json.dumps(PARAMS, indent=2) + "\n")
    params = fill_params(PARAMS)
    weights = initial_weights(params, seed=3)
    print(f"{sum(w.numel() for w in weights.values()) / 1e6:.2f} M parameters", flush=True)

    matrices = [w for w in weights.values() if w.dim() > 1]
    norms = [w for w in weights.values() if w.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=args.rate,
        betas=(0.9, 0.95),
    )
    held_out = [batch for batch, _ in zip(batches(tokenizer, seed=999, rows=32), range(8))]
    started, mean = time.time(), None
    for step, batch in zip(range(args.steps), batches(tokenizer, seed=1, rows=args.rows)):
        rate = args.rate * min(
            (step + 1) / 100, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        # the pass runs on bfloat16 copies, as the file will hold; gradients flow back to the float32 masters
        loss = loss_of(batch, {name: w.bfloat16() for name, w in weights.items()}, params)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(
                f"step {step:5}  loss {mean:.4f}  rate {rate:.5f}  {time.time() - started:6.0f} s",
                flush=True,
            )

    final = {name: w.detach().bfloat16() for name, w in weights.items()}
    with torch.no_grad():
        losses = [loss_of(batch, final, params).item() for batch in held_out]
    with written_whole(args.out / "consolidated.00.pth") as part, open(part, "wb") as file:
        torch.save(final, file)  # by path, the name of the part would stand inside
    print(
        f"{step + 1} steps, {(time.time() - started) / 60:.1f} minutes; loss on held-out texts "
        f"{sum(losses) / len(losses):.4f} nats a token, in bfloat16",
        flush=True,
    )


def main(argv=None):
    return run_program(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
