"""Reading the same prompts again with one feed-forward changed, without computing what lies below it again.

`PrefixReader` is an `Engine`. While it records, it keeps what enters the feed-forward of each decoder layer and the
key-value cache; while it resumes at a layer, the layers below and that layer's attention are not run. Everything after
the prefill (answers, probes, generation) is the engine's own, so a resumed reading is the reading of the changed model.

Shapes: P prompts, S columns (tokens), D hidden, W windows.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bankwise.evaluation.engine import Engine, Prefix, Request
from bankwise.ffn.precision import bf16_router_products


class PrefixStates:
    """One forward pass of left-padded rows, from which passes with another feed-forward in some layer go on."""

    def __init__(self, model: PreTrainedModel, ids_PS: Tensor, mask_PS: Tensor) -> None:
        self._model = model
        self._inputs: list[Tensor] = []
        """The residual stream before each feed-forward and its norm, [P, S, D]."""
        self._arguments: list[dict[str, Any]] = []
        """What each decoder layer is given beside its input: mask, positions."""
        self.cache = DynamicCache(config=model.config)
        hooks = [
            hook
            for block in model.model.layers
            for hook in (
                block.register_forward_pre_hook(self._keep_arguments, with_kwargs=True),
                block.post_attention_layernorm.register_forward_pre_hook(self._keep_input),
            )
        ]
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

    def _keep_arguments(self, _block: nn.Module, _inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
        self._arguments.append({name: value for name, value in arguments.items() if name != "hidden_states"})

    def _keep_input(self, _norm: nn.Module, inputs: tuple[Tensor]) -> None:
        self._inputs.append(inputs[0])

    def from_layer(self, layer: int) -> tuple[Tensor, DynamicCache]:
        """Last hidden states [P, S, D] and cache of a pass that runs the feed-forward of `layer` and all layers above,
        as they are now."""
        cache = DynamicCache(config=self._model.config)
        for below in range(layer + 1):
            # A shallow copy: layers append by concatenation, so what is kept here stays as it is.
            cache.layers[below : below + 1] = [copy.copy(self.cache.layers[below])]
        blocks = self._model.model.layers
        hidden_PSD = self._inputs[layer]
        hidden_PSD = hidden_PSD + blocks[layer].mlp(blocks[layer].post_attention_layernorm(hidden_PSD))
        for block, arguments in zip(blocks[layer + 1 :], self._arguments[layer + 1 :], strict=True):
            output = block(hidden_PSD, **arguments | {"past_key_values": cache})
            hidden_PSD = output[0] if isinstance(output, tuple) else output
        return self._model.model.norm(hidden_PSD), cache


class PrefixReader(Engine):
    """An engine that reads rows whole, and can resume at a layer what it has recorded.

    What is read while resuming must have been recorded under the same weights below that layer's feed-forward; other
    rows are read from the start.
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
        """Read inside from the feed-forward of `layer` on."""
        self._layer = layer
        try:
            yield
        finally:
            self._layer = None

    @contextmanager
    def _precision(self, num_tokens: int) -> Iterator[None]:
        # As the model is trained: of a long row the router's float32 products are a third of the feed-forward.
        router = bf16_router_products() if self._uses_bf16(num_tokens) else nullcontext()
        with super()._precision(num_tokens), router:
            yield

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
