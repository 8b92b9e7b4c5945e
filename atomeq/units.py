"""Units: eV, Å, fs, amu, e and K inside the package, and the factors that bring others there.

``energy_in_ev = energy_in_hartree * HARTREE`` — every constant is the size of its unit in ours.
Values are CODATA 2018.
"""

EV = 1.0
HARTREE = 27.211386245988
KCAL_PER_MOL = 0.043364104241800934
KJ_PER_MOL = KCAL_PER_MOL / 4.184
RYDBERG = HARTREE / 2
MEV = 1e-3

ANGSTROM = 1.0
BOHR = 0.529177210903

COULOMB_CONSTANT = 14.399645478425668  # eV·Å, e²/4πε₀; 1 Å³ of polarizability is 1/14.4 e²·Å²/eV
DEBYE = 0.2081943325856792  # e·Å
GPA = 0.006241509074460763  # eV/Å³
KILOBAR = GPA / 10

FEMTOSECOND = 1.0
PICOSECOND = 1e3

BOLTZMANN = 8.617333262145177e-05  # eV/K
ACCELERATION = 0.009648533215665327  # Å/fs² of 1 eV/Å on 1 amu
