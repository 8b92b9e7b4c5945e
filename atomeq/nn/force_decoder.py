"""Force heads of FAENet: three numbers of each atom, which no energy need stand behind."""

from typing import Any, Literal

from torch import Tensor, nn

ForceHead = Literal["simple", "mlp", "res", "res_updown"]
DecoderNorm = Literal["none", "layer", "batch"]

_NORMS: dict[DecoderNorm, Any] = {
    "none": nn.Identity,
    "layer": nn.LayerNorm,
    "batch": nn.BatchNorm1d,
}


class ForceDecoder(nn.Module):
    """A perceptron on each atom, with or without a residual block before it.

    Args:
        head: ``"simple"`` and ``"mlp"`` have one hidden layer, the latter normalised; ``"res"`` and
            ``"res_updown"`` a residual block before it, the latter in fewer channels.
        n_in: Channels of an atom.
        n_hidden: Channels of hidden layers.
        norm: Of hidden layers; ``"batch"`` makes an atom depend on its batch while training.
    """

    def __init__(self, head: ForceHead, n_in: int, n_hidden: int, norm: DecoderNorm) -> None:
        super().__init__()
        self.head = head

        def block(*widths: int, normed: bool = True) -> nn.Sequential:
            layers = [nn.Linear(widths[0], widths[1])]
            layers += [_NORMS[norm](widths[1])] if normed else []
            layers += [nn.SiLU(), *[nn.Linear(widths[1], n) for n in widths[2:]]]
            return nn.Sequential(*layers)

        if head in ("simple", "mlp"):
            self.model = block(n_in, n_hidden, 3, normed=head == "mlp")
        elif head == "res":
            self.mlp_1, self.mlp_2 = block(n_in, n_in), block(n_in, n_in)
            self.mlp_3 = block(n_in, n_hidden, 3)
        else:
            self.mlp_1, self.mlp_2 = block(n_in, n_hidden), block(n_hidden, n_hidden)
            self.mlp_3, self.mlp_4 = block(n_hidden, n_in), block(n_in, n_hidden, 3)

    def forward(self, h: Tensor) -> Tensor:
        """Return (n_atoms, 3)."""
        if self.head == "res":
            return self.mlp_3(self.mlp_2(self.mlp_1(h)) + h)
        if self.head == "res_updown":
            return self.mlp_4(self.mlp_3(self.mlp_2(self.mlp_1(h))) + h)
        return self.model(h)
