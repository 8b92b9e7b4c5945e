"""Greedy choices against their definitions, computed naively."""

import torch

from atomeq.potential.selection import d_optimal, farthest_points

DIGITS = 1e-9  # float64; a log-determinant of fourteen rows


def pool(n_structures: int = 14, n_features: int = 5) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    scale = 0.1 + torch.rand(n_structures, generator=made, dtype=torch.float64)
    return [
        scale[k] * torch.randn(2 + k % 7, n_features, generator=made, dtype=torch.float64)
        for k in range(n_structures)
    ]


def volume(rows: list[torch.Tensor], everything: torch.Tensor) -> float:
    ridge = 1e-6 * everything.square().mean()
    eye = torch.eye(everything.shape[1], dtype=torch.float64)
    return float(torch.logdet(ridge * eye + sum((one.T @ one for one in rows), 0 * eye)))


def test_d_optimal_is_the_greedy_choice_of_the_largest_volume():
    for known in ([], pool()[:2]):
        features = pool()[2:]
        everything = torch.cat([*features, *known])
        taken: list[int] = []
        for k, gain in d_optimal(features, 6, known):
            rows = [*known, *(features[i] for i in taken)]
            now = volume(rows, everything)
            gains = {
                i: volume([*rows, one], everything) - now
                for i, one in enumerate(features)
                if i not in taken
            }
            assert k == max(gains, key=gains.__getitem__)
            assert abs(gain - gains[k]) < DIGITS * max(1, abs(now))
            taken.append(k)
        assert len(taken) == 6


def test_farthest_is_the_structure_with_the_atom_farthest_from_all_so_far():
    known, features = pool()[:2], pool()[2:]
    seen = torch.cat(known)
    left = set(range(len(features)))
    for k, distance in farthest_points(features, 12, known):
        far = {i: float(torch.cdist(features[i], seen).amin(dim=1).max()) for i in left}
        assert k == max(far, key=far.__getitem__)
        assert abs(distance - far[k]) < DIGITS
        seen = torch.cat([seen, features[k]])
        left.remove(k)
    assert not left


def test_the_first_of_farthest_points_is_the_one_farthest_from_the_mean():
    features = pool()
    middle = torch.cat(features).mean(dim=0)
    far = [float((one.mean(dim=0) - middle).norm()) for one in features]
    ((k, distance),) = farthest_points(features, 1)
    assert (k, distance) == (far.index(max(far)), max(far))
