import torch

from atomeq.nn.element_properties import STANDARDISED_UP_TO, element_properties


def test_every_element_up_to_118_has_a_row_of_finite_numbers():
    table = element_properties()
    assert table.values.shape == (119, 14)
    assert table.values.isfinite().all()
    assert (table.values[~table.measured] == 0).all()  # the mean of the column


def test_columns_are_standardised_over_the_elements_that_have_them():
    table = element_properties()
    for column in range(14):
        known = table.measured[1 : STANDARDISED_UP_TO + 1, column]
        values = table.values[1 : STANDARDISED_UP_TO + 1, column][known].double()
        assert abs(float(values.mean())) < 1e-6
        assert abs(float(values.std()) - 1) < 1e-6


def test_periods_and_groups_are_those_of_the_periodic_table():
    table = element_properties()
    assert table.period[[1, 2, 3, 10, 11, 18, 36, 54, 57, 86, 87, 118]].tolist() == [
        *(1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7, 7)
    ]
    assert table.group[[1, 2, 6, 26, 57, 79, 118]].tolist() == [1, 18, 14, 8, 3, 11, 18]
    in_no_group = torch.nonzero(table.group == 0).flatten().tolist()
    assert in_no_group == [0, *range(58, 72), *range(90, 104)]
