"""Learning from the student's own completions: their rows, batches, gradients and the buffer that keeps them."""
