"""Fill holes in a text.  The model sees both sides of a hole; the rest returns byte for byte.

python examples/infill.py
"""

from mlx_diffgemma import Hole, infill, load

STORY = "Tell me a story about Mia the fox."


def main() -> None:
    model, tokenizer = load("nano")

    # A marker is a hole.  A number in it is the length in tokens; without it lengths are searched.
    text = "Mia was a red <|hole:1|>. Mia lived near the river."
    print(infill(model, tokenizer, text, STORY, seed=0).text)

    # A constraint limits what a hole can hold.
    age = Hole(regex="[0-9]{2}")
    text = '{"name": "Anna", "age": <|hole|>, "city": "Paris"}'
    prompt = "Turn this into JSON: Anna is 31 years old and lives in Paris."
    print(infill(model, tokenizer, text, prompt, hole=age, seed=0).text)


if __name__ == "__main__":
    main()
