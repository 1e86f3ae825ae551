"""The instruction tasks `nano` is trained on, and how each answer is scored.

Everything is generated: a task draws an *input* (numbers, words, a small record), phrases it as a prompt and knows the
one right answer.  An input belongs to the held-out split when the hash of its canonical form says so, whatever the
phrasing; training never draws such an input and evaluation never draws another, so the split holds without any list.

    >>> import random
    >>> from mlx_diffgemma.nano.tasks import TASKS, draw
    >>> example = draw(TASKS["add"], random.Random(0), held_out=True)
    >>> example.prompt, example.answer

Ranges come in two widths.  Evaluation and most of the training use the narrow ones; ``wide`` ones (more words, freer
stories) are what training begins with.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

NAMES = """Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olive Paul Rosa Sam Tina Viktor Zoe
Alex Bella Carl Dora Eli Fiona George Hanna Ivan Julia Karl Lena Max Nina Oscar Pia Robert Sara Tom""".split()
CITIES = """Paris London Rome Berlin Madrid Vienna Oslo Athens Dublin Prague Lisbon Warsaw Boston Tokyo Cairo Lima
Denver Seattle Toronto Sydney Delhi Kyoto Bergen Geneva Milan""".split()
ANIMALS = "fox cat dog bear mouse rabbit owl duck frog goat horse lion wolf deer hen pig sheep turtle".split()
COLOURS = "red blue green yellow white black brown grey pink orange".split()
OBJECTS = "ball kite lamp drum boat book coin ring key map hat bell box cup rope shell stone flower".split()
PLACES = "forest garden house river hill field cave beach market bridge barn village lake tower".split()
FOODS = "bread cheese apples honey soup cake berries nuts milk rice".split()
JOBS = "teacher doctor farmer baker painter driver sailor writer singer cook".split()
MOODS = "happy sad brave shy tired hungry curious proud calm lonely".split()
WORDS = sorted({*ANIMALS, *COLOURS, *OBJECTS, *PLACES, *FOODS, *JOBS, *MOODS, *"""sun moon star tree road wind rain snow
sea day night time hand door wall glass paper wood fire leaf big small old new long short fast slow warm cold good soft
loud dark light quick the and one two three here there up down left right early late""".split()})
COPY_EXTRA = "café naïve Zürich señor über łódź 猫 犬 été ñandú Ørsted 日本 привет мир ✓ → € 😀".split()

HELD_OUT_SHARE = 8  # one input in eight is held out
CASES = ("upper", "lower", "title")


@dataclass(frozen=True)
class Example:
    """One instruction: canonical ``key`` of the input, user ``prompt`` and the right ``answer``.

    ``split`` and ``key`` decide whether it is held out; the yes/no tasks share one split.
    """

    split: str
    key: str
    prompt: str
    answer: str
    thought: str = ""

    @property
    def held_out(self) -> bool:
        return is_held_out(self.split, self.key)


@dataclass(frozen=True)
class Task:
    """``make(rng, wide)`` draws an example; ``score(answer, example)`` is in [0, 1]; ``weight`` is its share of training."""

    name: str
    make: Callable[[random.Random, bool], Example]
    score: Callable[[str, Example], float]
    weight: float
    exact: bool = True


def is_held_out(split: str, key: str) -> bool:
    """Whether the input ``key`` is kept out of training."""
    return hashlib.sha256(f"{split}\n{key}".encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw(task: Task, rng: random.Random, held_out: bool, wide: bool = False) -> Example:
    """The next example of the wanted split; inputs of the other split are drawn over."""
    while True:
        example = task.make(rng, wide)
        if example.held_out == held_out:
            return example


def held_out_examples(task: Task, count: int, seed: int = 0) -> list[Example]:
    """``count`` held-out examples of ``task`` with distinct inputs, or all there are; the same for the same ``seed``."""
    rng, seen = random.Random(f"held-out {task.name} {seed}"), set()
    examples: list[Example] = []
    repeated = 0
    while len(examples) < count and repeated < 5000:
        example = draw(task, rng, held_out=True)
        repeated = repeated + 1 if example.key in seen else 0
        if not repeated:
            seen.add(example.key)
            examples.append(example)
    return examples


# ── the exact tasks ───────────────────────────────────────────────────────────────────────────────────────────────────


def exact_score(answer: str, example: Example) -> float:
    return float(answer.strip() == example.answer)


def make_json(rng: random.Random, wide: bool = False) -> Example:  # noqa: ARG001
    kind = rng.choice(("person", "pet", "order"))
    record: dict[str, str | int]
    if kind == "person":
        name, age, city, job = rng.choice(NAMES), rng.randint(10, 99), rng.choice(CITIES), rng.choice(JOBS)
        if rng.random() < 0.5:
            record = {"name": name, "age": age, "city": city}
            sentence = rng.choice((
                f"{name} is {age} years old and lives in {city}.",
                f"{name} from {city} is {age} years old.",
                f"In {city} lives {name}, who is {age}.",
            ))
        else:
            record = {"name": name, "job": job, "city": city}
            sentence = rng.choice((
                f"{name} works as a {job} in {city}.",
                f"The {job} {name} lives in {city}.",
                f"{name} is a {job} from {city}.",
            ))
    elif kind == "pet":
        name, animal, colour = rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(COLOURS)
        record = {"name": name, "animal": animal, "colour": colour}
        sentence = rng.choice((
            f"{name} is a {colour} {animal}.",
            f"The {colour} {animal} is called {name}.",
            f"We have a {animal} named {name}, and it is {colour}.",
        ))
    else:
        name, count, thing, colour = rng.choice(NAMES), rng.randint(2, 99), rng.choice(OBJECTS), rng.choice(COLOURS)
        record = {"buyer": name, "item": f"{colour} {thing}", "count": count}
        sentence = rng.choice((
            f"{name} buys {count} of the {colour} {thing}.",
            f"Please send {name} the {colour} {thing}, {count} times.",
            f"{count} times the {colour} {thing} for {name}.",
        ))
    answer = json.dumps(record, ensure_ascii=False)
    prompt = rng.choice((f"Turn this into JSON: {sentence}", f"Write as JSON: {sentence}", f"{sentence} As JSON, please."))
    return Example("json", answer, prompt, answer, f"Fields: {', '.join(record)}.")


def make_sort(rng: random.Random, wide: bool = False) -> Example:  # noqa: ARG001
    numbers = rng.sample(range(10, 100), rng.randint(3, 5))
    text = " ".join(map(str, numbers))
    answer = " ".join(map(str, sorted(numbers)))
    prompt = rng.choice((f"Sort these numbers: {text}", f"Put in order: {text}", f"Sort {text}"))
    return Example("sort", answer, prompt, answer, f"{len(numbers)} numbers, from {min(numbers)} to {max(numbers)}.")


def make_add(rng: random.Random, wide: bool = False) -> Example:  # noqa: ARG001
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    prompt = rng.choice((f"Add {a} and {b}.", f"What is {a} + {b}?", f"{a} + {b} ="))
    ones = f"{a % 10} and {b % 10} make {a % 10 + b % 10}"
    tens = f"{a // 10} and {b // 10} make {a // 10 + b // 10}"
    return Example("add", f"{min(a, b)} {max(a, b)}", prompt, str(a + b), f"Ones: {ones}. Tens: {tens}.")


def make_case(rng: random.Random, wide: bool = False) -> Example:
    words, case = rng.choices(WORDS, k=rng.randint(2, 5) if wide else rng.randint(1, 3)), rng.choice(CASES)
    text = " ".join(words)
    if case == "upper":
        prompt, answer = rng.choice((f"Write in capitals: {text}", f"Make this upper case: {text}")), text.upper()
    elif case == "lower":
        prompt, answer = rng.choice((f"Write in lower case: {text.upper()}", f"Make this small: {text.upper()}")), text
    else:
        prompt, answer = rng.choice((f"Capitalize each word: {text}", f"Write as a title: {text}")), text.title()
    return Example("case", f"{case} {text}", prompt, answer, f"{len(words)} words, {case} case.")


def make_reverse(rng: random.Random, wide: bool = False) -> Example:
    words = rng.choices(WORDS, k=rng.randint(3, 6 if wide else 5))
    text = " ".join(words)
    prompt = rng.choice((f"Reverse these words: {text}", f"Say backwards: {text}", f"Reverse {text}"))
    return Example("reverse", text, prompt, " ".join(reversed(words)), f"{len(words)} words, the last is {words[-1]}.")


def make_compare(rng: random.Random, wide: bool = False) -> Example:  # noqa: ARG001
    a, b = rng.sample(range(0, 100), 2)
    word = rng.choice(("greater", "less"))
    yes = (a > b) == (word == "greater")
    return Example("compare", f"{a} {word} {b}", f"Is {a} {word} than {b}?", "yes" if yes else "no", f"{a} and {b}.")


def make_find(rng: random.Random, wide: bool = False) -> Example:  # noqa: ARG001
    words = rng.sample(WORDS, rng.randint(3, 6))
    wanted = rng.choice(words) if rng.random() < 0.5 else rng.choice(WORDS)
    text = " ".join(words)
    prompt = rng.choice((f"Is the word {wanted} in this list? {text}", f"Does this list have {wanted}? {text}"))
    return Example("compare", f"{wanted} in {text}", prompt, "yes" if wanted in words else "no", f"Looking for {wanted}.")


def make_copy(rng: random.Random, wide: bool = False) -> Example:
    kind = rng.random()
    if kind < 0.5:
        pieces = rng.choices(WORDS + NAMES + CITIES, k=rng.randint(2, 7 if wide else 4))
    elif kind < 0.8:
        pieces = [str(rng.randint(0, 9999)) for _ in range(rng.randint(1, 4 if wide else 2))]
    else:
        pieces = rng.choices(COPY_EXTRA, k=rng.randint(1, 2 if wide else 1))
        pieces += rng.choices(WORDS, k=rng.randint(0, 3 if wide else 1))
        rng.shuffle(pieces)
    text = " ".join(pieces)
    return Example("copy", text, rng.choice((f"Repeat: {text}", f"Copy this: {text}")), text, f"{len(pieces)} parts.")


# ── stories ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# A story is a walk through these stages; each stage offers several wordings.  Slots in capitals are fixed by the prompt
# or by the first mention, so a later sentence can be told from an earlier one and the other way round.
STAGES: tuple[tuple[str, ...], ...] = (
    ("Once there was a {COLOUR} {ANIMAL} named {NAME}.", "{NAME} was a {COLOUR} {ANIMAL}.",
     "Long ago there lived a {COLOUR} {ANIMAL} named {NAME}."),
    ("{NAME} lived near the {HOME}.", "{NAME} had a small house by the {HOME}.",
     "The {ANIMAL} loved the {HOME} where it lived."),
    ("Every day {NAME} ate {FOOD} and looked at the sky.", "{NAME} liked {FOOD} more than anything.",
     "In the morning {NAME} had {FOOD} with a friend."),
    ("One day {NAME} went to the {PLACE}.", "One night {NAME} walked to the {PLACE} alone.",
     "Then the {ANIMAL} came to the {PLACE}."),
    ("There {NAME} saw a {OBJECT} on the ground.", "There, under a tree, was a {OBJECT}.",
     "{NAME} found a {OBJECT} behind a wall."),
    ("\"Whose {OBJECT} is this?\" said {NAME}.", "\"What a good {OBJECT}!\" said the {ANIMAL}.",
     "{NAME} was {MOOD} and took the {OBJECT}."),
    ("Soon {FRIEND} the {KIND} came by.", "Then a {KIND} named {FRIEND} came out of the dark.",
     "A {KIND} was there too, and its name was {FRIEND}."),
    ("\"That {OBJECT} is mine,\" said {FRIEND}.", "{FRIEND} said, \"I lost my {OBJECT} here.\"",
     "{FRIEND} was {MOOD} and looked for the {OBJECT}."),
    ("{NAME} gave the {OBJECT} to {FRIEND}.", "\"Here it is,\" said {NAME} to {FRIEND}.",
     "So the {ANIMAL} gave it back to the {KIND}."),
    ("{FRIEND} was {MOOD} and shared some {FOOD}.", "{FRIEND} and {NAME} ate {FOOD} together.",
     "\"Thank you,\" said {FRIEND}, and they ate {FOOD}."),
    ("They played in the {PLACE} until late.", "They ran around the {PLACE} all day.",
     "The two friends stayed in the {PLACE} until the moon came up."),
    ("At night {NAME} went home to the {HOME}.", "Then the {COLOUR} {ANIMAL} walked back to the {HOME}.",
     "{NAME} and {FRIEND} walked to the {HOME} together."),
    ("From then on {NAME} and {FRIEND} were friends.", "The {ANIMAL} and the {KIND} were friends for a long time.",
     "{NAME} was never lonely again."),
)
OPTIONAL_STAGES = {1, 2, 5, 7, 10, 11}
NARROW_STAGES = [index for index in range(len(STAGES)) if index not in (5, 7, 10)]
NARROW_WORDINGS = 2  # of each stage
SLOT_WORDS = {"NAME": NAMES, "FRIEND": NAMES, "ANIMAL": ANIMALS, "KIND": ANIMALS, "COLOUR": COLOURS, "HOME": PLACES,
              "PLACE": PLACES, "OBJECT": OBJECTS, "FOOD": FOODS, "MOOD": MOODS}


def make_story(rng: random.Random, wide: bool = False) -> Example:
    name, friend = rng.sample(NAMES, 2)
    animal, kind = rng.sample(ANIMALS, 2)
    home, place = rng.sample(PLACES, 2)
    slots = {"NAME": name, "FRIEND": friend, "ANIMAL": animal, "KIND": kind, "COLOUR": rng.choice(COLOURS),
             "HOME": home, "PLACE": place, "OBJECT": rng.choice(OBJECTS), "FOOD": rng.choice(FOODS)}
    if wide:
        stages = [stage for index, stage in enumerate(STAGES) if index not in OPTIONAL_STAGES or rng.random() < 0.7]
    else:
        stages = [STAGES[index][:NARROW_WORDINGS] for index in NARROW_STAGES]
    sentences = [rng.choice(stage).format(**slots, MOOD=rng.choice(MOODS)) for stage in stages]
    thing = slots["OBJECT"]
    prompt = rng.choice((f"Write a story about a {animal} named {name} and a {thing}.",
                         f"Tell me a story about {name} the {animal} and a {thing}.",
                         f"A story, please: {name}, a {animal}, a {thing}."))
    return Example("story", f"{name} {animal} {thing}", prompt, " ".join(sentences), f"A {animal}, {name}, a {thing}.")


def _sentence_pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for slot, words in SLOT_WORDS.items():
        pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>{'|'.join(words)})", 1).replace(f"{{{slot}}}", f"(?P={slot})")
    return re.compile(pattern)


_STAGE_PATTERNS = [[_sentence_pattern(template) for template in stage] for stage in STAGES]


def story_score(answer: str, example: Example) -> float:
    """Share of the answer that is a well-formed story about what was asked.

    The answer is read sentence by sentence through the stages, in order.  A sentence counts when it has one of the
    wordings of a stage at or after the last one and its slots agree with the prompt and with the sentences before.
    The score is the length of what counts over the length of the whole answer; it is 0 when a required stage is missing.
    """
    name, animal, thing = example.key.split(" ")
    slots = {"NAME": name, "ANIMAL": animal, "OBJECT": thing}
    text, position, counted, next_stage, seen = answer.strip(), 0, 0, 0, set()
    while position < len(text):
        for stage in range(next_stage, len(STAGES)):
            for pattern in _STAGE_PATTERNS[stage]:
                match = pattern.match(text, position)
                if match and all(slots.get(slot, word) == word for slot, word in match.groupdict().items() if slot != "MOOD"):
                    break
            else:
                continue
            break
        else:  # no wording fits: skip to the next sentence
            following = re.compile(r'[.!?]"? ').search(text, position)
            position = following.end() if following else len(text)
            continue
        slots |= {slot: word for slot, word in match.groupdict().items() if slot != "MOOD"}
        counted += match.end() - position
        seen.add(stage)
        next_stage, position = stage + 1, match.end() + 1
        counted += position <= len(text)
    if not text or set(range(len(STAGES))) - OPTIONAL_STAGES - seen:
        return 0.0
    return counted / len(text)


TASKS: dict[str, Task] = {task.name: task for task in (
    Task("json", make_json, exact_score, 0.15),
    Task("sort", make_sort, exact_score, 0.22),
    Task("add", make_add, exact_score, 0.22),
    Task("case", make_case, exact_score, 0.11),
    Task("reverse", make_reverse, exact_score, 0.10),
    Task("compare", make_compare, exact_score, 0.04),
    Task("find", make_find, exact_score, 0.04),
    Task("copy", make_copy, exact_score, 0.04),
    Task("story", make_story, story_score, 0.08, exact=False),
)}
