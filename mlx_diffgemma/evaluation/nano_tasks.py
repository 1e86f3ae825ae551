"""The instruction tasks `nano` is trained on, and how each answer is scored.

Everything is generated: a task draws an *input* (numbers, words, a small record), phrases it as a
prompt and knows the one right answer.  The hash of the input's canonical form decides whether it is
held out, so the phrasing does not matter.  Training draws no held-out input, and evaluation draws
only held-out ones.  The split needs no list.

    >>> import random
    >>> from mlx_diffgemma.evaluation.nano_tasks import TASKS, draw
    >>> example = draw(TASKS["add"], random.Random(0), held_out=True)
    >>> example.prompt, example.answer

There are two ranges of inputs.  Evaluation and most of the training use the narrow range.  Training
begins with the ``wide`` one, which has more words and freer stories.
"""

from __future__ import annotations

import json
import random

from mlx_diffgemma.evaluation.nano_example import Example, Task
from mlx_diffgemma.evaluation.nano_stories import make_story, story_score
from mlx_diffgemma.evaluation.nano_words import (
    ANIMALS,
    CITIES,
    COLOURS,
    COPY_EXTRA,
    JOBS,
    NAMES,
    OBJECTS,
    WORDS,
)

CASES = ("upper", "lower", "title")


def draw(task: Task, rng: random.Random, held_out: bool, wide: bool = False) -> Example:
    """Draw examples until one belongs to the wanted split.

    Args:
        task: The task.
        rng: The source of random numbers.
        held_out: Whether the example is held out.
        wide: Whether it comes from the wide range of inputs.
    """
    while True:
        example = task.make(rng, wide)
        if example.held_out == held_out:
            return example


def held_out_examples(task: Task, count: int, seed: int = 0) -> list[Example]:
    """Draw held-out examples with distinct inputs.

    Args:
        task: The task.
        count: How many examples.
        seed: The same seed gives the same examples.

    Returns:
        ``count`` examples, or all there are.
    """
    rng = random.Random(f"held-out {task.name} {seed}")
    seen = set()
    examples: list[Example] = []
    repeated = 0
    while len(examples) < count and repeated < 5000:
        example = draw(task, rng, held_out=True)
        repeated = repeated + 1 if example.key in seen else 0
        if not repeated:
            seen.add(example.key)
            examples.append(example)
    return examples


def exact_score(answer: str, example: Example) -> float:
    return float(answer.strip() == example.answer)


def make_json(rng: random.Random, wide: bool = False) -> Example:  # noqa: ARG001
    kind = rng.choice(("person", "pet", "order"))
    if kind == "person":
        record, sentence = _person(rng)
    elif kind == "pet":
        record, sentence = _pet(rng)
    else:
        record, sentence = _order(rng)
    answer = json.dumps(record, ensure_ascii=False)
    prompt = rng.choice(
        (
            f"Turn this into JSON: {sentence}",
            f"Write as JSON: {sentence}",
            f"{sentence} As JSON, please.",
        )
    )
    return Example("json", answer, prompt, answer, f"Fields: {', '.join(record)}.")


def _person(rng: random.Random) -> tuple[dict[str, str | int], str]:
    """A record of a person, and a sentence that says the same."""
    name = rng.choice(NAMES)
    age = rng.randint(10, 99)
    city = rng.choice(CITIES)
    job = rng.choice(JOBS)
    if rng.random() < 0.5:
        sentences = (
            f"{name} is {age} years old and lives in {city}.",
            f"{name} from {city} is {age} years old.",
            f"In {city} lives {name}, who is {age}.",
        )
        return {"name": name, "age": age, "city": city}, rng.choice(sentences)
    sentences = (
        f"{name} works as a {job} in {city}.",
        f"The {job} {name} lives in {city}.",
        f"{name} is a {job} from {city}.",
    )
    return {"name": name, "job": job, "city": city}, rng.choice(sentences)


def _pet(rng: random.Random) -> tuple[dict[str, str | int], str]:
    """A record of a pet, and a sentence that says the same."""
    name = rng.choice(NAMES)
    animal = rng.choice(ANIMALS)
    colour = rng.choice(COLOURS)
    sentences = (
        f"{name} is a {colour} {animal}.",
        f"The {colour} {animal} is called {name}.",
        f"We have a {animal} named {name}, and it is {colour}.",
    )
    return {"name": name, "animal": animal, "colour": colour}, rng.choice(sentences)


def _order(rng: random.Random) -> tuple[dict[str, str | int], str]:
    """A record of an order, and a sentence that says the same."""
    name = rng.choice(NAMES)
    count = rng.randint(2, 99)
    thing = rng.choice(OBJECTS)
    colour = rng.choice(COLOURS)
    sentences = (
        f"{name} buys {count} of the {colour} {thing}.",
        f"Please send {name} the {colour} {thing}, {count} times.",
        f"{count} times the {colour} {thing} for {name}.",
    )
    return {"buyer": name, "item": f"{colour} {thing}", "count": count}, rng.choice(sentences)


def make_sort(rng: random.Random, wide: bool = False) -> Example:  # noqa: ARG001
    numbers = rng.sample(range(10, 100), rng.randint(3, 5))
    text = " ".join(map(str, numbers))
    answer = " ".join(map(str, sorted(numbers)))
    prompt = rng.choice((f"Sort these numbers: {text}", f"Put in order: {text}", f"Sort {text}"))
    return Example(
        "sort",
        answer,
        prompt,
        answer,
        f"{len(numbers)} numbers, from {min(numbers)} to {max(numbers)}.",
    )


def make_add(rng: random.Random, wide: bool = False) -> Example:  # noqa: ARG001
    a = rng.randint(0, 99)
    b = rng.randint(0, 99)
    prompt = rng.choice((f"Add {a} and {b}.", f"What is {a} + {b}?", f"{a} + {b} ="))
    ones = f"{a % 10} and {b % 10} make {a % 10 + b % 10}"
    tens = f"{a // 10} and {b // 10} make {a // 10 + b // 10}"
    return Example(
        "add", f"{min(a, b)} {max(a, b)}", prompt, str(a + b), f"Ones: {ones}. Tens: {tens}."
    )


def make_case(rng: random.Random, wide: bool = False) -> Example:
    words = rng.choices(WORDS, k=rng.randint(2, 5) if wide else rng.randint(1, 3))
    case = rng.choice(CASES)
    text = " ".join(words)
    if case == "upper":
        answer = text.upper()
        prompt = rng.choice((f"Write in capitals: {text}", f"Make this upper case: {text}"))
    elif case == "lower":
        answer = text
        capitals = text.upper()
        prompt = rng.choice((f"Write in lower case: {capitals}", f"Make this small: {capitals}"))
    else:
        answer = text.title()
        prompt = rng.choice((f"Capitalize each word: {text}", f"Write as a title: {text}"))
    return Example("case", f"{case} {text}", prompt, answer, f"{len(words)} words, {case} case.")


def make_reverse(rng: random.Random, wide: bool = False) -> Example:
    words = rng.choices(WORDS, k=rng.randint(3, 6 if wide else 5))
    text = " ".join(words)
    prompt = rng.choice(
        (f"Reverse these words: {text}", f"Say backwards: {text}", f"Reverse {text}")
    )
    return Example(
        "reverse",
        text,
        prompt,
        " ".join(reversed(words)),
        f"{len(words)} words, the last is {words[-1]}.",
    )


def make_compare(rng: random.Random, wide: bool = False) -> Example:  # noqa: ARG001
    a, b = rng.sample(range(0, 100), 2)
    word = rng.choice(("greater", "less"))
    yes = (a > b) == (word == "greater")
    return Example(
        "compare",
        f"{a} {word} {b}",
        f"Is {a} {word} than {b}?",
        "yes" if yes else "no",
        f"{a} and {b}.",
    )


def make_find(rng: random.Random, wide: bool = False) -> Example:  # noqa: ARG001
    words = rng.sample(WORDS, rng.randint(3, 6))
    wanted = rng.choice(words) if rng.random() < 0.5 else rng.choice(WORDS)
    text = " ".join(words)
    prompt = rng.choice(
        (f"Is the word {wanted} in this list? {text}", f"Does this list have {wanted}? {text}")
    )
    return Example(
        "compare",
        f"{wanted} in {text}",
        prompt,
        "yes" if wanted in words else "no",
        f"Looking for {wanted}.",
    )


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
    return Example(
        "copy",
        text,
        rng.choice((f"Repeat: {text}", f"Copy this: {text}")),
        text,
        f"{len(pieces)} parts.",
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("json", make_json, exact_score, 0.15),
        Task("sort", make_sort, exact_score, 0.22),
        Task("add", make_add, exact_score, 0.22),
        Task("case", make_case, exact_score, 0.11),
        Task("reverse", make_reverse, exact_score, 0.10),
        Task("compare", make_compare, exact_score, 0.04),
        Task("find", make_find, exact_score, 0.04),
        Task("copy", make_copy, exact_score, 0.04),
        Task("story", make_story, story_score, 0.08, exact=False),
    )
}
