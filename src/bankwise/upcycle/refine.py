"""Gradient refinement of one layer's predictor on captured FFN inputs, with the rest of the model frozen.

The closed form minimises a squared error; this minimises the routing loss itself, KL(q || softmax(z)) per bank.
"""

import torch
from torch import Tensor

from bankwise.ffn import SparseSwiGLU, routing_loss
from bankwise.upcycle.statistics import channel_values

_BATCH = 1024


def refine_predictor(layer: SparseSwiGLU, x_TD: Tensor, *, epochs: int, lr: float, seed: int) -> None:
    """Adam on the predictor of `layer` over inputs x [T, D]; the learning rate falls linearly to 0."""
    steps_per_epoch = max(1, x_TD.shape[0] // _BATCH)
    optimiser = torch.optim.Adam(layer.predictor.parameters(), lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=epochs * steps_per_epoch)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            order_T = torch.randperm(x_TD.shape[0], generator=generator).to(x_TD.device)
            for step in range(steps_per_epoch):
                batch_TD = x_TD[order_T[step * _BATCH : (step + 1) * _BATCH]]
                energy_TF = channel_values(layer, batch_TD)[2]
                loss = routing_loss(
                    layer.predictor(batch_TD),
                    energy_TF,
                    bank_size=layer.bank_size,
                    active_per_bank=layer.active_per_bank,
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    optimiser.zero_grad()
