"""The random state of a run is that of its own device: no other one is read, set or woken."""

from __future__ import annotations

import pytest
import torch

from quietvit.errors import QuietvitError
from quietvit.train.order import generator_states, set_generator_states
from test_train_loop import EVERYTHING, assert_same, config, interrupt, run

CPU = torch.device("cpu")


class Gpus:
    """So many GPUs with a number for a state."""

    def __init__(self, monkeypatch, count, current=0):
        self.states = [torch.tensor([float(index)]) for index in range(count)]
        self.current = current
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "get_rng_state", self.get)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)

    def place(self, device):
        return self.current if device.index is None else device.index

    def get(self, device):
        return self.states[self.place(device)].clone()

    def set(self, state, device):
        self.states[self.place(device)] = state


@pytest.mark.parametrize("device", [torch.device("cuda"), torch.device("cuda", 2)])
def test_a_state_goes_to_the_device_of_the_run_on_another_machine(monkeypatch, device):
    there = Gpus(monkeypatch, 8, current=5)
    saved = generator_states(device)
    assert saved["device"] == (5 if device.index is None else 2)
    here = Gpus(monkeypatch, 1)
    set_generator_states(saved, torch.device("cuda", 0))
    assert here.states == [saved["device"]]
    assert [float(state) for state in there.states] == list(range(8))


def test_a_checkpoint_with_the_states_of_all_devices_is_still_read(monkeypatch, caplog):
    old = {**generator_states(CPU), "cuda": [torch.tensor([7.0]), torch.tensor([8.0])]}
    del old["device"]
    gpus = Gpus(monkeypatch, 3, current=1)
    set_generator_states(old, torch.device("cuda"))
    assert [float(state) for state in gpus.states] == [0, 8, 2]
    set_generator_states(old, CPU)
    assert caplog.text == ""
    with pytest.raises(QuietvitError, match=r"states of 2 GPUs, but .* on cuda:2; resume with"):
        set_generator_states(old, torch.device("cuda", 2))


def test_another_kind_of_device_is_told(monkeypatch, caplog):
    on_cpu = generator_states(CPU)
    Gpus(monkeypatch, 1)
    on_gpu = generator_states(torch.device("cuda"))
    set_generator_states(on_gpu, torch.device("cuda"))
    set_generator_states(on_cpu, CPU)
    assert caplog.text == ""
    set_generator_states(on_gpu, CPU)
    set_generator_states(on_cpu, torch.device("cuda"))
    assert caplog.text.count("written on another kind of device") == 2


def test_a_run_on_the_cpu_saves_and_resumes_without_touching_the_gpus(tmp_path, monkeypatch):
    def touched(*_):
        raise AssertionError("a run on the CPU has nothing to do with CUDA's generators")

    expected = run(tmp_path / "whole", **EVERYTHING)
    with monkeypatch.context() as patch:
        for name in ("get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all"):
            patch.setattr(torch.cuda, name, touched)
        interrupt(tmp_path / "run", patch, 5, **EVERYTHING)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        resumed = run(tmp_path / "run", resume=True, **EVERYTHING)
    assert_same(resumed, expected)
    assert config(tmp_path, **EVERYTHING).device == "cpu"
