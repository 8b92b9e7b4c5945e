"""What is known of a pair of atoms before any layer: its vector, and functions of its length."""
