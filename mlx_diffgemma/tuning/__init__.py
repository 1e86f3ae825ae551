"""Fine-tuning with the model's own objective."""
