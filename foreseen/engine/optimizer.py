"""The optimizer: parameter groups from an objective's rules, the lr of a step, and a step that can be skipped.

A step with a non-finite gradient is skipped on the device: torch's fused optimizers leave weights and moments alone
where `found_inf` is 1, the attribute that a GradScaler sets, so the host need not wait to learn of it. Optimizers
without it read the flag on the host, which waits for the device once a step.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from torch import Tensor, nn
from torch.optim import Optimizer

from foreseen.config import Optim
from foreseen.engine.lars import LARS
from foreseen.engine.objective import ParameterRule
from foreseen.engine.schedule import cosine, scaled_lr, warmup_cosine
from foreseen.errors import BadInput

_GROUP = "group"


class SteppedOptimizer:
    """An optimizer whose lr is a function of the step.

    Args:
        module: whose parameters are trained.
        rules: one per trained parameter, by name.
        optim: the config's section, with `warmup_steps` resolved.
        global_size: samples per step.
        total_steps: length of the run.

    Attributes:
        parameters: the trained ones, by name.
        peak_lr: of parameters without a scale of their own.
        waits_for_device: whether each step reads on the host if it is finite.
    """

    def __init__(
        self, module: nn.Module, rules: Mapping[str, ParameterRule], optim: Optim, *, global_size: int, total_steps: int
    ) -> None:  # fmt: skip
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if trained.keys() != rules.keys():
            raise ValueError(f"rules and trained parameters differ: {sorted(trained.keys() ^ rules.keys())}")
        self._optim = optim
        self._total_steps = total_steps
        self.peak_lr = scaled_lr(optim.base_lr, optim.lr_scaling, global_size, optim.lr_reference_batch)
        self.parameters = trained
        self._rules: list[ParameterRule] = []
        self._clip_group = {name: rule.clip_group for name, rule in rules.items()}
        self.optimizer = _build(self._groups(trained, rules), optim, self.peak_lr)
        self.skips_on_device = bool(self.optimizer.defaults.get("fused"))
        self.waits_for_device = not self.skips_on_device and any(p.device.type != "cpu" for p in trained.values())
        self._settings = set(self.optimizer.param_groups[0])
        self._frozen = [trained[name] for name, rule in rules.items() if rule.lr_scale == 0.0]

    def _groups(self, trained: dict[str, nn.Parameter], rules: Mapping[str, ParameterRule]) -> list[dict[str, Any]]:
        by_rule: dict[ParameterRule, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            by_rule.setdefault(rules[name], []).append(parameter)
        self._rules = list(by_rule)
        return [
            {"params": params, "weight_decay": self._optim.weight_decay if rule.decay else 0.0}
            for rule, params in by_rule.items()
        ]

    def clip_groups(self) -> dict[str, list[Tensor]]:
        """The gradients at hand, by the group that a rule names."""
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                groups.setdefault(self._clip_group[name], []).append(parameter.grad)
        return groups

    def lr(self, step: int) -> float:
        """The lr of parameters without a scale of their own, in a step."""
        optim = self._optim
        return warmup_cosine(
            step,
            peak=self.peak_lr,
            end=optim.min_lr,
            warmup_steps=optim.warmup_steps or 0,
            total_steps=self._total_steps,
            ends_at_peak=optim.warmup_ends_at_peak,
        )

    def weight_decay(self, step: int) -> float:
        """Weight decay in a step, of parameters that have any."""
        optim = self._optim
        end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
        return cosine(step, start=optim.weight_decay, end=end, total_steps=self._total_steps)

    def drop_frozen(self) -> None:
        """Forget the gradients of what never moves: they are not clipped, judged or remembered."""
        for parameter in self._frozen:
            parameter.grad = None

    def step(self, step: int, finite: Tensor) -> None:
        """Make update number `step` with the gradients at hand, unless they are not finite.

        Args:
            step: from 0.
            finite: boolean scalar on the device, the same on every rank.
        """
        lr, weight_decay = self.lr(step), self.weight_decay(step)
        for group, rule in zip(self.optimizer.param_groups, self._rules, strict=True):
            frozen = step < rule.frozen_steps
            risen = min(1.0, (step - rule.frozen_steps + 1) / max(1, rule.ramp_steps))
            group["lr"] = 0.0 if frozen else lr * rule.lr_scale * risen
            group["weight_decay"] = weight_decay if rule.decay else 0.0
            if frozen and rule.drops_gradient:
                for parameter in group["params"]:
                    parameter.grad = None
        if self.skips_on_device:
            self.optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the optimizer remembers: tensors and plain numbers, under `<what>/<parameter's name>`."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for key, value in self._remembered():
            if isinstance(value, Tensor):
                tensors[key] = value
            elif isinstance(value, int | float):
                numbers[key] = value
            else:
                raise BadInput(
                    f"optim.name {self._optim.name!r} keeps {key!r} of type {type(value).__name__}, which a "
                    "checkpoint cannot hold; choose another optimizer"
                )
        return tensors, numbers

    def _remembered(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self.parameters.items():
            for what, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{what}/{name}", value
        # Some optimizers count their steps in the group rather than per parameter.
        for number, group in enumerate(self.optimizer.param_groups):
            for what in sorted(group.keys() - self._settings):
                yield f"{_GROUP}/{number}/{what}", group[what]

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Take back what `state` gave; what is remembered since then is forgotten."""
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            for what in group.keys() - self._settings:
                del group[what]
        for key, value in {**tensors, **numbers}.items():
            what, _, name = key.partition("/")
            if what == _GROUP:
                number, _, entry = name.partition("/")
                group = self.optimizer.param_groups[int(number)]
                group[entry] = value.clone() if isinstance(value, Tensor) else value
                continue
            parameter = self.parameters[name]
            if isinstance(value, Tensor):
                # Step counts and the like live on the device where the optimizer is fused, else on the CPU; of a
                # parameter that is one number its moments look like them.
                counts = value.ndim == 0 and (parameter.ndim > 0 or what == "step")
                on_host = counts and not self.skips_on_device
                value = value.to("cpu" if on_host else parameter.device, copy=True)
            self.optimizer.state[parameter][what] = value


def _build(groups: list[dict[str, Any]], optim: Optim, lr: float) -> Optimizer:
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps, fused=True)
    if optim.name == "lars":
        return LARS(groups, lr)
    try:
        info = get_optimizer_info(optim.name)
        known: dict[str, Any] = {"betas": optim.betas} if info.has_betas else {}
        known |= {"eps": optim.eps} if info.has_eps else {}
        return create_optimizer_v2(groups, opt=optim.name, lr=lr, weight_decay=optim.weight_decay, **known)
    except (ValueError, AssertionError, RuntimeError, TypeError) as error:
        raise BadInput(f"optim.name {optim.name!r} cannot be built by timm: {error}") from error
