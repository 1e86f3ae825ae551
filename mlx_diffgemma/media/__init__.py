"""Images and videos, and prompts that hold them."""
