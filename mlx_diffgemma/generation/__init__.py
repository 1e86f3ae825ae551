"""What users call: options, generate, infill, decide, chat and traces."""
