"""What a training does about total charges and multiplicities of its structures."""

from collections.abc import Sequence
from dataclasses import dataclass

from atomeq.models.base import AtomisticModel
from atomeq.models.charged import Charged


@dataclass(frozen=True)
class Electrons:
    """Whether the model is told of charges and multiplicities, and what is left out of account.

    Attributes:
        charges: Total charges that the model is told of, e; none by default.
        multiplicities: The same of 2S + 1.
        ignore: ``charge`` or ``spin``: train on structures that carry it as if they did not.
    """

    charges: Sequence[int] = ()
    multiplicities: Sequence[int] = ()
    ignore: Sequence[str] = ()

    def told_to(self, model: AtomisticModel) -> AtomisticModel:
        """Return the model, inside a :class:`~atomeq.models.charged.Charged` if it is told."""
        if not self.charges and not self.multiplicities:
            return model
        return Charged(model, charges=self.charges, multiplicities=self.multiplicities)
