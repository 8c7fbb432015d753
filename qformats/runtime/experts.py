"""``QuantExperts``: the experts of a mixture as stacks of packed rows, in place of transformers' stacked parameters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qformats.kernels import dispatch
from qformats.kernels.lower import Lowered
from qformats.runtime.inputs import by_rows, round_inputs
from qformats.runtime.packed import Packed, present

__all__ = ["ExpertStack", "QuantExperts"]


class ExpertStack(Packed):
    """One matrix of every expert, (E, N, K) as E N rows."""

    def __init__(self, segments: Sequence[Lowered], experts: int, compute_dtype: torch.dtype, compute: str) -> None:
        nn.Module.__init__(self)
        self.hold(segments, compute_dtype, compute)
        self.experts = experts
        self.outputs = self.weight_shape[0] // experts

    def product(self, x: Tensor, expert: int) -> Tensor:
        """``x`` (n, K) times the transposed matrix of one expert, (n, N)."""
        return self.multiply(x, expert * self.outputs, (expert + 1) * self.outputs)

    def products(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rows ``offsets[e]:offsets[e + 1]`` of ``x`` (n, K) times the transposed matrix of expert e; where ``groups`` is true."""
        rule = self.input_rules[0][2] if self.input_rules else ""
        given = round_inputs(x, rule) if rule else x
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            planes = [self._buffers[name] for name in self._names[0]]
            made: Tensor = dispatch.grouped(given, planes, self._texts[0], offsets, self.outputs, self.compute)
            return made.to(x.dtype)
        known = self.straight(0) if given.is_cpu else None
        return dispatch.multiply_grouped(given, self.segment(0), offsets, self.outputs, self.compute, known).to(x.dtype)

    @property
    def groups(self) -> bool:
        """Whether all experts are of one scheme, and their inputs are rounded alike and row by row."""
        rules = {rule for _, _, rule in self.input_rules}
        return len(self.layouts) == 1 and len(rules) <= 1 and all(by_rows(rule) for rule in rules)


class QuantExperts(nn.Module):
    """Gated (or plain) feed-forward experts. ``first``: the stacks whose outputs side by side are what ``gate`` takes.

    ``plain``: the model's own module, without parameters; its gate (n, N) -> (n, I) splits and multiplies as the family does.
    ``first_bias``, ``down_bias``: (E, N).
    """

    def __init__(
        self,
        first: dict[str, ExpertStack],
        down: ExpertStack,
        plain: nn.Module,
        first_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = down.experts
        self._first = tuple(first)
        for name, stack in first.items():
            self.add_module(name, stack)
        self.down_proj = down
        plain._parameters.clear()
        self.__dict__["plain"] = plain
        for name, bias in (("first_bias", first_bias), ("down_bias", down_bias)):
            self.register_parameter(name, None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._is_hf_initialized = True

    first_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden`` (n, K), ``top_k_index`` and ``top_k_weights`` (n, k); the weighted sum of the experts' outputs, (n, K)."""
        stacks = [self.get_submodule(name) for name in (*self._first, "down_proj")]
        mixed = self.grouped if all(stack.groups for stack in stacks) else self._one_by_one
        if any("_hf_hook" in stack.__dict__ for stack in stacks):  # their planes may be elsewhere, and no forward of theirs is called
            with ExitStack() as here:
                for stack in stacks:
                    here.enter_context(present(stack))
                return mixed(hidden, top_k_index, top_k_weights)
        return mixed(hidden, top_k_index, top_k_weights)

    def grouped(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens sorted by expert, one product for each stack; nothing here depends on what the tokens chose."""
        count = top_k_index.shape[-1]
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        offsets = torch.searchsorted(experts, torch.arange(self.num_experts + 1, device=experts.device))
        own = experts.clamp(0, self.num_experts - 1)  # rows of no expert come out zero
        x = hidden[order // count]
        parts = [self.get_submodule(name).products(x, offsets) for name in self._first]  # type: ignore[operator]
        first = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self.first_bias is not None:
            first = first + self.first_bias[own].to(first.dtype)
        made = self.down_proj.products(self._gate(first), offsets)
        if self.down_bias is not None:
            made = made + self.down_bias[own].to(made.dtype)
        real = (experts >= 0) & (experts < self.num_experts)
        made = torch.where(real[:, None], made * top_k_weights.reshape(-1)[order, None], 0)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return made[back].view(*top_k_index.shape, -1).sum(-2).to(hidden.dtype)

    def _one_by_one(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in torch.unique(top_k_index).tolist():
            if not 0 <= expert < self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            x = hidden[token]
            parts = [self.get_submodule(name).product(x, expert) for name in self._first]  # type: ignore[operator]
            first = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
            if self.first_bias is not None:
                first = first + self.first_bias[expert].to(first.dtype)
            made = self.down_proj.product(self._gate(first), expert)
            if self.down_bias is not None:
                made = made + self.down_bias[expert].to(made.dtype)
            out.index_add_(0, token, (made * top_k_weights[token, place, None]).to(out.dtype))
        return out

    def _gate(self, x: Tensor) -> Tensor:
        plain: Any = self.__dict__["plain"]
        gate = getattr(plain, "_apply_gate", None) or plain.act_fn
        made: Tensor = gate(x)
        return made

    def to_floats(self, dtype: torch.dtype) -> nn.Module:
        """The module that this one stands for, with stacked parameters of ``dtype``."""
        plain: Any = self.__dict__["plain"]
        first = torch.cat([self._matrices(name, dtype) for name in self._first], 1)
        name = "gate_up_proj" if getattr(plain, "has_gate", True) else "up_proj"
        for leaf, values in ((name, first), ("down_proj", self._matrices("down_proj", dtype))):
            turned = values.transpose(1, 2).contiguous() if getattr(plain, "is_transposed", False) else values
            plain._parameters[leaf] = nn.Parameter(turned, requires_grad=False)
        for leaf, bias in ((f"{name}_bias", self.first_bias), ("down_proj_bias", self.down_bias)):
            if bias is not None:
                plain._parameters[leaf] = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        made: nn.Module = plain.train(self.training)
        return made

    def _matrices(self, name: str, dtype: torch.dtype) -> Tensor:
        stack = self.get_submodule(name)
        assert isinstance(stack, ExpertStack)
        return stack.dequantize(dtype).view(stack.experts, stack.outputs, -1)
