"""Steps, filters and references are checked before the work, and mean what they say."""

import pytest

from atomeq.screening.expressions import Expression
from atomeq.screening.references import (
    AdsorptionReferences,
    HullReferences,
    MissingReference,
)
from atomeq.screening.rows import NUMBERS
from atomeq.screening.steps import describe_steps, parse_steps, read_steps

ROW = {"energy": -6.0, "n_atoms": 4, "formula": "Cu4", "converged": True, "volume": None}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("energy < -5", True),
        ("-7 < energy < -6.5", False),
        ("energy / n_atoms == -1.5 and converged", True),
        ("not converged or n_atoms > 10", False),
        ("abs(energy) - min(n_atoms, 2) * 2 >= 2", True),
        ("formula in ['Cu4', 'Al']", True),
        ("'Cu' not in formula", False),
    ],
)
def test_filter_means_what_it_says(text, holds):
    assert Expression(text, NUMBERS)(ROW) is holds


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "energy.real < 0",
        "(lambda: 1)()",
        "[x for x in (1, 2)]",
        "energy ** 99",
        "abs(energy, key=max)",
        "energy if converged else 0",
        "f'{energy}'",
        "potential < 0",
        "energy <",
        "(" * 2000,
    ],
)
def test_filter_refuses_what_is_no_condition(text):
    with pytest.raises(ValueError, match="filter"):
        Expression(text, NUMBERS)


def test_filter_does_not_multiply_texts():
    with pytest.raises(TypeError, match="no number"):
        Expression("formula * 1000000000 == ''", NUMBERS)(ROW)


def test_filter_names_the_value_that_is_missing():
    with pytest.raises(LookupError, match="volume"):
        Expression("volume > 1", NUMBERS)(ROW)


def test_described_steps_parse_to_themselves():
    given = [
        "validate",
        {"dedupe": "structure"},
        {"relax": {"cell": True}},
        {"filter": "energy < 0"},
        {"rank": "volume"},
    ]
    steps = parse_steps(given)
    assert parse_steps(describe_steps(steps)) == steps
    assert describe_steps(steps)[2]["relax"]["fmax"] == 0.03


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        (["relaxe"], "no step 'relaxe'"),
        ([{"relax": {"fmaxx": 1}}], "no option 'fmaxx'; it has fmax"),
        ([{"relax": {"fmax": -1}}], "fmax must be positive"),
        (["relax", "validate"], "in the order"),
        (["relax", "relax"], "stands twice"),
        (["relax", "single_point"], "leave single_point out"),
        ([{"committee": {"potentials": ["a"]}}], "needs relax or single_point"),
        ([{"filter": "nothing > 1"}], "names 'nothing'"),
        ([{"rank": "nothing"}], "rank by one of"),
        ([{"properties": {"hull": {"Qq": 1.0}}}], "no formula"),
        ([{"properties": {"slabs": {"Cu": 1.0}}}], "together"),
        ([7], "a step is a name"),
    ],
)
def test_steps_are_refused_at_the_door(steps, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_steps(steps)


def test_steps_are_read_from_yaml(tmp_path):
    path = tmp_path / "steps.yaml"
    path.write_text("steps:\n  - validate\n  - relax: {fmax: 0.1}\n")
    assert read_steps(path) == ["validate", {"relax": {"fmax": 0.1}}]
    path.write_text("relax: 1")
    with pytest.raises(ValueError, match="must hold a list"):
        read_steps(path)


def test_hull_of_a_binary_system():
    """A at -1, B at -3, AB at -2.5 eV per atom: the hull at A3B lies between A and AB."""
    hull = HullReferences({"Cu": -1.0, "Cu2": -0.5, "Au": -3.0, "CuAu": -2.5})
    assert hull.formation_energy("CuAu", -5.0) == pytest.approx(-0.5)
    assert hull.above_hull("CuAu", -5.0) == pytest.approx(0.0)
    on_line = (-1.0 - 2.5) / 2
    assert hull.above_hull("Cu3Au", 4 * on_line + 0.4) == pytest.approx(0.1)
    assert hull.above_hull("CuAu", -5.2) == pytest.approx(-0.1)
    with pytest.raises(MissingReference, match="Al"):
        hull.formation_energy("CuAl", -1.0)


def test_adsorption_energy_takes_slab_and_gas_away():
    references = AdsorptionReferences({"Cu16": -58.0, "Cu8": -29.0}, {"H2": -6.8, "H2O": -14.2})
    assert references.adsorption_energy("Cu16H", -62.0) == pytest.approx(-62 + 58 + 3.4)
    oxygen = -14.2 + 6.8
    assert references.adsorption_energy("Cu16OH", -70.0) == pytest.approx(-12 - oxygen + 3.4)
    with pytest.raises(MissingReference, match="none of the slabs"):
        references.adsorption_energy("Cu4H", -20.0)
    with pytest.raises(MissingReference, match="none of the slabs"):
        references.adsorption_energy("Cu16C", -70.0)
