"""Training of potentials and scalars: the task, losses, metrics, schedules, callbacks, reports.

Data are read in data/, propagators are trained in propagation/ with the schedules and callbacks of
this room, and the command line of a fit is in cli/.
"""
