"""Infrared spectra of molecules: from the Hessian and Born effective charges, or from dynamics.

Both are absolute. Of a normal mode Q the integrated intensity is I = N_A/(12 ε₀ c²) |dμ/dQ|², in
km/mol; of classical dynamics the absorption per wavenumber is that of the power spectrum S of
dμ/dt, A(ν) = N_A/(12 ε₀ c²) S(ν)/kT with ∫ S dν = <|dμ/dt|²>, so that both add up to the same for
harmonic motion (Thomas et al., Phys. Chem. Chem. Phys. 15, 6608 (2013)).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.units import ACCELERATION, BOLTZMANN

#: km/mol of (dμ/dQ)² = 1 e²/amu.
INTENSITY = 974.8801
#: cm⁻¹ of an angular frequency of 1/fs.
_WAVENUMBER = 1e15 / (2 * np.pi * 100 * units._c)


@dataclass(frozen=True)
class InfraredModes:
    """The vibrations of a molecule, by rising frequency.

    Attributes:
        wavenumbers: (n_modes,), cm⁻¹; imaginary ones are negative.
        intensities: Integrated, (n_modes,), km/mol.
        displacements: Of the atoms, mass-weighted and orthonormal, (n_modes, n_atoms, 3).
    """

    wavenumbers: NDArray[np.float64]
    intensities: NDArray[np.float64]
    displacements: NDArray[np.float64]

    def broadened(self, grid: NDArray[np.float64], width: float = 10.0) -> NDArray[np.float64]:
        """Return the spectrum at ``grid`` (cm⁻¹), km/mol per cm⁻¹: Lorentzians of a ``width``."""
        half = width / 2
        lines = half / np.pi / ((grid[:, None] - self.wavenumbers) ** 2 + half**2)
        return lines @ self.intensities


def infrared_modes(
    atoms: Atoms, calculator: AtomeqCalculator, dipoles: AtomeqCalculator | None = None
) -> InfraredModes:
    """Compute the harmonic infrared spectrum of a molecule at a minimum.

    Args:
        atoms: A molecule, not periodic; translations and rotations are taken out of the Hessian.
        calculator: Gives the Hessian.
        dipoles: Gives Born effective charges; by default the same.

    Returns:
        Wavenumbers, intensities and displacements.

    Raises:
        ValueError: The structure is periodic.
    """
    if atoms.pbc.any():
        raise ValueError(
            f"{atoms.get_chemical_formula()} is periodic; an infrared spectrum is of a molecule: "
            "take away pbc, or compute that of a trajectory"
        )
    hessian = calculator.get_hessian(atoms)
    charges = (dipoles or calculator).get_property("born_effective_charges", atoms)
    roots = np.sqrt(atoms.get_masses()).repeat(3)
    rigid = _rigid_motions(atoms)
    keep = np.eye(len(roots)) - rigid @ rigid.T
    values, vectors = np.linalg.eigh(keep @ (hessian / np.outer(roots, roots)) @ keep)
    inner = np.sort(
        np.argsort(np.abs(vectors.T @ rigid).max(axis=1))[: len(roots) - rigid.shape[1]]
    )
    values, vectors = values[inner], vectors[:, inner]
    frequencies = np.sign(values) * np.sqrt(np.abs(values) * ACCELERATION)  # 1/fs
    along = charges.transpose(1, 0, 2).reshape(3, -1) @ (vectors / roots[:, None])
    return InfraredModes(
        wavenumbers=frequencies * _WAVENUMBER,
        intensities=INTENSITY * (along**2).sum(axis=0),
        displacements=vectors.T.reshape(-1, len(atoms), 3),
    )


def _rigid_motions(atoms: Atoms) -> NDArray[np.float64]:
    """Return translations and rotations, mass-weighted and orthonormal, (3 n_atoms, 3 to 6)."""
    roots = np.sqrt(atoms.get_masses())
    centred = atoms.positions - atoms.get_center_of_mass()
    shifts = [roots[:, None] * axis for axis in np.eye(3)]
    turns = [roots[:, None] * np.cross(axis, centred) for axis in np.eye(3)]
    flat = np.array(shifts + turns).reshape(6, -1).T
    left, sizes, _ = np.linalg.svd(flat, full_matrices=False)
    return left[:, sizes > 1e-4 * sizes[0]]  # a linear molecule has two rotations


@dataclass(frozen=True)
class InfraredSpectrum:
    """A spectrum of dynamics.

    Attributes:
        wavenumbers: (n,), cm⁻¹.
        absorption: (n,), km/mol per cm⁻¹.
    """

    wavenumbers: NDArray[np.float64]
    absorption: NDArray[np.float64]


def infrared_spectrum(
    dipoles: Sequence[NDArray[np.float64]],
    *,
    interval: float,
    temperature: float,
    width: float = 10.0,
) -> InfraredSpectrum:
    """Compute the spectrum of a trajectory of dipoles.

    Args:
        dipoles: One for each frame, (n_frames, 3), e·Å.
        interval: Between frames, fs; at most half the shortest period.
        temperature: Of the trajectory, K.
        width: cm⁻¹, of the Gaussian that lines are broadened by.

    Returns:
        Absorption by wavenumber.

    Raises:
        ValueError: There are fewer than 16 frames.
    """
    frames = np.asarray(dipoles, dtype=np.float64)
    if frames.ndim != 2 or frames.shape[1] != 3 or len(frames) < 16:
        raise ValueError(f"a spectrum takes 16 dipoles or more, (n, 3); these are {frames.shape}")
    rates = np.diff(frames, axis=0) / interval  # e·Å/fs, half way between the frames
    n = len(rates)
    power = (np.abs(np.fft.rfft(rates, n=2 * n, axis=0)) ** 2).sum(axis=1)
    correlation = np.fft.irfft(power)[:n] / np.arange(n, 0, -1)
    times = interval * np.arange(n)
    decay = width / _WAVENUMBER / np.sqrt(8 * np.log(2))  # 1/fs
    correlation = correlation * np.exp(-((decay * times) ** 2) / 2)
    density = np.fft.rfft(np.concatenate([correlation, correlation[:0:-1]])).real
    wavenumbers = 2 * np.pi * np.fft.rfftfreq(2 * n - 1, interval) * _WAVENUMBER
    # a difference over an interval sees a rate of frequency w as sin(x)/x of it, x = w dt / 2
    x = wavenumbers / _WAVENUMBER * interval / 2
    density = density / np.sinc(x / np.pi) ** 2
    step = wavenumbers[1]
    total = (
        2 * density / ((2 * n - 1) * step)
    )  # ∫ over positive wavenumbers is the correlation at 0
    kt = BOLTZMANN * temperature * ACCELERATION  # amu·Å²/fs²
    return InfraredSpectrum(np.asarray(wavenumbers, np.float64), INTENSITY * total / kt)
