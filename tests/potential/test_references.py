import pytest
import torch

from atomeq.potential.references import AtomicReferences, least_squares_shift


def test_shift_and_scale_are_applied_per_atom():
    references = AtomicReferences({1: -13.5, 8: -2000.0}, scale=2.0)
    energies = references(torch.tensor([0.5, 0.25]), torch.tensor([1, 8]))
    assert energies.dtype == torch.float64
    torch.testing.assert_close(energies, torch.tensor([-12.5, -1999.5], dtype=torch.float64))


def test_elements_are_those_with_a_shift():
    assert AtomicReferences({8: 0.0, 1: 0.0}).elements == (1, 8)
    assert AtomicReferences().elements == tuple(range(1, 119))


def test_references_stay_float64_in_a_float32_network():
    references = AtomicReferences({29: -4.1234567890123456}).to(torch.float32)
    assert references.shift.dtype == torch.float64
    assert references.shift[29].item() == -4.1234567890123456
    assert references.known.dtype == torch.bool


def test_least_squares_finds_additive_energies():
    waters = [torch.tensor([1, 1, 8]), torch.tensor([8, 8]), torch.tensor([1, 8])]
    energies = [2 * -13.0 - 2000.0, -4000.0, -2013.0]
    shift = least_squares_shift(waters, energies)
    assert shift == pytest.approx({1: -13.0, 8: -2000.0}, rel=1e-12)


def test_robust_least_squares_do_not_follow_a_few_wild_structures():
    """Frames under pressure miss by tens of eV, and are no reason to move what oxygen is worth."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([1, 8, 29])
    some = [kinds[torch.randint(3, (7,), generator=generator)] for _ in range(40)]
    true = {1: 0.1, 8: -0.7, 29: 0.0}
    energies = [sum(true[z] for z in numbers.tolist()) for numbers in some]
    energies[:4] = [energy + 70.0 for energy in energies[:4]]
    assert least_squares_shift(some, energies, robust=True) == pytest.approx(true, abs=2e-3)
    assert abs(least_squares_shift(some, energies)[8] - true[8]) > 0.3


def test_one_stoichiometry_shares_its_energy():
    shift = least_squares_shift([torch.tensor([1, 1, 8])] * 3, [-9.0, -9.0, -9.0])
    assert 2 * shift[1] + shift[8] == pytest.approx(-9.0)


def test_least_squares_refuses_a_mismatch():
    with pytest.raises(ValueError, match="one energy per structure"):
        least_squares_shift([torch.tensor([1])], [])


def test_files_from_before_offset_and_force_scale_mean_their_defaults():
    old = AtomicReferences({29: -1.0}, scale=2.5).state_dict()
    del old["offset"], old["force_scale"]
    references = AtomicReferences()
    references.load_state_dict(old, strict=True)
    assert (float(references.offset), float(references.force_scale)) == (0.0, 2.5)


def test_a_scale_of_each_element_begins_as_that_of_all_and_is_loaded():
    references = AtomicReferences({1: -13.5, 8: -2000.0}, scale=2.0)
    energies, numbers = torch.tensor([0.5, 0.25, -1.0]), torch.tensor([1, 8, 8])
    before = references(energies, numbers)
    references.train_elements("scale")
    assert torch.equal(references(energies, numbers), before)
    assert [name for name, _ in references.named_parameters()] == ["scale"]
    with torch.no_grad():
        references.scale[8] = 3.0
    expected = torch.tensor([-12.5, -1999.25, -2003.0], dtype=torch.float64)
    torch.testing.assert_close(references(energies, numbers), expected)
    other = AtomicReferences({1: 0.0, 8: 0.0})
    other.load_state_dict(references.state_dict(), strict=True)
    torch.testing.assert_close(other(energies, numbers), expected)
    forces = torch.ones(3, 3)
    assert torch.equal(other.of_derivative("forces", forces), forces)
    other.load_state_dict(AtomicReferences({1: -13.5, 8: -2000.0}, scale=2.0).state_dict())
    assert torch.equal(other(energies, numbers), before)


def test_a_scale_of_the_forces_alone_is_not_trained():
    with pytest.raises(ValueError, match="apart from the energy's"):
        AtomicReferences({29: 0.0}, scale=2.0, force_scale=1.0).train_elements("scale")
