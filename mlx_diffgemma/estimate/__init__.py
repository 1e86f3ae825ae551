"""What a model costs: memory, floating-point operations and which Macs hold it."""
