"""Several processes that calibrate one model together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from quantkit import model as models
from quantkit.algorithms import RESCALERS
from quantkit.algorithms.scaling import Scaling
from quantkit.batches import cut_batches
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.checkpoint.opened import open_checkpoint
from quantkit.errors import QuantkitError, UsageError
from quantkit.input_range import sample_tokens
from quantkit.parallel import ALONE, Processes, World, check_alike, world
from quantkit.plan import make_plan
from quantkit.quantize import QuantizedLayer
from quantkit.recipe import Recipe, Step, parse_recipe
from quantkit.schemes import SCHEMES
from tests.architectures import save

T = TypeVar("T")

#: Fewer windows than a batch holds, and more tokens than a layer has columns: where a Hessian is
#: singular, the last digit of a sum decides many codes.
IDS = torch.randint(0, 256, (16, 128), generator=torch.Generator().manual_seed(3))

RECIPES = {
    "fisher": Recipe(
        SCHEMES["w4a16-g64"],
        algorithm=(Step("gptq", {"fisher": 0.5, "outputs": "coupled"}),),
        keep=("lm_head",),
    ),
    "awq, feedback": Recipe(
        SCHEMES["w3a16-g64"],
        algorithm=(Step("awq"), Step("gptq", {"feedback": 0.5})),
        keep=("lm_head",),
    ),
    "static": parse_recipe(
        "scheme: w8a8-static\nalgorithm: [smoothquant, gptq]\nkv_cache: fp8\n"
        "rules: [{match: '*.down_proj', scheme: w4a16-g64}]\n"
    ),
    # Searched by what errors cost at each token, of which every process has its own.
    "outliers": Recipe(
        SCHEMES["w8a8-static"],
        algorithm=(Step("outliers", {"cost": "fisher"}), Step("rtn")),
        keep=("lm_head",),
    ),
    "distill": Recipe(SCHEMES["w4a16-g64"], algorithm=(Step("rtn"), Step("distill", {"steps": 3}))),
    "rotated inputs": Recipe(
        SCHEMES["w8a8-static"],
        algorithm=(Step("rotate", {"mlp": True}), Step("gptq")),
        keep=("lm_head",),
    ),
}


class Threads(World):
    """Threads in the place of processes."""

    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank, self.size = rank, len(shared.places)
        self._shared = shared

    def gather(self, value: T) -> list[T]:
        found = self._shared.exchange(self.rank, value)
        return found if self.leads else []

    def first(self, make: Callable[[], T]) -> T:
        made: tuple[T | None, Exception | None] = None, None
        if self.leads:
            try:
                made = make(), None
            except Exception as e:
                made = None, e
        value, error = self._shared.exchange(self.rank, made)[0]
        if error is not None:
            raise error
        return value

    def add(self, total: Tensor) -> None:
        found = self._shared.exchange(self.rank, total.clone())
        if self.leads:
            for other in found[1:]:
                total += other

    share = Processes.share


class Shared:
    """Where threads lay down what the others pick up."""

    def __init__(self, count: int) -> None:
        self.places: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=120)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.places[rank] = value
        self.barrier.wait()
        found = list(self.places)
        self.barrier.wait()
        return found


def together(count: int, work: Callable[[World], T]) -> list[T]:
    """What ``work`` gives in each of so many threads; the first error of any is raised."""
    shared = Shared(count)
    answers: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            answers[rank] = work(Threads(rank, shared))
        except threading.BrokenBarrierError:
            pass
        except BaseException as e:
            errors.append(e)
            shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return answers


#: transformers sets torch's default dtype while it loads.
LOADING = threading.Lock()


def run(source: Path, work: Path, recipe: Recipe, world: World = ALONE, **options: Any) -> Any:
    with LOADING:
        loaded = models.load_source(str(source))
    plan = make_plan(recipe, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
    data = CalibrationData(IDS, "hash")
    return calibrate(loaded, plan, data, work, together=world, **options)


def same_codes(a: dict[str, QuantizedLayer], b: dict[str, QuantizedLayer]) -> float:
    """Share of codes that are equal."""
    assert a.keys() == b.keys()
    pairs = [(a[name].qtensor.codes, b[name].qtensor.codes) for name in a]
    equal = sum(int((x.float() == y.float()).sum()) for x, y in pairs)
    return equal / sum(x.numel() for x, _ in pairs)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x == "outliers" else x for x in RECIPES],
)
def test_two_give_the_codes_of_one(name: str, tiny: Path, tmp_path: Path) -> None:
    alone = run(tiny, tmp_path / "alone", RECIPES[name])
    first, second = together(2, lambda w: run(tiny, tmp_path / "work", RECIPES[name], w))
    assert second.layers == {}
    assert same_codes(alone.layers, first.layers) >= 0.999
    for layer, found in first.layers.items():
        expected = alone.layers[layer]
        assert found.output_error == pytest.approx(expected.output_error, rel=1e-2)
        if expected.input_scale is not None:
            assert torch.equal(found.input_scale, expected.input_scale), layer
    assert {x: c.scales(torch.float32) for x, c in first.caches.items()} == {
        x: c.scales(torch.float32) for x, c in alone.caches.items()
    }


def test_tokens_keep_their_costs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a search in two processes sees is what it sees in one: every token beside its cost."""
    seen: list[Scaling] = []

    def watch(problem: Scaling, options: Mapping[str, Any]) -> Tensor:
        seen.append(problem)
        return torch.ones(problem.count)

    monkeypatch.setattr("quantkit.rescale.COSTED_TOKENS", 100 * IDS.numel())  # take them all
    monkeypatch.setitem(RESCALERS, "outliers", replace(RESCALERS["outliers"], scales=watch))
    run(tiny, tmp_path / "alone", RECIPES["outliers"])
    alone, seen[:] = list(seen), []
    together(2, lambda w: run(tiny, tmp_path / "work", RECIPES["outliers"], w))
    assert len(seen) == len(alone) == 8
    for one, two in zip(alone, seen, strict=True):
        assert len(one.sample) == IDS.numel()
        torch.testing.assert_close(two.sample, one.sample, rtol=0.05, atol=0.02)
        for a, b in zip(one.consumers, two.consumers, strict=True):
            assert a.costs is not None
            assert float(a.costs.max()) > 2 * float(a.costs.min())
            torch.testing.assert_close(b.costs, a.costs, rtol=1e-3, atol=0)


def test_what_needs_all_windows_runs_in_one_process(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Recipe(SCHEMES["w4a16-g64"], algorithm=(Step("rtn"), Step("signround")))
    with pytest.raises(UsageError, match="signround: goes through all windows"):
        together(2, lambda w: run(tiny, tmp_path / "a", trained, w))
    monkeypatch.setattr("quantkit.limits.spills", lambda *_: True)
    with pytest.raises(UsageError, match="--activation-memory: goes through all windows"):
        together(
            2,
            lambda w: run(tiny, tmp_path / "b", RECIPES["static"], w, activation_memory=7_000_000),
        )


def test_a_rerun_gives_the_same_bytes_and_a_resumed_run_too(tiny: Path, tmp_path: Path) -> None:
    recipe = RECIPES["awq, feedback"]
    runs = [together(2, lambda w: run(tiny, tmp_path / "a", recipe, w))[0].layers]
    blocks = tmp_path / "a" / "blocks"
    (blocks / "0001.json").unlink()
    runs += [together(2, lambda w: run(tiny, tmp_path / "a", recipe, w, resume=True))[0].layers]
    runs += [together(2, lambda w: run(tiny, tmp_path / "b", recipe, w))[0].layers]
    for other in runs[1:]:
        for name, layer in runs[0].items():
            assert torch.equal(layer.qtensor.codes, other[name].qtensor.codes), name
            assert torch.equal(layer.qtensor.scale, other[name].qtensor.scale), name


def test_the_sample_of_tokens_is_that_of_one_process() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 8, generator=generator) for n in (3, 50, 20, 31)]
    inputs[2][4] *= 40
    inputs[0][1] *= 35
    whole = sample_tokens(inputs, largest=2, spread=12)
    parts = together(2, lambda w: sample_tokens(w.share(inputs), largest=2, spread=12, together=w))
    assert torch.equal(parts[0].largest, whole.largest)
    assert torch.equal(parts[0].others, whole.others)


def test_batches_are_shared_in_order_and_cut_for_all() -> None:
    ids = torch.arange(34 * 8).reshape(34, 8)
    for size in (1, 2, 5, 34):
        shares = together(size, lambda w: w.share(cut_batches(ids, w.size)))
        assert all(shares)
        assert torch.equal(torch.cat([x for share in shares for x in share]), ids)
        assert len(shares[0][0]) == 1
    with pytest.raises(UsageError, match="34 batches of calibration data for 35 processes"):
        together(35, lambda w: w.share(cut_batches(ids, w.size)))


def test_all_experts_in_two_processes(tmp_path: Path) -> None:
    """Every process sends every expert its tokens, so that all meet the same layers."""
    source = save("mixtral", tmp_path / "model")
    recipe = Recipe(SCHEMES["w4a16-g32"], algorithm=(Step("gptq"),), keep=("lm_head",))
    alone = run(source, tmp_path / "alone", recipe, all_experts=True)
    first, _ = together(2, lambda w: run(source, tmp_path / "two", recipe, w, all_experts=True))
    assert same_codes(alone.layers, first.layers) >= 0.999
    with pytest.raises(UsageError, match="a router sends an expert other tokens"):
        together(2, lambda w: run(source, tmp_path / "routed", recipe, w))


def test_what_differs_between_processes_ends_all() -> None:
    with pytest.raises(QuantkitError, match="process 1 has another recipe than the first: 1"):
        together(2, lambda w: check_alike(w, "recipe", w.rank))


def test_an_error_of_the_first_is_raised_everywhere() -> None:
    def work(world: World) -> str:
        with pytest.raises(UsageError, match="no such file"):
            world.first_before_others(lambda: fail("no such file"))
        return "raised"

    assert together(3, work) == ["raised"] * 3


#: Meets the other process and ends without a word.
LEAVES = """
import os
from quantkit.parallel import world
with world() as together:
    together.gather("here")
    os._exit(0)
"""


def test_a_process_that_ends_is_named_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the one that is left asks of it; an error of its own comes before that."""
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
    }
    for name, value in {**place, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    other = subprocess.Popen([sys.executable, "-c", LEAVES], env={**os.environ, "RANK": "1"})
    with world() as left:
        assert left.gather("here, too") == ["here, too", "here"]
        assert other.wait(timeout=300) == 0
        for ask in (
            lambda: left.gather(1),
            lambda: left.first(lambda: 1),
            lambda: left.add(torch.zeros(2)),
        ):
            with pytest.raises(QuantkitError, match=r"cannot be reached \([A-Z]") as caught:
                ask()
            assert caught.value.exit_code == 4
        with pytest.raises(UsageError, match="no such file"):
            left.first(lambda: fail("no such file"))


def fail(message: str) -> None:
    raise UsageError(message)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_processes_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun names itself, and not the place where they meet."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(QuantkitError, match=r"cannot be reached .*see what that one said"), world():
        pass


RECIPE = """
scheme: w4a16-g64
algorithm: [awq, gptq]
keep: [lm_head]
calibrate: {samples: 6, seq_len: 64}
"""


def test_torchrun(tiny: Path, traffic: Path, tmp_path: Path) -> None:
    """The real thing: two processes of the command line, joined by gloo."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    folders = {}
    for name, launch in {
        "one": ["-m", "quantkit"],
        "two": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "quantkit"],
    }.items():
        folders[name] = tmp_path / name
        command = [sys.executable, *launch, "calibrate", str(tiny), "-r", str(recipe)]
        command += ["--data", str(traffic), "-o", str(folders[name]), "--no-gate", "--threads", "1"]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout[done.stdout.index("{") :])["output"] == str(folders[name])
    with open_checkpoint(folders["one"]) as a, open_checkpoint(folders["two"]) as b:
        codes = [(a.layer(x).weight.codes, b.layer(x).weight.codes) for x in a.schemes]
    equal = sum(int((x == y).sum()) for x, y in codes)
    assert equal / sum(x.numel() for x, _ in codes) >= 0.999


def test_torchrun_ends_with_the_first_process_error(
    tiny: Path, traffic: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("samples: 6", "samples: 1"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "quantkit", "calibrate", str(tiny), "-r", str(recipe), "--no-gate"]
    command += ["--data", str(traffic), "-o", str(tmp_path / "out"), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "1 batches of calibration data for 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()
