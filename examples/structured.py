"""Answers that always satisfy a JSON schema, a regular expression or a list of choices.

python examples/structured.py
"""

import json
from typing import Any

from mlx_diffgemma import chat_ids, generate, load

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "city": {"type": "string"},
    },
    "required": ["name", "age", "city"],
}


def main() -> None:
    model, tokenizer = load("nano")

    def ask(text: str, **constraint: Any) -> str:
        prompt = chat_ids(tokenizer, [{"role": "user", "content": text}])
        return generate(model, tokenizer, prompt, seed=0, **constraint)

    text = "Write as JSON: Anna is 23 years old and lives in Paris."
    person = json.loads(ask(text, json_schema=PERSON))
    print(person["name"], person["age"], person["city"])
    print(ask("Add 12 and 30.", regex="[0-9]{1,4}"))
    print(ask("Is 12 greater than 30?", choices=["yes", "no"]))


if __name__ == "__main__":
    main()
