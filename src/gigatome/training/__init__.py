"""The one training loop, with its optimisers and checkpoints."""
