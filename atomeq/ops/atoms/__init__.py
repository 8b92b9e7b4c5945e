"""What is done to the features of each atom by itself: normalisations, updates."""
