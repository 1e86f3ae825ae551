"""Talk to a running server with OpenAI's client.

mlx-diffgemma serve                      # in one terminal; needs the extra: server
pip install openai
python examples/server_client.py         # in another
"""

import argparse

from openai import OpenAI

PERSON: dict[str, object] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--model", default="default")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.base_url, api_key="none")

    # 1) A whole answer.
    answer = client.chat.completions.create(
        model=arguments.model, messages=[{"role": "user", "content": "Add 12 and 30."}], seed=0
    )
    print(answer.choices[0].message.content)

    # 2) A stream.  A chunk is a canvas, not a token.
    chunks = client.chat.completions.create(
        model=arguments.model,
        messages=[{"role": "user", "content": "Sort these numbers: 42 17 91"}],
        seed=0,
        stream=True,
    )
    for chunk in chunks:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    # 3) An answer within a schema.
    text = "Write as JSON: Anna is 23 years old and lives in Paris."
    answer = client.chat.completions.create(
        model=arguments.model,
        messages=[{"role": "user", "content": text}],
        seed=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": PERSON},
        },
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
