"""How each kernel is launched: tiles, warps and registers, each with what it was chosen by.

Nothing is tuned at run time. Knows no kernel and no op, and imports no Triton.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Elements of a tile (one program), its warps, and the registers that a thread may take:
    `make codegen` shows that none spills."""

    block: int
    num_warps: int
    registers: int


# Not yet measured on a GPU: `make codegen` forecasts what each leaves to memory. 16 elements a
# thread share its scalars, its table row and its addresses; with 64 registers a multiprocessor
# holds 32 warps. Registers are a bound: most kernels take 54 to 64.
# At 96, bfloat16 with int8 momenta and stochastic rounding spills 8 bytes on sm_100.
STEP = Config(block=2048, num_warps=4, registers=104)
# Skipping or cautious: with 16 elements a thread and 80 registers, float32 spills 80 bytes.
STEP_WITH_OPTIONS = Config(block=2048, num_warps=8, registers=80)
# At 64, float32 with int8 momenta spills 8 bytes on sm_100.
ENCODE = Config(block=2048, num_warps=4, registers=72)
# Cautious: at 80, float32 with float16 momenta spills 8 bytes.
ENCODE_WITH_OPTIONS = Config(block=2048, num_warps=4, registers=96)
AGREEING = Config(block=2048, num_warps=4, registers=64)
# It reads one tensor: 32 elements a thread, to have as many bytes in flight as the others. At 80,
# float32 with eight planes, cautious, spills 8 bytes, and so at 88 does bfloat16 with stochastic
# rounding under triton 3.6; a multiprocessor holds five programs at 88 as at 96.
APPLY = Config(block=4096, num_warps=4, registers=96)
# More than eight planes: at 144, float32 with 16 planes and blank bits spills 32 bytes; a
# multiprocessor holds three programs at 144 as at 168.
APPLY_MANY_PLANES = Config(block=4096, num_warps=4, registers=168)


def step_config(is_plain: bool) -> Config:
    """``is_plain``: nothing is skipped, and nothing is cautious."""
    return STEP if is_plain else STEP_WITH_OPTIONS


def encode_config(cautious: bool) -> Config:
    return ENCODE_WITH_OPTIONS if cautious else ENCODE


def apply_config(planes: int) -> Config:
    return APPLY if planes <= 8 else APPLY_MANY_PLANES


def options(config: Config) -> dict[str, object]:
    """What the compiler is told. No fusing of its own: the kernels say themselves where a multiply
    and an add are fused."""
    return {
        "num_warps": config.num_warps,
        "maxnreg": config.registers,
        "enable_fp_fusion": False,
    }
