"""What a start says of the machine it is on."""

import logging

import pytest
import torch

from foreseen.config import Compute
from foreseen.engine.launch import _advise_on, keep_float32, start
from foreseen.errors import BadInput


@pytest.mark.parametrize(
    ("precision", "has_bf16", "advised"), [("bf16", False, True), ("bf16", True, False), ("fp16", False, False)]
)
def test_a_gpu_without_bf16_gets_advice(
    precision: str, has_bf16: bool, advised: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with caplog.at_level(logging.WARNING):
        _advise_on(precision, torch.device("cuda"))
    assert ("Tesla V100 has no bf16 arithmetic" in caplog.text) == advised
    assert ("compute.precision=fp16" in caplog.text) == advised


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP .ACCELERATE_USE_FSDP., which this loop cannot drive"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR.*compute.compile=true"),
    ],
)
def test_what_accelerates_config_asks_for_in_vain_is_refused(
    variable: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadInput, match=sentence):
        start(Compute(precision="fp64"))


def test_accumulation_in_accelerates_config_does_not_divide_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones((), requires_grad=True)
    start(Compute(precision="fp64")).backward(3.0 * weight)
    assert weight.grad == 3.0


def test_a_gpu_keeps_float32() -> None:
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        keep_float32()
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
