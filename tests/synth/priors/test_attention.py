"""xformers is taken where it works, not where it imports."""

import sys
import types

import torch

from stages.synth.priors.diffusion import use_attention, xformers_works


class Network:
    switched = False

    def enable_xformers_memory_efficient_attention(self):
        self.switched = True


def fake_xformers(monkeypatch, attention):
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.memory_efficient_attention, package.ops = attention, ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def no_kernel(q, k, v):
    raise NotImplementedError("No operator found for memory_efficient_attention_forward\nwith inputs: …")


def test_an_import_without_kernels_falls_back_with_one_line(monkeypatch, caplog):
    fake_xformers(monkeypatch, no_kernel)
    network = Network()
    assert use_attention([network], "xformers", "cpu") == "sdpa" and not network.switched
    (record,) = caplog.records
    assert "No operator found" in record.getMessage() and "\n" not in record.getMessage()


def test_working_kernels_are_used_when_asked_for(monkeypatch):
    fake_xformers(monkeypatch, lambda q, k, v: torch.zeros_like(q))
    network = Network()
    assert xformers_works("cpu") is None
    assert use_attention([network], "xformers", "cpu") == "xformers" and network.switched


def test_auto_does_not_even_look(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "xformers", None)
    for choice in ("auto", "sdpa"):
        assert use_attention([Network()], choice, "cuda") == use_attention([Network()], choice, "cpu") == "sdpa"
    assert not caplog.records
