"""What the compiler makes of some variants of the Triton kernels, without a GPU: every kernel, type
and option once, each on one architecture. `make codegen` compiles all of them on all, and holds
them to the same contract, which is tried here on figures that break it.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import codegen
import codegen_contract as contract
import forecast

ROOT = Path(__file__).parents[2]


def figures(*args):
    """What codegen.py says. Its own process: this one interprets."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tools" / "codegen.py"), "--json", "--few", *args]
    outcome = subprocess.run(command, env=env, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return json.loads(outcome.stdout)


@pytest.fixture(scope="module")
def compiled():
    return figures()


def test_a_few_variants_have_every_option(compiled):
    everything = {(v.room, *item) for v in codegen.variants() for item in v.constants.items()}
    few = codegen.a_few(codegen.variants())
    assert {(v.room, *item) for v in few for item in v.constants.items()} == everything
    assert [row["variant"] for row in compiled] == [v.name for v in few]
    for key, values in (("kernel", codegen.KERNELS), ("arch", codegen.ARCHS)):
        assert {row[key] for row in compiled} == set(values)


def test_they_keep_the_contract(compiled):
    assert not contract.broken(compiled)
    if not any(row["forecast"] for row in compiled):
        pytest.skip("triton has no nvdisasm")
    assert any(contract.keeps_bytes(row) for row in compiled)


def test_amd_compiles():
    """No claim beyond that."""
    if "amd" not in triton.backends.backends:
        pytest.skip("triton has no back end for AMD")
    rows = figures("--amd")
    assert rows and not contract.broken_on_amd(rows)


FORECAST = {"ratio": 0.5, "KiB in flight": 96.0, "barriers": 0, "shuffles": 0}
GOOD = {
    "kernel": "encode", "variant": "bfloat16, momentum bfloat16, binary", "arch": 90,
    "registers": 64, "registers_budget": 64, "stack": 0, "local": 0, "shared": 0,
    "loads_16_bytes": 4, "loads_16_bytes_wanted": 4,
    "stores_16_bytes": 2, "stores_16_bytes_wanted": 2,
    "forecast": {"H100": FORECAST, "H200": dict(FORECAST)},
}  # fmt: skip


def row_with(forecast_of="H100", **changes):
    row = copy.deepcopy(GOOD)
    for key, value in changes.items():
        (row if key in row else row["forecast"][forecast_of])[key] = value
    return row


def test_a_row_within_the_contract():
    assert not contract.broken([GOOD])
    # The H200 is no contract; a reason lets arithmetic take longer; float32 shares bytes.
    assert not contract.broken([row_with("H200", ratio=2.0)])
    assert not contract.broken([row_with(variant="float32, momentum int8, binary", ratio=2.0)])
    assert not contract.broken([row_with(variant="float32, momentum float32, binary", shuffles=4)])
    assert not contract.broken([{**GOOD, "forecast": {}}])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loads_16_bytes": 3}, "3 loads_16_bytes, not 4"),
        ({"stores_16_bytes": 0}, "0 stores_16_bytes, not 2"),
        ({"loads_16_bytes": 0, "loads_16_bytes_wanted": 0}, "no 16-byte load"),
        ({"stack": 8}, "spills: stack 8"),
        ({"local": 16}, "local memory 16"),
        ({"registers": 65}, "65 registers, the launch config has 64"),
        ({"registers": 0}, "0 registers"),
        ({"ratio": 0.61}, "arithmetic takes 0.61 of the memory's time on H100"),
        ({"barriers": 1}, "1 barriers"),
        ({"shuffles": 2}, "2 shuffles"),
        ({"kernel": "apply", "variant": "float16, planes 2, nearest", "shuffles": 2}, "2 shuffles"),
        ({"KiB in flight": 26.0}, "asks for 26 KiB at once on H100"),
        ({"forecast": {"H100": FORECAST}}, "H200: no forecast"),
    ],
)
def test_what_breaks_the_contract_is_said(change, said):
    broken = contract.broken([row_with(**change)])
    assert len(broken) == 1 and said in broken[0]


def everything():
    """The rows of all variants, without figures."""
    return [
        {"kernel": v.room, "variant": v.name, "arch": arch, "forecast": {}}
        for v in codegen.variants()
        for arch in codegen.ARCHS
    ]


def test_a_variant_more_or_less_is_said():
    rows = everything()
    assert not contract.incomplete(rows, codegen.ARCHS)
    without = [row for row in rows if row != rows[0]]
    (said,) = contract.incomplete(without, codegen.ARCHS)
    assert said == "step sm_80: 55 variants, not 56"
    (said,) = contract.incomplete([*rows, GOOD], codegen.ARCHS)
    assert said == "encode sm_90: 49 variants, not 48"


def test_a_reason_that_no_kernel_needs_is_said():
    rows = everything()
    for row in rows:
        figures = {**FORECAST, "ratio": 0.7 if contract.reason_for(row) else 0.5}
        chips = [name for name, chip in forecast.CHIPS.items() if chip.arch == row["arch"]]
        row["forecast"] = {chip: figures for chip in chips}
    assert not contract.incomplete(rows, codegen.ARCHS)
    for row in rows:
        if "int8" in row["variant"]:
            row["forecast"] = {chip: FORECAST for chip in row["forecast"]}
    (said,) = contract.incomplete(rows, codegen.ARCHS)
    assert said.startswith("the reason for 'int8' is stale")


def amd_row(kernel, **changes):
    row = {"kernel": kernel, "variant": "bfloat16", "arch": "gfx942", "registers": 9}
    return {**row, "spilled": 0, "16-byte loads": 2, **changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [({"spilled": 3}, "3 registers spilled"), ({"16-byte loads": 0}, "0 16-byte loads")],
)
def test_what_breaks_the_contract_on_amd_is_said(change, said):
    rows = [amd_row(kernel) for kernel in codegen.KERNELS]
    assert not contract.broken_on_amd(rows)
    assert contract.broken_on_amd(rows[1:]) == ["step: not compiled for AMD"]
    (found,) = contract.broken_on_amd([*rows[1:], amd_row("step", **change)])
    assert said in found


@pytest.mark.parametrize(
    ("row", "status"), [(GOOD, 0), (row_with(stack=8), 1)], ids=["kept", "broken"]
)
def test_the_program_fails_where_the_contract_is_broken(monkeypatch, capsys, row, status):
    pytest.importorskip("tabulate")
    monkeypatch.setattr(codegen, "compile_all", lambda tasks, compile_one, progress: [row])
    monkeypatch.setattr(sys, "argv", ["codegen.py", "--few", "--arch", "90"])
    with pytest.raises(SystemExit) as ended:
        codegen.main()
    assert ended.value.code == status
    assert f"{status} breaches of the contract" in capsys.readouterr().out


def test_the_full_tile_is_found():
    """The way that moves most in whole vectors: through the branch, once through the loop."""
    sass = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.U16 R1, desc[UR4][R2.64] ;
        /*0030*/                   EXIT ;
.L_x_1:
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0050*/                   FFMA R4, R4, R5, R6 ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/              @!P2 BRA `(.L_x_3) ;
        /*0080*/                   CALL.REL.NOINC `($slowpath) ;
.L_x_3:
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
"""
    seen = forecast.full_tile(sass)
    assert dict(seen) == {
        "S2R": 1, "BRA": 3, "LDG.E.128": 1, "FFMA": 1, "STG.E.128": 1, "EXIT": 1,
    }  # fmt: skip
    work = forecast.work_of(sass)
    assert work.by_pipe == {"none": 5, "lsu": 8, "fma": 1}
    assert forecast.cycles(work, 4, 90)["issue"] == 8
