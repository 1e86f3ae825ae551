"""Nano's stories: how they are made, and how they are scored."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from mlx_diffgemma.evaluation.nano_example import Example
from mlx_diffgemma.evaluation.nano_words import (
    ANIMALS,
    COLOURS,
    FOODS,
    MOODS,
    NAMES,
    OBJECTS,
    PLACES,
)

# A story goes through these stages; each stage has several wordings.  Slots in capitals are fixed
# by the prompt or by the first mention.  So a later sentence follows from an earlier one, and an
# earlier one from a later one.
STAGES: tuple[tuple[str, ...], ...] = (
    (
        "Once there was a {COLOUR} {ANIMAL} named {NAME}.",
        "{NAME} was a {COLOUR} {ANIMAL}.",
        "Long ago there lived a {COLOUR} {ANIMAL} named {NAME}.",
    ),
    (
        "{NAME} lived near the {HOME}.",
        "{NAME} had a small house by the {HOME}.",
        "The {ANIMAL} loved the {HOME} where it lived.",
    ),
    (
        "Every day {NAME} ate {FOOD} and looked at the sky.",
        "{NAME} liked {FOOD} more than anything.",
        "In the morning {NAME} had {FOOD} with a friend.",
    ),
    (
        "One day {NAME} went to the {PLACE}.",
        "One night {NAME} walked to the {PLACE} alone.",
        "Then the {ANIMAL} came to the {PLACE}.",
    ),
    (
        "There {NAME} saw a {OBJECT} on the ground.",
        "There, under a tree, was a {OBJECT}.",
        "{NAME} found a {OBJECT} behind a wall.",
    ),
    (
        '"Whose {OBJECT} is this?" said {NAME}.',
        '"What a good {OBJECT}!" said the {ANIMAL}.',
        "{NAME} was {MOOD} and took the {OBJECT}.",
    ),
    (
        "Soon {FRIEND} the {KIND} came by.",
        "Then a {KIND} named {FRIEND} came out of the dark.",
        "A {KIND} was there too, and its name was {FRIEND}.",
    ),
    (
        '"That {OBJECT} is mine," said {FRIEND}.',
        '{FRIEND} said, "I lost my {OBJECT} here."',
        "{FRIEND} was {MOOD} and looked for the {OBJECT}.",
    ),
    (
        "{NAME} gave the {OBJECT} to {FRIEND}.",
        '"Here it is," said {NAME} to {FRIEND}.',
        "So the {ANIMAL} gave it back to the {KIND}.",
    ),
    (
        "{FRIEND} was {MOOD} and shared some {FOOD}.",
        "{FRIEND} and {NAME} ate {FOOD} together.",
        '"Thank you," said {FRIEND}, and they ate {FOOD}.',
    ),
    (
        "They played in the {PLACE} until late.",
        "They ran around the {PLACE} all day.",
        "The two friends stayed in the {PLACE} until the moon came up.",
    ),
    (
        "At night {NAME} went home to the {HOME}.",
        "Then the {COLOUR} {ANIMAL} walked back to the {HOME}.",
        "{NAME} and {FRIEND} walked to the {HOME} together.",
    ),
    (
        "From then on {NAME} and {FRIEND} were friends.",
        "The {ANIMAL} and the {KIND} were friends for a long time.",
        "{NAME} was never lonely again.",
    ),
)
OPTIONAL_STAGES = {1, 2, 5, 7, 10, 11}
NARROW_STAGES = [index for index in range(len(STAGES)) if index not in (5, 7, 10)]
NARROW_WORDINGS = 2  # wordings of each stage in the narrow range
SLOT_WORDS = {
    "NAME": NAMES,
    "FRIEND": NAMES,
    "ANIMAL": ANIMALS,
    "KIND": ANIMALS,
    "COLOUR": COLOURS,
    "HOME": PLACES,
    "PLACE": PLACES,
    "OBJECT": OBJECTS,
    "FOOD": FOODS,
    "MOOD": MOODS,
}


def make_story(rng: random.Random, wide: bool = False) -> Example:
    name, friend = rng.sample(NAMES, 2)
    animal, kind = rng.sample(ANIMALS, 2)
    home, place = rng.sample(PLACES, 2)
    slots = {
        "NAME": name,
        "FRIEND": friend,
        "ANIMAL": animal,
        "KIND": kind,
        "COLOUR": rng.choice(COLOURS),
        "HOME": home,
        "PLACE": place,
        "OBJECT": rng.choice(OBJECTS),
        "FOOD": rng.choice(FOODS),
    }
    if wide:
        stages = [
            stage
            for index, stage in enumerate(STAGES)
            if index not in OPTIONAL_STAGES or rng.random() < 0.7
        ]
    else:
        stages = [STAGES[index][:NARROW_WORDINGS] for index in NARROW_STAGES]
    sentences = [rng.choice(stage).format(**slots, MOOD=rng.choice(MOODS)) for stage in stages]
    thing = slots["OBJECT"]
    prompt = rng.choice(
        (
            f"Write a story about a {animal} named {name} and a {thing}.",
            f"Tell me a story about {name} the {animal} and a {thing}.",
            f"A story, please: {name}, a {animal}, a {thing}.",
        )
    )
    return Example(
        "story",
        f"{name} {animal} {thing}",
        prompt,
        " ".join(sentences),
        f"A {animal}, {name}, a {thing}.",
    )


def _sentence_pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for slot, words in SLOT_WORDS.items():
        pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>{'|'.join(words)})", 1).replace(
            f"{{{slot}}}", f"(?P={slot})"
        )
    return re.compile(pattern)


_STAGE_PATTERNS = [[_sentence_pattern(template) for template in stage] for stage in STAGES]


def story_score(answer: str, example: Example) -> float:
    """The share of the answer that is a well-formed story about the topic of the prompt.

    The answer is read sentence by sentence through the stages, in order.  A sentence counts when it
    has one of the wordings of a stage at or after the last one and its slots agree with the prompt
    and with the sentences before.  The score is the length of what counts over the length of the
    whole answer; it is 0 when a required stage is missing.
    """
    name, animal, thing = example.key.split(" ")
    slots = {"NAME": name, "ANIMAL": animal, "OBJECT": thing}
    text = answer.strip()
    position = 0
    counted = 0
    next_stage = 0
    seen = set()
    while position < len(text):
        matched = _match_stage(text, position, next_stage, slots)
        if matched is None:  # no wording fits: skip to the next sentence
            following = re.compile(r'[.!?]"? ').search(text, position)
            position = following.end() if following else len(text)
            continue
        stage, match = matched
        slots |= dict(_fixed_slots(match))
        counted += match.end() - position
        seen.add(stage)
        next_stage = stage + 1
        position = match.end() + 1
        counted += position <= len(text)
    if not text or set(range(len(STAGES))) - OPTIONAL_STAGES - seen:
        return 0.0
    return counted / len(text)


def _match_stage(
    text: str, position: int, first_stage: int, slots: dict[str, str]
) -> tuple[int, re.Match[str]] | None:
    """Find the first stage with a wording that fits the text and the slots.

    Args:
        text: The answer.
        position: Where the sentence begins in it.
        first_stage: The stage at which to begin.
        slots: The values of the slots so far.

    Returns:
        (the stage, the match), or None.
    """
    for stage in range(first_stage, len(STAGES)):
        for pattern in _STAGE_PATTERNS[stage]:
            match = pattern.match(text, position)
            if match and all(slots.get(slot, word) == word for slot, word in _fixed_slots(match)):
                return stage, match
    return None


def _fixed_slots(match: re.Match[str]) -> Iterator[tuple[str, str]]:
    """The slots of a sentence that must agree with the other sentences: all but the mood."""
    for slot, word in match.groupdict().items():
        if slot != "MOOD":
            yield slot, word
