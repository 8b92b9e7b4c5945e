"""An optimizer that trains at other weights than it validates, as ScheduleFree does."""

import torch


class Averaging(torch.optim.SGD):
    """Validates at weights that are larger by 0.01 than those it trains at."""

    def __init__(self, params, lr: float = 0.0) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["train_mode"] = False

    def _move(self, *, train: bool) -> None:
        if self.param_groups[0]["train_mode"] != train:
            self.param_groups[0]["train_mode"] = train
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter += -0.01 if train else 0.01

    def train(self) -> None:
        self._move(train=True)

    def eval(self) -> None:
        self._move(train=False)

    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"]
        return super().step(closure)
