"""What a step would cost on devices that are not there, and what would suit them better."""
