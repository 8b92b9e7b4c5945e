"""What others have published on the test sets of an experiment, for a test to stand beside."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedErrors:
    """Errors of other methods, as an experiment's ``published`` names them.

    Attributes:
        source: Where they were published.
        errors: By method, test set and column of the metrics, in the column's unit.
    """

    source: str = ""
    errors: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def of(self, test_set: str, columns: Container[str]) -> Mapping[str, Mapping[str, float]]:
        """Return the errors on one test set by method.

        Args:
            test_set: Its name.
            columns: Names of the errors that are measured.

        Raises:
            ValueError: An error of a name that is not measured.
        """
        found = {method: sets[test_set] for method, sets in self.errors.items() if test_set in sets}
        unknown = [name for one in found.values() for name in one if name not in columns]
        if unknown:
            raise ValueError(f"published errors are called {unknown[0]!r}, which no test measures")
        return found
