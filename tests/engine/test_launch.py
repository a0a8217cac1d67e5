"""What a start says of the machine it is on."""

import logging

import pytest
import torch

from foreseen.engine.launch import _advise_on


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
