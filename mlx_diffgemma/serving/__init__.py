"""The HTTP server: an engine that runs many answers side by side, and OpenAI's protocol in front of it."""
