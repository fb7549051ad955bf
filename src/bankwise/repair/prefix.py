"""Reading the same prompts again with one layer changed, without computing the layers below it again.

`PrefixReader` is an `Engine`. While it records, it keeps what enters each decoder layer and the key-value cache; while
it resumes at a layer, the layers below that one are not run. Everything after the prefill (answers, probes, generation)
is the engine's own, so a resumed reading is the reading of the changed model.

Shapes: P prompts, S columns (tokens), D hidden, W windows.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bankwise.evaluation.engine import Engine, Prefix, Request


class PrefixStates:
    """One forward pass of left-padded rows, from which passes with a change at some layer go on."""

    def __init__(self, model: PreTrainedModel, ids_PS: Tensor, mask_PS: Tensor) -> None:
        self._model = model
        self._inputs: list[Tensor] = []
        """What enters each decoder layer, [P, S, D]."""
        self._arguments: list[dict[str, Any]] = []
        """What else each decoder layer is given: mask, positions."""
        self.cache = DynamicCache(config=model.config)
        hooks = [block.register_forward_pre_hook(self._keep, with_kwargs=True) for block in model.model.layers]
        try:
            self.hidden_PSD = model.model(
                input_ids=ids_PS,
                attention_mask=mask_PS,
                position_ids=(mask_PS.cumsum(dim=1) - 1).clamp_min(0),
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, _block: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
        self._inputs.append(inputs[0] if inputs else arguments["hidden_states"])
        self._arguments.append({name: value for name, value in arguments.items() if name != "hidden_states"})

    def from_layer(self, layer: int) -> tuple[Tensor, DynamicCache]:
        """Last hidden states [P, S, D] and cache of a pass that runs `layer` and those above it, as they are now."""
        cache = DynamicCache(config=self._model.config)
        for below in range(layer):
            # A shallow copy: layers append by concatenation, so what is kept here stays as it is.
            cache.layers[below : below + 1] = [copy.copy(self.cache.layers[below])]
        hidden_PSD = self._inputs[layer]
        for block, arguments in zip(self._model.model.layers[layer:], self._arguments[layer:], strict=True):
            output = block(hidden_PSD, **arguments | {"past_key_values": cache})
            hidden_PSD = output[0] if isinstance(output, tuple) else output
        return self._model.model.norm(hidden_PSD), cache


class PrefixReader(Engine):
    """An engine that reads rows whole, and can resume at a layer what it has recorded.

    What is read while resuming must have been recorded under the same weights below that layer; other rows are read
    from the start.
    """

    _records = False
    _layer: int | None = None
    _states: dict[bytes, PrefixStates]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the states of everything that is read inside; what was kept before is dropped."""
        self._states, self._records = {}, True
        try:
            yield
        finally:
            self._records = False

    @contextmanager
    def resuming(self, layer: int) -> Iterator[None]:
        """Read inside from the input of `layer` on."""
        self._layer = layer
        try:
            yield
        finally:
            self._layer = None

    @torch.no_grad()
    def window_states(self, windows_WS: Tensor) -> Tensor:
        """Last hidden states [W, S, D] of token windows, read together."""
        windows_WS = windows_WS.to(self.device)
        return self._pass(windows_WS, torch.ones_like(windows_WS))[0]

    def _prefill(self, requests: list[Request]) -> Prefix:
        columns = max(len(request.ids) for request in requests)
        ids_PS = torch.zeros(len(requests), columns, dtype=torch.long)
        mask_PS = torch.zeros(len(requests), columns, dtype=torch.long)
        for row, request in enumerate(requests):
            ids_PS[row, -len(request.ids) :] = torch.tensor(request.ids)
            mask_PS[row, -len(request.ids) :] = 1
        ids_PS, mask_PS = ids_PS.to(self.device), mask_PS.to(self.device)
        hidden_PSD, cache = self._pass(ids_PS, mask_PS)
        return Prefix(cache, mask_PS, hidden_PSD[:, -1])

    def _pass(self, ids_PS: Tensor, mask_PS: Tensor) -> tuple[Tensor, DynamicCache]:
        key = ids_PS.cpu().numpy().tobytes()
        was_training = self.model.training
        self.model.eval()
        try:
            with self._precision(ids_PS.numel()):
                if self._layer is not None and key in self._states:
                    return self._states[key].from_layer(self._layer)
                states = PrefixStates(self.model, ids_PS, mask_PS)
        finally:
            self.model.train(was_training)
        if self._records:
            self._states[key] = states
        # The kept cache must not grow by what this reading appends.
        cache = copy.copy(states.cache)
        cache.layers = [copy.copy(layer) for layer in states.cache.layers]
        return states.hidden_PSD, cache
