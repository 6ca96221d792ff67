"""Studies of fine-tuned models: protocols over several tasks, figures, reports."""
