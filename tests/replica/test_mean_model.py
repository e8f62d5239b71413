"""The mean of several models: parameters and buffers of all of them."""

from __future__ import annotations

import torch

from starling.actors.replica.mean_model import mean_model


def test_all_models_are_in_the_mean():
    models = [(torch.tensor([1.0, 2.0]), torch.tensor([10.0])), (torch.tensor([3.0, -2.0]), torch.tensor([-4.0]))]
    models.append((torch.tensor([-1.0, 6.0]), torch.tensor([3.0])))
    kept = [(parameters.clone(), buffers.clone()) for parameters, buffers in models]
    parameters, buffers = mean_model(iter(models))
    assert parameters.tolist() == [1.0, 2.0]
    assert buffers.tolist() == [3.0]  # of batch norm, not the first node's 10
    for (before, after), (own, others) in zip(kept, models, strict=True):
        assert torch.equal(before, own)
        assert torch.equal(after, others)


def test_the_mean_of_one_is_itself():
    parameters, buffers = mean_model([(torch.tensor([1.5]), torch.empty(0))])
    assert (parameters.tolist(), buffers.tolist()) == ([1.5], [])
