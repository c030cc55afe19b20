"""States of Lion: saved, loaded, copied, refused."""

import copy
import io
import pickle

import pytest
import torch

from common import bits_equal, generator
from eager import OPTIONS, parameters, set_grads
from lion_kernels import Lion


def round_trip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("momentum_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_resume(dtype, momentum_dtype):
    """A run that is saved and loaded half-way ends with the bits of one that was not."""

    def build():
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters((300,), (7, 5))]
        return params, Lion(params, **OPTIONS, momentum_dtype=momentum_dtype)

    def train(params, opt, steps):
        for step in steps:
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator(step)).to(dtype)
            opt.step()

    straight, opt = build()
    train(straight, opt, range(6))
    first, saved = build()
    train(first, saved, range(3))
    state = round_trip(saved.state_dict())
    second, loaded = build()
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q)
    loaded.load_state_dict(state)
    train(second, loaded, range(3, 6))
    for p, q in zip(straight, second, strict=True):
        assert bits_equal(p, q)
        assert bits_equal(opt.state[p]["exp_avg"], loaded.state[q]["exp_avg"])


@pytest.mark.parametrize("change", ["shape", "lr"])
def test_a_bad_state_changes_nothing(change):
    params = parameters((6,))
    opt = Lion(params, **OPTIONS)
    set_grads(params, 0)
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    if change == "shape":
        state["state"][0]["exp_avg"] = torch.zeros(5)
    state["param_groups"][0]["lr"] = -3.0 if change == "lr" else 3.0
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"\(6,\), got \(5,\)" if change == "shape" else "lr must"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == before["param_groups"][0]["lr"]
    assert torch.equal(opt.state_dict()["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_hooks_of_a_load_change_and_see_the_state():
    (p,) = parameters((6,))
    opt, seen = Lion([p], **OPTIONS), []
    set_grads([p], 0)
    opt.step()
    m = opt.state[p]["exp_avg"].clone()

    def halve(_, state):
        kept = {"exp_avg": state["state"][0]["exp_avg"] / 2}
        return {**state, "state": {0: kept}}

    opt.register_load_state_dict_pre_hook(halve)
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["exp_avg"].clone()))
    opt.load_state_dict(opt.state_dict())
    assert torch.equal(seen[0], m / 2) and torch.equal(opt.state[p]["exp_avg"], m / 2)
    opt.load_state_dict(opt.state_dict())
    assert torch.equal(seen[1], m / 4) and len(seen) == 2


def test_a_loaded_momentum_takes_its_parameters_layout():
    p = torch.nn.Parameter(torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last))
    opt = Lion([p], **OPTIONS)
    p.grad = torch.randn_like(p)
    opt.step()
    state = opt.state_dict()
    m = state["state"][0]["exp_avg"].clone()
    state["state"][0]["exp_avg"] = m.contiguous()
    opt.load_state_dict(state)
    assert opt.state[p]["exp_avg"].stride() == p.stride()
    assert torch.equal(opt.state[p]["exp_avg"], m)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_independent_and_equal(copier):
    params = parameters((20,))
    opt = Lion(params, **OPTIONS)
    set_grads(params, 0)
    opt.step()
    twin = copier(opt)
    theirs = twin.param_groups[0]["params"]
    theirs[0].grad = params[0].grad.clone()
    opt.step()
    assert not torch.equal(theirs[0], params[0])
    twin.step()
    assert torch.equal(theirs[0], params[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"rounding": "compensated"}, {"rounding": "stochastic"}, {"momentum_dtype": "int8"}],
)
def test_distributed_checkpoint_of_a_plain_model(tmp_path, options):
    """torch.distributed.checkpoint, one process: the resumed run takes the same path."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def fresh():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)]
        model = torch.nn.Sequential(*layers).to(torch.bfloat16)
        return model, Lion(model.named_parameters(), **OPTIONS, **options)

    def train(model, opt, seeds):
        for seed in seeds:
            opt.zero_grad()
            x = torch.randn(8, 6, generator=generator(seed)).to(torch.bfloat16)
            model(x).float().square().sum().backward()
            opt.step()

    model, opt = fresh()
    train(model, opt, range(3))
    model_state, opt_state = get_state_dict(model, opt)
    dcp.save({"model": model_state, "opt": opt_state}, checkpoint_id=tmp_path, no_dist=True)
    train(model, opt, range(3, 6))

    resumed, again = fresh()
    model_state, opt_state = get_state_dict(resumed, again)
    state = {"model": model_state, "opt": opt_state}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(resumed, again, model_state_dict=state["model"], optim_state_dict=state["opt"])
    train(resumed, again, range(3, 6))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert bits_equal(p.detach(), q.detach())
        for key, tensor in opt.state[p].items():
            assert bits_equal(tensor, again.state[q][key])
