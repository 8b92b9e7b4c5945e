"""Properties of structures from energies, forces and stresses of many of them at once.

Equations of state, elastic constants, phonons, elastic bands, relaxations before all of these: one
function each, which `atomeq` calls by the same name. How atoms move is in dynamics/, how files are
read and written, and what is told on the way, in cli/.
"""
