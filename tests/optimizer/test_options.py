"""The table of options is what constructors, groups, ranks and loads go by."""

import copy
import inspect
import runpy

import pytest
import torch

from common import Workers
from lion_kernels import DistributedLion, Lion, options
from lion_kernels.simulate import loopback
from lion_kernels.vote.exchange import EXCHANGES

KINDS = {"Lion": Lion, "DistributedLion": DistributedLion}
ALONE = {name for kind in options.BOTH for name in options.OPTIONS[kind]}


def parameters():
    return [torch.nn.Parameter(torch.ones(4, 4))]


def of_kind(kind, params, **given):
    if kind == "Lion":
        return Lion(params, **given)
    return DistributedLion(params, process_group=loopback(1)[0], **given)


@pytest.mark.parametrize("kind", KINDS)
def test_constructors_take_the_options_of_the_table(kind):
    signature = inspect.signature(KINDS[kind]).parameters
    given = {o.name: o.default for o in options.OPTIONS[kind].values() if not o.is_fixed}
    beside = {"params", "process_group"}
    assert {n: p.default for n, p in signature.items() if n not in beside} == given


@pytest.mark.parametrize("kind", KINDS)
def test_groups_have_the_defaults_of_the_table(kind):
    (group,) = of_kind(kind, parameters()).param_groups
    for name, option in options.GROUP_OPTIONS[kind].items():
        assert group[name] == option.default


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["constructor", "added", "set", "loaded"])
def test_an_option_that_a_class_lacks_is_refused_wherever_it_is_given(kind, where):
    lacking = ALONE - options.GROUP_OPTIONS[kind].keys()
    assert lacking
    for name in lacking:
        p = parameters()[0]
        opt = of_kind(kind, [p])
        p.grad = torch.ones(4, 4)
        state = copy.deepcopy(opt.state_dict())
        with pytest.raises(ValueError, match=f"{name} is no option of a group of {kind}, got 1"):
            if where == "constructor":
                of_kind(kind, [{"params": parameters(), name: 1}])
            elif where == "added":
                opt.add_param_group({"params": parameters(), name: 1})
            elif where == "set":
                opt.param_groups[0][name] = 1
                opt.param_groups[0]["lr"] = 0.5  # a group is read again where an option changed
                opt.step()
            else:
                state["param_groups"][0][name] = 1
                opt.load_state_dict(state)
        assert torch.equal(p, torch.ones(4, 4)) and len(opt.param_groups) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_who_wins_at_a_load(kind):
    """The saved state, but for how this optimizer stores and repairs."""
    others = {
        "lr": 0.25, "betas": (0.5, 0.75), "weight_decay": 0.125, "maximize": True,
        "momentum_dtype": "bfloat16", "rounding": "stochastic", "independent_weight_decay": True,
        "cautious": True, "cautious_weight_decay": True,
    }  # fmt: skip
    if kind == "Lion":
        others["nonfinite"] = "skip"
    table = options.GROUP_OPTIONS[kind]
    assert others.keys() == {name for name, o in table.items() if not o.is_fixed}
    saved = of_kind(kind, parameters(), **others).state_dict()
    opt = of_kind(kind, parameters())
    opt.load_state_dict(saved)
    for name, value in others.items():
        wanted = table[name].default if table[name].kept_at_load else value
        assert opt.param_groups[0][name] == wanted, name


def test_ranks_agree_on_what_the_table_says():
    others = {"aggregation": "average", "ballots": "ternary", "ties": "coin", "seed": 1,
              "exchange": "sharded", "lr": 0.5, "betas": (0.5, 0.5), "weight_decay": 0.5,
              "maximize": True, "momentum_dtype": "int8", "rounding": "stochastic",
              "independent_weight_decay": True, "cautious": True, "cautious_weight_decay": True,
              "broadcast": False, "check_every": 1, "statistics_every": 1,
              "audit_every": 1}  # fmt: skip
    table = options.OPTIONS["DistributedLion"]
    assert others.keys() == {name for name, o in table.items() if o.agreed and not o.is_fixed}
    for name, value in others.items():
        ends = loopback(2)
        DistributedLion(parameters(), process_group=ends[0])
        with pytest.raises(RuntimeError, match=f"ranks disagree on the {name}"):
            DistributedLion(parameters(), process_group=ends[1], **{name: value})


def test_the_page_is_that_of_the_table():
    docs = runpy.run_path("tools/docs.py")
    assert (docs["DOCS"] / "options.md").read_text() == docs["options_page"]()


def test_exchanges_are_those_that_exist():
    assert set(options.EXCHANGES) == set(EXCHANGES)


def test_workers_share_options():
    world = Workers([torch.ones(3)], 2, maximize=True, lr=0.5)
    world.step([[torch.ones(3)], [torch.ones(3)]])
    assert torch.equal(world.params[1][0], torch.full((3,), 1.5))
