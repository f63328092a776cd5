"""The only rooms with tensors: from a training state to leaves and values, and back."""
