"""Learned propagators: particles carried a long step ahead by one forward of a network.

All that is theirs alone stands here: simulated and recorded motion, what a network is shown of it,
batches, training, files on disk, rollouts. The networks are in models/, steps that follow from
forces in dynamics/, and what any fit needs in training/.
"""
