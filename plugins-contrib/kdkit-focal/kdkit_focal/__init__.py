"""A loss for kdkit: forward KL with a weight on tokens that the student has not learned."""
