"""What the harmonics of a GPU are made by."""
