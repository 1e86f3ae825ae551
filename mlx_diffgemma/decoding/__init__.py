"""The decoding loop: sessions, verification, constraints and caches of prompts."""
