"""Breaks a copy of the library on purpose, one mutant after the other, and shows that the tests
notice each. `make mutants` runs all of them (about an hour on two cores); exit code 1 where
one survives. With --by conformance, lion_kernels.conformance has to notice those of Lion, which it
sees as users do.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
# Which tests have to notice a mutant of the CPU's ops, of the Python code, of the GPU's kernels.
ROOMS = ["tests/ops", "tests/vote/test_exchange.py", "tests/optimizer/test_contract.py"]
USERS = [
    "tests/optimizer", "tests/states", "tests/vote", "tests/ops/test_rounding.py",
    "tests/ops/test_momentum.py", "tests/ops/test_declare.py",
]  # fmt: skip
GPU = ["tests/ops", "tests/gpu/test_launch.py"]

# What --by conformance leaves out: files, and names in files of both, of the votes of
# DistributedLion, and the GPU's.
FILES_OF_VOTES = (
    "csrc/bitplanes", "csrc/cpu/apply", "csrc/cpu/encode", "csrc/cuda", "csrc/identity",
    "csrc/simd/apply", "csrc/simd/encode", "csrc/simd/tally", "lion_kernels/distributed",
    "lion_kernels/kernels", "lion_kernels/vote",
)  # fmt: skip
OF_VOTES = {"float64 absent tensors decay"}
# Prints the checks that Lion passes, as JSON.
JUDGE = """
import json
from lion_kernels import conformance
make = conformance.maker("lion_kernels:Lion", {})
print(json.dumps([name for name, (ok, _) in conformance.judge(make, "cpu").items() if ok]))
"""

# (what is broken, file, what stands there, what replaces it)
MUTANTS = [
    ("betas swapped", "csrc/simd/moments.h",
     "return fma(one_minus_beta1, g, multiply(beta1, m))",
     "return fma(one_minus_beta2, g, multiply(beta2, m))"),
    ("momentum updated first", "csrc/simd/step.h",
     "const Vec c = moments.update(g, m);", "const Vec c = moments.update(g, moments.next(g, m));"),
    ("decay after the update", "csrc/simd/step.h",
     "fms(p, decay, multiply(lr, sign))", "multiply(fms(p, one, multiply(lr, sign)), decay)"),
    ("decay without lr", "csrc/cpu/scalars.cpp", "1.0 - lr * weight_decay", "1.0 - weight_decay"),
    ("decay without lr, voting", "csrc/cpu/apply.cpp",
     "1.0 - lr_value * weight_decay", "1.0 - weight_decay"),
    ("noise left out", "csrc/simd/rounding.h",
     "(bits_of(a) + random) & 0xFFFF0000u", "bits_of(a) & 0xFFFF0000u"),
    ("noise forgets the tensor's place", "csrc/simd/rounding.h",
     "(run.first_word + static_cast<uint64_t>(i))", "static_cast<uint64_t>(i)"),
    ("what is dropped is lost", "csrc/simd/rounding.h",
     "std::memcpy(low + j * Vec::kLanes, &out, sizeof(out));", ""),
    ("decay against the update", "csrc/simd/apply.h",
     "select(negative(multiply(sum[j], p)), fill(1.0f), decay)", "decay"),
    ("cautious of half the signs", "csrc/simd/moments.h", "down &= negative(slope);", ""),
    ("one scale for all blocks", "csrc/simd/int8.h",
     "q += kBlock, ++block_scales, m += kBlock)", "q += kBlock, m += kBlock)"),
    ("steps on a line", "csrc/simd/int8.h",
     "multiply(square_root(magnitude(m)), steps)", "multiply(magnitude(m), steps)"),
    ("a NaN takes its block along", "csrc/simd/int8.h", "if (!is_finite) {", "if (false) {"),
    ("scales of the first chunk", "csrc/cpu/lists.h", "chunk.offset / kBlock", "0"),
    ("rescaled by one too few", "csrc/cpu/step.cpp", "(count + 1)", "(count)"),
    ("zero sent as +1", "csrc/simd/encode.h",
     "zeros[i] & toss", "zeros[i]"),
    ("zeros toss alike on every rank and step", "csrc/cpu/encode.cpp",
     "(rank + count) % 2 == 0 ? 0u", "true ? 0u"),
    ("every step tosses anew", "csrc/cpu/encode.cpp", "count >> 1", "count"),
    ("words of zeros toss", "csrc/simd/encode.h",
     "if (zeros[i] == (rest < kBitsPerWord ? (1u << rest) - 1u : ~0u)) {", "if (false) {"),
    ("a tail of zeros tosses", "csrc/simd/encode.h",
     "(rest < kBitsPerWord ? (1u << rest) - 1u : ~0u)", "~0u"),
    ("blank bits of the last step", "csrc/cpu/encode.cpp",
     "std::memset(to.blanks, 0, static_cast<size_t>(octets_of(words_of(s.count))));", ""),
    ("an absent tensor votes -1", "csrc/cpu/encode.cpp",
     "run.blanks[i / kOctet] |= static_cast<uint8_t>(1u << (i % kOctet));", ""),
    ("blank words count as -1", "csrc/bitplanes.h", "if (weight & 2u) bit = bit | blank;", ""),
    ("halves are lost", "csrc/bitplanes.h", "carry = blank & odd;", "carry = Word{};"),
    ("a half left over is no half", "csrc/bitplanes.h", "won = won | (equal & odd);", ""),
    ("ties of an odd scale unseen", "csrc/bitplanes.h", "tied = equal & odd;", "tied = Word{};"),
    ("weights ignored", "csrc/simd/tally.h",
     "run.weights == nullptr ? 1u : static_cast<uint32_t>(run.weights[i])", "1u"),
    ("blank words of all vote", "csrc/simd/tally.h", "run.out_blanks[o] = all;",
     "run.out_blanks[o] = 0;"),
    ("blank words move", "csrc/simd/apply.h",
     "((blanks[i / 8] >> (i % 8)) & 1) != 0", "false"),
    ("those who are not ready", "csrc/cpu/apply.cpp", "seal[0] != 0 || ", ""),
    ("digests half compared", "csrc/cpu/apply.cpp", " || seal[3] != first[3]", ""),
    ("the digest forgets what is shared", "csrc/cpu/encode.cpp",
     "digest = mix64(digest ^ static_cast<uint64_t>(shared->const_data_ptr<int64_t>()[i]));", ""),
    ("flags of the first list", "csrc/cpu/apply.cpp",
     "static_cast<size_t>(first_flag) + i", "i"),
    ("noise by the place in word space", "csrc/cpu/apply.cpp",
     "static_cast<uint64_t>(place - first_word)", "static_cast<uint64_t>(place)"),
    ("a tie is -1", "csrc/simd/tally.h",
     "store_block(low, tied, count)", "store_block(low, Block{}, count)"),
    ("threshold off by one", "csrc/bitplanes.h",
     "compare(planes, n_planes, scale / 2, won", "compare(planes, n_planes, scale / 2 + 1, won"),
    ("last word dropped", "csrc/simd/word.h", "if (rest == 0) return;", "return;"),
    ("padding left as it was", "csrc/cpu/encode.cpp",
     "std::fill_n(run.plane0 + begin, n, 0u);", ""),
    ("non-finite reaches the momentum", "csrc/simd/encode.h",
     "next[j] = select(ok, next[j], m);", ""),
    ("NaN hidden", "csrc/simd/step.h", "minus_one, c));", "minus_one, fill(0.0f)));"),
    ("bf16 truncates", "csrc/simd/vec.h", "_mm512_set1_epi32(0x7fff)", "_mm512_set1_epi32(0)"),
    ("portable fma rounds twice", "csrc/simd/vec.h", "| inexact;", ";"),
    ("carry of eight dropped", "csrc/bitplanes.h",
     "add_bit(planes, n_planes, level + 3, eight);", ""),
    ("ternary planes swapped", "csrc/simd/encode.h",
     "scalars, ballot.plane0, ballot.plane1)", "scalars, ballot.plane1, ballot.plane0)"),
    ("plane weights equal", "csrc/simd/apply.h", "weight *= 2.0f", "weight *= 1.0f"),
    ("coins forget the tensor's place", "csrc/simd/encode.h", "ballot.first_word + w", "w"),
    ("average over N - 1", "csrc/cpu/apply.cpp",
     "(1.0 / static_cast<double>(scale))",
     "(1.0 / static_cast<double>(scale - (scale > 2)))"),
    ("presence of rank 0 only", "csrc/cpu/apply.cpp",
     "r < trailers.size(0); ++r, flags", "r < 1; ++r, flags"),
    ("absent tensors vote -1 in ternary ballots", "csrc/cpu/encode.cpp",
     "run.plane0[i] = rest >= kBitsPerWord ? ~0u : (1u << rest) - 1u;", "run.plane0[i] = 0;"),
    ("rank 0 decides", "lion_kernels/vote/poll.py",
     "        op = ops.tally if",
     "        ballots = ballots[:1].expand_as(ballots).contiguous()\n        op = ops.tally if"),
    ("momentum shared", "lion_kernels/vote/election.py",
     "        sent = self._kept(buffers)\n",
     "        [self.wire.broadcast(m).wait() for move in moves for m in move.bucket.exp_avgs]\n"
     "        sent = self._kept(buffers)\n"),
    ("lr of the group ignored", "lion_kernels/lion.py",
     "settings = settings_of(group, self._kind)",
     "settings = settings_of({**group, 'lr': self.defaults['lr']}, self._kind)"),
    ("a changed option unseen", "lion_kernels/lion.py",
     "all(map(is_, now, before)):", "True:"),
    ("an lr that is written in place unseen", "lion_kernels/options.py",
     "(float, int) for x in numbers", "(float, int, Tensor) for x in numbers"),
    ("a plan outlives its states", "lion_kernels/lion.py", "self._plans.clear()", "pass"),
    ("a plan outlives its momenta", "lion_kernels/bucket.py",
     "found += map(itemgetter(key), kept)", "pass"),
    ("groups behind the first unasked", "lion_kernels/lion.py",
     "is_asked = len(self.param_groups) > 1 or", "is_asked ="),
    ("a refused plan goes on presuming", "lion_kernels/lion.py",
     "only.may_presume = False", "pass"),
    ("old gradients", "lion_kernels/bucket.py",
     "self._grads = [p.grad for p in self._members]\n        if presume",
     "first = [p.grad for p in self._members]\n"
     "        self._grads = self.__dict__.setdefault('_first', first)\n        if presume"),
    ("gradients of another memory layout", "lion_kernels/bucket.py",
     "in {*self._odd, *self._always_odd}:", "in self._always_odd:"),
    ("versions stand", "lion_kernels/declare.py",
     "traced_increment if is_tracing() else plain_increment", "lambda tensors: None"),
    ("traced versions stand", "lion_kernels/declare.py",
     "traced_increment if is_tracing() else plain_increment",
     "(lambda tensors: None) if is_tracing() else plain_increment"),
    ("what is no refusal loses its cause", "lion_kernels/declare.py",
     "            raise\n", "            raise error from None\n"),
    ("versions of lists stand", "lion_kernels/declare.py",
     "{name if 'List' in kind else f'({name},)'}", "{'()' if 'List' in kind else f'({name},)'}"),
    ("negative views as they are stored", "lion_kernels/declare.py",
     "t.resolve_neg() if n", "t if n"),
    ("a refusal as torch 2.15 has it", "lion_kernels/declare.py",
     "raise ValueError(refusal) from None", "raise"),
    ("gaps pass for dense", "csrc/stable/tensor.cpp", "if (stride != wanted) return false;", ""),
    ("arguments are kept", "csrc/stable/tensor.h",
     "if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);", ""),
    ("lists are kept", "csrc/stable/boxed.h",
     'check(torch_delete_list(list), "to free a list");', ""),
    ("arguments are not counted", "csrc/stable/boxed.h", "n_args != sizeof...(Args)", "false"),
    ("what torch says is lost", "csrc/stable/errors.h", "if (said != nullptr)", "if (false)"),
    ("counters of any dtype", "csrc/cpu/scalars.cpp",
     "counter.scalar_type() == dtypes::int64, name", "true, name"),
    ("any identity fits", "csrc/identity.cpp", "if (!same) return {-1};", ""),
    ("gradients stay scaled", "lion_kernels/lion.py",
     "if scaling.grad_scale is not None:", "if False:"),
    ("windows do not overlap", "lion_kernels/dense.py", "if stride <= reach:", "if False:"),
    ("float64 absent tensors decay", "lion_kernels/double.py",
     "written != _ABSENT", "written > -9"),
    ("votes by requires_grad", "lion_kernels/vote/election.py",
     "p.grad is not None or p.requires_grad", "p.requires_grad"),
    ("names not compared", "lion_kernels/distributed.py", '(f"name of {where}", name),', ""),
    ("shards broadcast", "lion_kernels/distributed.py",
     'for p in group["params"] if is_whole(p)]', 'for p in group["params"]]'),
    ("a load decides the rounding", "lion_kernels/options.py",
     '"of 16-bit parameters", in_group=True,\n        kept_at_load=True,',
     '"of 16-bit parameters", in_group=True,'),
    ("strangers' state dropped", "lion_kernels/states/loading.py",
     "self.loaded[p], unknown[key] = ours, theirs", "self.loaded[p], unknown[key] = ours, {}"),
    ("hooks outlive the optimizer", "lion_kernels/release.py",
     "        weakref.finalize(self, _remove, self._handles)\n", ""),
    ("a scaler is not looked for", "lion_kernels/release.py",
     "            _check_unscaled()\n", ""),
    ("overflow not agreed on", "lion_kernels/vote/election.py",
     "yield self.wire.largest(found)", "yield from ()"),
    ("maximize ignored", "lion_kernels/options.py", 'bool(group["maximize"])', "False"),
    ("every rank tosses one coin", "lion_kernels/vote/election.py",
     "rank=self.wire.rank", "rank=0"),
    ("step counter stands", "csrc/cpu/apply.cpp", "count_up(step, 1);", ""),
    ("one noise for every step", "csrc/cpu/step.cpp", "count_up(*step, 1);", "(void)step;"),
    ("overflow moves the momentum", "csrc/cpu/step.cpp", "if (is_set(found_inf)) return;", ""),
    ("grad scale multiplies", "csrc/cpu/scalars.cpp",
     "(1.0 - beta1)) / scale", "(1.0 - beta1)) * scale"),
    ("tie coins forget the shard", "lion_kernels/vote/buffers.py",
     "return self.shard * self.layout.words_per_shard", "return 0"),
    ("absence forgotten", "lion_kernels/vote/election.py",
     "present = [g is not None for", "present = [True for"),
    ("what ranks share is not compared", "lion_kernels/vote/roll_call.py",
     "all(seal == seals[0] for seal in seals)", "True"),
    ("groups forget their place", "lion_kernels/vote/election.py",
     "first_word=booth.first_words[numbers[0]]", "first_word=0"),
    ("an optimizer does not know its number", "lion_kernels/vote/roll_call.py",
     "if len(set(seen := numbers.flatten().tolist())) > 1:",
     "if len(set(seen := [0])) > 1:"),
    ("who changed alone is not told", "lion_kernels/vote/election.py",
     "        yield from self.announce(CHANGED)\n", ""),
    ("an audit that finds nothing", "lion_kernels/vote/audit.py",
     "is_same = torch.equal(counted, given)", "is_same = True"),
    ("agreement with what was decided against", "lion_kernels/vote/statistics.py",
     "(up[i] & won) | (down[i] & lost)", "(up[i] & lost) | (down[i] & won)"),
    ("options not in the digest", "lion_kernels/distributed.py",
     "_hashed([of_layout, *(move.settings.digest for move in moves)])", "of_layout"),
    ("what is trained is not in the digest", "lion_kernels/distributed.py",
     "if not is_same or flags != trained:", "if not is_same:"),
    ("world instead of the group", "lion_kernels/vote/wire.py",
     "_all_gather(received, sent, **self._how)", "_all_gather(received, sent, async_op=True)"),
    ("no broadcast", "lion_kernels/distributed.py", "if self._broadcast:", "if False:"),
    ("replicas compared with themselves", "lion_kernels/vote/agreement.py",
     "zip(*hashes, strict=True)", "zip(*hashes[:1], strict=True)"),
    ("ties of an even world tossed", "lion_kernels/vote/poll.py",
     'return 2 if self.ties == "zero"', 'return 2 if self.ties == "never"'),
    ("own chunk counted as sent", "lion_kernels/vote/wire.py",
     "received[0].nbytes * (self.world_size - 1)", "received[0].nbytes * self.world_size"),
    ("fma rounds twice", "lion_kernels/kernels/bits.py",
     "tl.fma(g, complement + tl.zeros_like(g), m * beta)", "g * complement + m * beta"),
    ("noise left out", "lion_kernels/kernels/rounding.py",
     "(pattern + random) & 0xFFFF0000", "pattern & 0xFFFF0000"),
    ("what is dropped is lost", "lion_kernels/kernels/rounding.py",
     "tl.where(finite, (pattern - kept).to(tl.int32, bitcast=True), 0)",
     "(pattern * 0).to(tl.int32, bitcast=True)"),
    ("compensation not loaded", "lion_kernels/states/interchange.py",
     "for key in KEYS if flat", 'for key in ("exp_avg", "exp_avg_scale") if flat'),
    ("rounding ignored", "lion_kernels/options.py",
     'rounding=group["rounding"]', 'rounding="nearest"'),
    ("another library's kind of momentum", "lion_kernels/options.py",
     "in_group=True, kept_at_load=True,\n    ),\n    _choice(\n        \"rounding\"",
     "in_group=True,\n    ),\n    _choice(\n        \"rounding\""),
    ("an option of another class kept", "lion_kernels/options.py",
     "for name in group.keys() & _LACKING[kind]:", "for name in ():"),
    ("options of the optimizer not compared", "lion_kernels/distributed.py",
     "found += [(name, self._shared[name]) for name in _AGREED]", ""),
    ("replicas never compared", "lion_kernels/distributed.py",
     "if self._check_every and self._steps % self._check_every == 0:", "if False:"),
    ("a negative parameter goes the wrong way", "lion_kernels/bucket.py",
     "return not is_dense(p) or p.is_neg()", "return not is_dense(p)"),
    ("dtypes presumed", "lion_kernels/bucket.py",
     "if presume and self._has_its_dtypes():", "if presume:"),
    ("nobody asked about who joins", "lion_kernels/lion.py",
     "if not presume or plan.serves(group, settings, False):", "if True:"),
    ("options read late", "lion_kernels/lion.py",
     "for number, settings in enumerate(read):",
     "for number, settings in ((n, self._settings_of(n)) for n in range(len(read))):"),
    ("an error of one who waits ends the others' work", "lion_kernels/vote/wire.py",
     "                errors.append(error)", "                raise"),
    ("a worker gets its own chunk from all", "lion_kernels/vote/wire.py",
     "[each[self.rank] for each in self._everyones()]", "[sent[self.rank]] * self.world_size"),
    ("gradients that went away unseen", "lion_kernels/vote/election.py",
     "if not all(p.grad is g for p, g in zip(every, grads, strict=True)):", "if False:"),
    ("an average of one scale less", "lion_kernels/vote/poll.py",
     "return self.scale if self.aggregation", "return self.scale - 1 if self.aggregation"),
    ("scales not compared", "lion_kernels/states/tensors.py",
     "if not (flat.isfinite().all() and torch.equal(top == 127, flat > 0)):", "if False:"),
    ("a cut like another", "lion_kernels/shards.py", "cuts[placement.dim] *=", "cuts[0] *="),
    ("blocks of another memory format", "lion_kernels/states/tensors.py",
     "torch.int8 and m.stride() == source.stride()", "torch.int8"),
    ("every rank's scales from its first", "lion_kernels/states/tensors.py",
     "local(block_scales).flatten()[:blocks]", "local(scales).flatten()[:1].repeat(blocks)"),
    ("the whole model a shard", "lion_kernels/shards.py",
     "return t.to_local() if", "return t.full_tensor() if"),
    ("optimi clears it", "lion_kernels/states/interchange.py",
     ', "kahan_comp": torch.zeros_like(p) if is_half else None', ""),
    ("nearest of the next value", "lion_kernels/states/interchange.py",
     "(qmap[1:] + qmap[:-1]) / 2", "qmap[1:]"),
    ("signs lost", "lion_kernels/kernels/momentum.py",
     "m.to(tl.uint32, bitcast=True) & 0x80000000", "0"),
    ("tiny blocks not lifted", "lion_kernels/kernels/momentum.py",
     "18446744073709551616.0, 1.0)", "1.0, 1.0)"),
    ("a root of one step", "lion_kernels/kernels/momentum.py",
     "root, half = tl.fma(root, error, root), tl.fma(half, error, half)", "pass"),
    ("scales of the first tile", "lion_kernels/kernels/momentum.py", "start // BLOCK,", "0,"),
    ("rescaled by one too few", "lion_kernels/kernels/step.py", "(count + 1)", "count"),
    ("NaN hidden", "lion_kernels/kernels/step.py", "-1.0, c))", "-1.0, 0.0))"),
    ("decay after the update", "lion_kernels/kernels/step.py",
     "tl.fma(p, kept, bits.negative(lr * sign))", "(p - lr * sign) * kept"),
    ("zero sent as +1", "lion_kernels/kernels/bits.py",
     "zero & toss", "zero"),
    ("coins of a word's first byte", "lion_kernels/kernels/bits.py", "(32 + 8 * in_word)", "(32)"),
    ("coins forget the tensor's place", "lion_kernels/kernels/encode.py",
     "flip, word + byte // 4", "flip, byte // 4"),
    ("coins forget the list's place", "lion_kernels/kernels/bits.py", ".to(tl.int32) + first_word",
     ".to(tl.int32)"),
    ("odd ranks toss alike", "lion_kernels/kernels/launch.py", "flip=-(rank & 1)", "flip=0"),
    ("blank words toss", "lion_kernels/kernels/bits.py",
     "tl.where((blank >> (word & 7)) & 1 == 1, 0, zero & toss)", "zero & toss"),
    ("words behind a tensor are blank", "lion_kernels/kernels/bits.py",
     " | (32 * (byte // 4) >= left)", ""),
    ("padding votes", "lion_kernels/kernels/encode.py",
     "tl.where(bits.elements(TILE) < left, each, 0)", "each"),
    ("tiles across shards", "lion_kernels/kernels/bits.py",
     " & (word + BLOCK // 32 <= words_per_shard)", ""),
    ("planes above the fourth", "lion_kernels/kernels/apply.py", "one << first", "one"),
    ("ranks above the 32nd", "lion_kernels/kernels/launch.py",
     "if n_ranks <= RANKS.value:", "if True:"),
    ("of many ranks, digests of any", "lion_kernels/kernels/apply.py", "all_have &= one",
     "all_have |= one"),
    ("non-finite reaches the momentum", "lion_kernels/kernels/encode.py",
     "tl.where(finite, bits.interpolate(g, m, beta2, complement2), m)",
     "bits.interpolate(g, m, beta2, complement2)"),
    ("trailer of shard 0 only", "lion_kernels/kernels/launch.py",
     "(shards if i == 0", "(1 if i == 0"),
    ("digest of what is shared first", "lion_kernels/kernels/encode.py", "shared_ptr + i",
     "shared_ptr"),
    ("trailers of rank 0 only", "lion_kernels/kernels/apply.py",
     "is_rank = rank < n_ranks", "is_rank = rank < 1"),
    ("those who are not ready", "lion_kernels/kernels/apply.py", "(status != READY) | ", ""),
    ("digests half compared", "lion_kernels/kernels/apply.py", " | (high != first_high)", ""),
    ("a step that did not happen counts", "lion_kernels/kernels/apply.py",
     "if _decision(trailers, flag) < 2:", "if True:"),
    ("flags of the first list", "lion_kernels/kernels/apply.py", "flag = first_flag + ", "flag = "),
    ("blank words move", "lion_kernels/kernels/apply.py",
     "(blank >> (byte // 4 % 8)) & 1", "0 * blank"),
    ("scale ignored", "lion_kernels/kernels/apply.py", "2 * v - scale", "2 * v - 1"),
    ("masked tiles from the start again", "lion_kernels/kernels/apply.py",
     "row, start + i, left - i,", "row, start, left - i,"),
    ("maximize ignored", "lion_kernels/kernels/launch.py", "-1.0 if maximize", "1.0 if maximize"),
    ("a stale table", "csrc/identity.cpp",
     "put(address_of(t));", "put(0);"),
    ("rest of eight lost", "csrc/cuda/tally.cu", "if (r < n_left) load", "if (false) load"),
    ("tie coins forget the step", "csrc/cuda/tally.cu",
     "^ static_cast<uint64_t>(*task.step)", ""),
    ("words behind the vectors lost", "csrc/cuda/tally.cu",
     "if (task.n_words == 0) return", "if (task.n_words <= 3) return"),
]  # fmt: skip


def run(command, folder, **variables):
    env = {**os.environ, **variables}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)


def build(folder):
    outcome = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder)
    if outcome.returncode != 0:
        sys.exit(f"a mutant does not build:\n{outcome.stderr[-2000:]}")


def stale_among(mutants):
    """What the tree no longer has: files of tests, and what the mutants replace."""
    stale = [f"no {path}" for path in {*ROOMS, *USERS, *GPU} if not (ROOT / path).exists()]
    for name, file, old, _ in mutants:
        source = ROOT / file
        if not source.exists() or old not in source.read_text():
            stale.append(f"the mutant {name!r} is stale: {file} has no {old!r}")
    return stale


def is_compiled(file):
    return file.startswith("csrc") and not file.endswith(".cu")


def tests_of(file):
    """The tests that have to notice what is wrong with a file, and which of them."""
    if file.startswith(("lion_kernels/kernels", "csrc/cuda")):
        return GPU, "GPU or gpu or every_kernel or test_launch"
    return (ROOMS if is_compiled(file) else USERS), "not compile"


def of_the_stem(file):
    """The test files named after a source file, which most often notice what is wrong with it."""
    stem = Path(file).stem
    return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(f"tests/*/test_{stem}.py"))]


def noticed_by(folder, tests, which):
    """The first failing test, or None."""
    outcome = run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                   "-k", which, *tests], folder)  # fmt: skip
    failed = [line for line in outcome.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if outcome.returncode < 0:
        return f"a crash, signal {-outcome.returncode}"
    if outcome.returncode not in (0, 1):
        sys.exit(f"pytest broke:\n{outcome.stdout[-2000:]}{outcome.stderr[-2000:]}")
    return failed[0].split(" - ")[0].split("::")[-1] if failed else None


def passes(folder):
    """The conformance checks that Lion passes with this machine's SIMD level and with the portable
    one; None where one of them crashes."""
    passed = set()
    for level in ({}, {"LION_KERNELS_SIMD": "portable"}):
        outcome = run([sys.executable, "-c", JUDGE], folder, **level)
        if outcome.returncode != 0:
            return None
        suffix = ", portable" if level else ""
        passed |= {name + suffix for name in json.loads(outcome.stdout.splitlines()[-1])}
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by", choices=["tests", "conformance"], default="tests")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only mutants whose name or file holds one of these"
    )
    args = parser.parse_args()
    by_conformance = args.by == "conformance"
    wanted = [m for m in MUTANTS if any(word in m[0] or word in m[1] for word in args.only)]
    if by_conformance:
        wanted = [m for m in wanted if not m[1].startswith(FILES_OF_VOTES) and m[0] not in OF_VOTES]
    if stale := stale_among(wanted):
        sys.exit("\n".join(stale))
    # Python first: a compiled mutant leaves its library behind.
    wanted.sort(key=lambda m: is_compiled(m[1]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tree"
        ignore = shutil.ignore_patterns(".venv", ".git", "build", "runs", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ignore)
        build(folder)
        unbroken = passes(folder) if by_conformance else set()
        if unbroken is None:
            sys.exit("the unbroken library already crashes")
        needed = sorted({test for m in wanted for test in tests_of(m[1])[0]})
        if not by_conformance and (broken := noticed_by(folder, needed, "not compile")):
            sys.exit(f"the unbroken library already fails {broken}")
        rows = []
        for name, file, old, new in tqdm(wanted, unit="mutant"):
            source = folder / file
            original = source.read_text()
            source.write_text(original.replace(old, new))
            if is_compiled(file):
                build(folder)
            if by_conformance:
                left = passes(folder)
                lost = sorted(unbroken - left) if left is not None else ["a crash"]
                noticed = "; ".join(lost) or None
            else:
                tests, which = tests_of(file)
                first = of_the_stem(file) if which == "not compile" else []
                noticed = first and noticed_by(folder, first, which)
                noticed = noticed or noticed_by(folder, tests, which)
            rows.append((name, file, noticed))
            tqdm.write(f"{name}: {noticed or 'SURVIVED'}")
            source.write_text(original)
    table = [(name, file, test or "SURVIVED") for name, file, test in rows]
    print(tabulate(table, headers=("mutant", "file", "noticed by")))
    survivors = sum(test is None for *_, test in rows)
    print(f"{len(rows) - survivors} of {len(rows)} mutants noticed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
