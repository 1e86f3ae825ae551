"""Text: the tokenizer, chat templates and their dialects, and tool calls."""
