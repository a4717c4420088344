"""A quantizer for kdkit: activation-aware scales before rounding (AWQ), folded into the layers before."""
