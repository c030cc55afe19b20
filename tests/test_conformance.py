"""The conformance suite: this Lion passes, and every check notices the fault that it is for."""

import pytest
import torch

from lion_kernels import Lion, conformance


def failed(make):
    return {name for name, (ok, _) in conformance.judge(make, "cpu").items() if ok is False}


def make_of(cls, **kwargs):
    return lambda params, **options: cls(params, **options, **kwargs)


SMALL = {"bfloat16: small decay acts", "bfloat16: small updates act"}


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_this_lion_passes(rounding, nonfinite):
    assert failed(make_of(Lion, rounding=rounding, nonfinite=nonfinite)) == set()


def test_to_nearest_small_steps_are_lost():
    assert failed(make_of(Lion)) == SMALL


class Eager(torch.optim.Optimizer):
    """Lion in PyTorch, with one fault."""

    def __init__(self, params, lr, betas, weight_decay, fault=""):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.fault, self.first_lr = fault, lr

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            lr = self.first_lr if self.fault == "lr" else lr
            for p in group["params"]:
                if p.grad is None and self.fault == "none":
                    p.mul_(1 - lr * decay)
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad
                m = state.setdefault("exp_avg", torch.zeros_like(p))
                if self.fault == "layout" and p.stride() != g.stride():
                    g = g.as_strided(p.shape, p.stride()) if g.is_contiguous() else g
                c = m * beta1 + g * (1 - beta1)
                if self.fault == "sign":
                    c = torch.where(c == 0, 1.0, c)
                # torch.sign(NaN) is 0: the weight of a NaN momentum stands still, unseen.
                sign = c.sign() if self.fault == "nan" else torch.where(c.isnan(), c, c.sign())
                p.mul_(1 - (1 if self.fault == "decay" else lr) * decay)
                p.add_(sign, alpha=-lr)
                m.mul_(beta2).add_(g, alpha=1 - (beta1 if self.fault == "beta" else beta2))
                if self.fault == "gradient":
                    p.grad.zero_()
                if self.fault == "storage":
                    torch.empty(0).set_(p.untyped_storage())[:1] = 0.0


def test_plain_pytorch_passes():
    assert failed(make_of(Eager)) == SMALL


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("beta", "the formula, float32"),
        ("sign", "sign(0) is 0"),
        ("decay", "weight decay, float32"),
        ("decay", "weight decay, bfloat16"),
        ("decay", "weight decay, float16"),
        ("layout", "memory layouts"),
        ("gradient", "gradient and storage untouched"),
        ("storage", "gradient and storage untouched"),
        ("none", "None, empty, 0-d, odd sizes"),
        ("nan", "one NaN gradient"),
        ("lr", "lr read in every step"),
    ],
)
def test_each_check_notices_its_fault(fault, check):
    assert check in failed(make_of(Eager, fault=fault))


class Forgetful(Eager):
    """Saves no momentum."""

    def state_dict(self):
        return {**super().state_dict(), "state": {}}


def test_a_state_that_is_not_saved_is_noticed():
    assert "resume" in failed(make_of(Forgetful))


def test_command_line(capsys):
    names = ["lion_kernels:Lion", "test_conformance:Eager"]
    assert conformance.main([*names, "--kwargs", "fault="]) == 1  # unknown to Lion: fails there
    out = capsys.readouterr().out
    assert "TypeError" in out and "11 of 13" in out
    assert conformance.main(["lion_kernels:Lion", "--kwargs", "rounding=stochastic"]) == 0
    for arguments, message in (
        (["lion_kernels"], "named as module:Class, got 'lion_kernels'"),
        (["lion_kernels:Tiger"], "cannot be imported"),
        (["lion_kernels:Lion", "--kwargs", "rounding"], "KEY=VALUE, got 'rounding'"),
    ):
        with pytest.raises(SystemExit, match=message):
            conformance.main(arguments)
