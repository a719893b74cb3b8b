"""More adapters than memory: who waits, who goes on, what comes back, and what is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny

from loquetier import EngineConfig, LoraSpec, Runtime, SamplingParams, TrainingConfig
from loquetier.adapters.packed import Packer
from loquetier.adapters.peft_write import write_adapter
from loquetier.adapters.spec import resolve_modules
from loquetier.config import MIB
from loquetier.errors import (
    AdapterChangedError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    EngineStoppedError,
    OutOfAdapterMemoryError,
)

SPEC = LoraSpec(r=64, alpha=64)  # q, k, v, o: 4 of them fill a MiB
PROMPT = [70, 71, 72]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
DATA = [{"prompt": f"{a} then ", "completion": f"{b}!"} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]
TRAINING = TrainingConfig(batch_size=4, max_steps=2, learning_rate=3e-2, publish="end")
WAIT = 20
"""Seconds for anything that should take milliseconds."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("residency") / "base"
    save_tiny(directory, "llama")
    return directory


@pytest.fixture(scope="module")
def stock(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight adapters that all say something else."""
    root = tmp_path_factory.mktemp("stock")
    with Runtime(str(base), config=config()) as runtime:
        modules = resolve_modules(SPEC, runtime._engine.base.targets)
        return [write(root / f"a{n}", runtime, modules, seed=n) for n in range(8)]


def write(directory: Path, runtime: Runtime, modules: Any, seed: int) -> Path:
    g = torch.Generator().manual_seed(seed)
    factors: dict[str, Any] = {
        m.target.path: (
            0.1 * torch.randn(m.rank, m.target.in_features, generator=g),
            0.3 * torch.randn(m.target.out_features, m.rank, generator=g),
        )
        for m in modules
    }
    write_adapter(directory, spec=SPEC, modules=modules, factors=factors, base_name=runtime.base_name, overwrite=True)
    return directory


def config(**settings: Any) -> EngineConfig:
    limits: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": 4 * MIB, "adapter_memory": MIB}
    return EngineConfig(**(limits | {"adapter_patience": 0.0} | settings))


@contextmanager
def crowded(base: Path, stock: list[Path], count: int = 8, **settings: Any) -> Iterator[Runtime]:
    """A runtime with more adapters than room."""
    with Runtime(str(base), config=config(**settings)) as runtime:
        for number, directory in enumerate(stock[:count]):
            runtime.load_adapter(f"a{number}", directory)
        yield runtime
        runtime.check_integrity()


def resident(runtime: Runtime) -> set[str]:
    return {info.name for info in runtime.adapters() if info.is_resident}


def room(runtime: Runtime) -> int:
    """How many of the stock fit."""
    return runtime.stats().arena_bytes // runtime.adapter("a0").num_bytes


def until(is_so: Callable[[], bool]) -> None:
    """Polls the engine, which goes on meanwhile."""
    end = time.monotonic() + WAIT
    while not is_so():
        assert time.monotonic() < end, "it never came to be so"


def gated(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Reading files again waits for the event."""
    gate, original = threading.Event(), Packer.read_again

    def read_again(self: Packer, label: str, directory: Path, digest: str) -> Any:
        assert gate.wait(WAIT)
        return original(self, label, directory, digest)

    monkeypatch.setattr(Packer, "read_again", read_again)
    return gate


def test_each_answers_as_it_does_alone_and_memory_stays_within_its_budget(base: Path, stock: list[Path]) -> None:
    alone = []
    for directory in stock:
        with Runtime(str(base), adapters={"it": directory}, config=config()) as runtime:
            alone.append((runtime.generate(PROMPT, "it", GREEDY).token_ids, runtime.digest("it")))
    assert len({tuple(tokens) for tokens, _ in alone}) == 8, "adapters that say the same would prove nothing"
    with crowded(base, stock) as runtime:
        assert 2 <= room(runtime) < 8 and len(resident(runtime)) == room(runtime)
        for n in (7, 0, 3, 3, 1, 6, 2, 5, 4, 0):
            assert runtime.generate(PROMPT, f"a{n}", GREEDY).token_ids == alone[n][0]
            assert runtime.digest(f"a{n}") == alone[n][1], "the very same weights"
            assert len(resident(runtime)) <= room(runtime)
        totals = runtime.stats().adapters
        assert totals.evictions >= 4 and totals.loads >= 4 and totals.failures == 0


def test_the_one_used_longest_ago_gives_way_and_a_pinned_one_never(base: Path, stock: list[Path]) -> None:
    with crowded(base, stock) as runtime:
        fit = room(runtime)
        for n in range(fit):
            runtime.generate(PROMPT, f"a{n}", GREEDY)
        runtime.generate(PROMPT, "a0", GREEDY)
        runtime.generate(PROMPT, "a7", GREEDY)
        assert resident(runtime) == {f"a{n}" for n in range(fit)} - {"a1"} | {"a7"}
        assert runtime.pin_adapter("a1").is_resident
        for n in (*range(2, 8), *range(8)):
            runtime.generate(PROMPT, f"a{n}", GREEDY)
            assert "a1" in resident(runtime)
        assert not runtime.unpin_adapter("a1").is_pinned
        for n in range(2, 8):
            runtime.generate(PROMPT, f"a{n}", GREEDY)
        assert "a1" not in resident(runtime)


def test_a_cold_adapter_delays_only_its_own_requests(
    base: Path, stock: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = gated(monkeypatch)
    with crowded(base, stock) as runtime:
        cold = runtime.submit(PROMPT, "a7", GREEDY)
        # While its files are being read, the base and what is there answer, and a job trains.
        hot = sorted(resident(runtime))[-1]
        assert runtime.generate(PROMPT, hot, GREEDY).answers and runtime.generate(PROMPT, None, GREEDY).answers
        assert runtime.evaluate(hot, DATA).num_tokens > 0
        assert runtime.stats().num_waiting == 1 and "a7" not in resident(runtime)
        gate.set()
        assert len(cold.result().token_ids) == 6


def test_leaving_while_the_adapter_is_read_leaves_nothing_behind(
    base: Path, stock: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = gated(monkeypatch)
    with crowded(base, stock) as runtime:
        left = runtime.submit(PROMPT, "a7", GREEDY)
        unloaded = runtime.submit(PROMPT, "a6", GREEDY)
        left.abort()
        assert runtime.unload_adapter("a6") > 0, "its slot is freed when the request on it has ended"
        with pytest.raises(AdapterNotFoundError):
            runtime.submit(PROMPT, "a6", GREEDY)
        gate.set()
        assert len(unloaded.result().token_ids) == 6, "accepted before the unload: answered"
        assert left.result().answers[0].finish_reason == "abort"
        runtime.check_integrity()


def test_hot_adapters_do_not_starve_a_cold_one(base: Path, stock: list[Path]) -> None:
    with crowded(base, stock) as runtime:
        hot, over = [f"a{n}" for n in range(room(runtime))], threading.Event()
        answers: list[int] = []

        def keep_busy(name: str) -> None:
            # The next request is there before the last has ended, so that no hot adapter is ever idle by itself.
            waiting = [runtime.submit(PROMPT, name, LONG)]
            while not over.is_set():
                waiting.append(runtime.submit(PROMPT, name, LONG))
                answers.append(len(waiting.pop(0).result().token_ids))
            answers.append(len(waiting.pop().result().token_ids))

        threads = [threading.Thread(target=keep_busy, args=(name,)) for name in hot]
        for thread in threads:
            thread.start()
        try:
            for n in (6, 7):
                assert len(runtime.generate(PROMPT, f"a{n}", GREEDY).token_ids) == 6
        finally:
            over.set()
            for thread in threads:
                thread.join(WAIT)
        assert answers and set(answers) == {200}


def damaged(how: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        if how == "gone":
            file.unlink()
        else:
            data = bytearray(file.read_bytes())
            data[-1] ^= 1  # the last weight's sign or exponent: still finite
            file.write_bytes(data if how == "changed" else data[:-10])

    return change


@pytest.mark.parametrize("how", ["changed", "gone", "torn"])
def test_files_changed_underneath_are_refused_and_nobody_else_is_hurt(
    base: Path, stock: list[Path], tmp_path: Path, how: str
) -> None:
    import shutil

    own = Path(shutil.copytree(stock[7], tmp_path / "own"))
    with crowded(base, stock, 7) as runtime:
        runtime.load_adapter("own", own)
        before = runtime.generate(PROMPT, "a0", GREEDY).token_ids
        assert "own" not in resident(runtime)
        damaged(how)(own)
        with pytest.raises(AdapterChangedError if how == "changed" else AdapterUnavailableError, match="own@1"):
            runtime.generate(PROMPT, "own", GREEDY)
        with pytest.raises(AdapterUnavailableError):
            runtime.pin_adapter("own")
        assert not runtime.adapter("own").is_pinned and runtime.stats().adapters.failures == 2
        assert runtime.generate(PROMPT, "a0", GREEDY).token_ids == before
        # A bad replacement leaves what is served as it was; the files put back serve again.
        shutil.copytree(stock[7], own, dirs_exist_ok=True)
        assert len(runtime.generate(PROMPT, "own", GREEDY).token_ids) == 6


def test_one_that_never_fits_is_refused_at_the_door(base: Path, stock: list[Path]) -> None:
    with crowded(base, stock) as runtime:
        for n in range(room(runtime)):
            runtime.pin_adapter(f"a{n}")
        with pytest.raises(OutOfAdapterMemoryError, match=r"a7@1 needs \d+ bytes.*pinned.*Unpin"):
            runtime.generate(PROMPT, "a7", GREEDY)
        with pytest.raises(OutOfAdapterMemoryError):
            runtime.pin_adapter("a7")
        with pytest.raises(OutOfAdapterMemoryError, match="not fit even alone"):
            runtime._engine.residency.files.packer.pack(
                LoraSpec(r=512), resolve_modules(LoraSpec(r=512), runtime._engine.base.targets), {}
            )
        runtime.unpin_adapter("a0")
        assert runtime.generate(PROMPT, "a7", GREEDY).answers


def test_what_training_published_is_saved_before_it_leaves(base: Path, stock: list[Path], tmp_path: Path) -> None:
    with crowded(base, stock, adapter_spill=str(tmp_path / "spill")) as runtime:
        job = runtime.finetune("made", DATA, lora=SPEC, training=TRAINING)
        job.wait(WAIT)
        said, digest = runtime.generate(PROMPT, "made", GREEDY).token_ids, runtime.digest("made")
        for n in (*range(8), *range(8), *range(8), *range(8)):  # it is saved meanwhile, on a thread
            runtime.generate(PROMPT, f"a{n}", GREEDY)
        assert "made" not in resident(runtime) and len(list((tmp_path / "spill").iterdir())) == 1
        assert runtime.generate(PROMPT, "made", GREEDY).token_ids == said and runtime.digest("made") == digest
        runtime.unload_adapter("made")
        runtime._background.close()  # what it still has to do is done
        assert list((tmp_path / "spill").iterdir()) == []


def release_while_closing(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    """Closing a pool of threads opens the gate only when the pool takes no more work and has dropped what it drops."""
    original = ThreadPoolExecutor.shutdown

    def shutdown(self: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        original(self, wait=False, cancel_futures=cancel_futures)
        gate.set()
        original(self, wait=wait)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)


def test_closing_does_what_removes_files_and_leaves_out_the_rest(
    base: Path, stock: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, done = threading.Event(), []
    with crowded(base, stock, adapter_spill=str(tmp_path / "spill")) as runtime:
        runtime.finetune("made", DATA, lora=SPEC, training=TRAINING).wait(WAIT)
        while "made" in resident(runtime):
            for n in range(8):
                runtime.generate(PROMPT, f"a{n}", GREEDY)
        assert len(list((tmp_path / "spill").iterdir())) == 1
        for _ in range(2):  # every thread is busy, as on a loaded machine
            runtime._background.submit(lambda: gate.wait(WAIT), lambda result: None)
        runtime._background.submit(lambda: done.append("read"), lambda result: None)
        runtime.unload_adapter("made")
        release_while_closing(monkeypatch, gate)
        runtime._background.close()
        assert gate.is_set() and list((tmp_path / "spill").iterdir()) == [] and done == []


@pytest.mark.parametrize("when", ["before it is written", "before the engine hears of it", "when the engine is gone"])
def test_what_is_unloaded_while_it_is_saved_leaves_no_files(
    base: Path, stock: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    spill, begun, gate, written = tmp_path / "spill", threading.Event(), threading.Event(), threading.Event()
    original = Packer.write

    def write(self: Packer, directory: Path, packed: Any) -> str:
        begun.set()
        assert gate.wait(WAIT)
        digest = original(self, directory, packed)
        assert len(list(spill.iterdir())) == 1
        written.set()
        return digest

    monkeypatch.setattr(Packer, "write", write)
    # A stopped engine cannot be asked for its integrity.
    gone = pytest.raises(EngineStoppedError) if when == "when the engine is gone" else nullcontext()
    with gone, crowded(base, stock, adapter_spill=str(spill)) as runtime:
        runtime.finetune("made", DATA, lora=SPEC, training=TRAINING).wait(WAIT)
        for n in range(8):
            runtime.generate(PROMPT, f"a{n}", GREEDY)
        assert begun.wait(WAIT)
        if when == "before the engine hears of it":  # its thread is kept busy by us while the files come to lie there

            def unload() -> None:
                gate.set()
                assert written.wait(WAIT)
                runtime._engine.adapters.unload("made")

            runtime._loop.call(unload)
        else:
            runtime.unload_adapter("made")
            if when == "when the engine is gone":
                runtime._loop.stop()
        gate.set()
        runtime._background.close()
        assert written.is_set() and list(spill.iterdir()) == []


def test_idle_adapters_are_reused_only_while_a_job_keeps_room_to_publish(
    base: Path, stock: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Eight fit. The job has one to train in, one that answers and one to publish to: five are left for others."""
    every_step = TrainingConfig(batch_size=1, max_steps=100_000, learning_rate=1e-3, publish="every_step")
    with crowded(base, stock, adapter_memory=2 * MIB) as runtime, ExitStack() as held:
        assert room(runtime) == 8
        job = runtime.finetune("made", DATA, lora=SPEC, training=every_step)
        until(lambda: runtime.stats().publishes >= 2)
        job.pause()
        for n in range(8):
            runtime.generate(PROMPT, f"a{n}", GREEDY)
        assert len(resident(runtime) - {"made"}) == 6, "while nobody uses it, the room to publish to is lent"
        holds = {name: held.enter_context(ExitStack()) for name in sorted(resident(runtime) - {"made"})}
        *used, last = holds
        for name in used:
            holds[name].enter_context(runtime._served.in_memory(name))
        has_entered = threading.Event()

        def use_last() -> None:
            with runtime._served.in_memory(last):
                has_entered.set()

        thread = threading.Thread(target=use_last)
        thread.start()
        until(lambda: runtime.stats().num_waiting == 1 or has_entered.is_set())
        job.resume()
        at = runtime.stats().publishes
        until(lambda: runtime.stats().publishes >= at + 5)
        assert not has_entered.is_set() and runtime.stats().num_waiting == 1
        holds[used[2]].close()
        thread.join(WAIT)
        assert has_entered.is_set()
        job.cancel()
        assert not [r for r in caplog.records if "is not published" in r.getMessage()]
        assert runtime.stats().publishes >= len(job.history) - 1, "each step but perhaps the last"


def test_without_a_place_to_save_it_stays(base: Path, stock: list[Path]) -> None:
    with crowded(base, stock) as runtime:
        runtime.finetune("made", DATA, lora=SPEC, training=TRAINING).wait(WAIT)
        for n in range(8):
            runtime.generate(PROMPT, f"a{n}", GREEDY)
            assert "made" in resident(runtime)


def test_host_memory_spares_reading_the_files_again(
    base: Path, stock: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the files were read again")

    with crowded(base, stock, host_adapter_memory=8 * MIB) as runtime:
        monkeypatch.setattr(Packer, "read_again", refuse)
        for n in (7, 0, 5, 1):
            assert len(runtime.generate(PROMPT, f"a{n}", GREEDY).token_ids) == 6
        totals = runtime.stats().adapters
        assert totals.host_hits == totals.loads >= 1 and totals.failures == 0


def test_a_job_continues_from_an_adapter_that_is_not_there(base: Path, stock: list[Path]) -> None:
    with crowded(base, stock) as runtime:
        assert "a7" not in resident(runtime)
        job = runtime.finetune("next", DATA, lora=SPEC, training=TRAINING, start_from="a7")
        assert len(job.wait(WAIT)) == 2
        assert runtime.evaluate("next", DATA).num_tokens > 0 and runtime.evaluate("a6", DATA).num_tokens > 0


def test_a_job_gets_memory_although_all_of_it_is_busy(base: Path, stock: list[Path]) -> None:
    with crowded(base, stock) as runtime:
        requests = [runtime.submit(PROMPT, f"a{n}", LONG) for n in range(8) for _ in range(2)]
        job = runtime.finetune("next", DATA, lora=SPEC, training=TRAINING)
        assert len(job.wait(WAIT)) == 2
        assert {len(r.result().token_ids) for r in requests} == {200}


def test_closing_ends_who_waits(base: Path, stock: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gated(monkeypatch)
    with crowded(base, stock) as runtime:
        cold = runtime.submit(PROMPT, "a7", GREEDY)
        assert runtime.stats().num_waiting == 1
        threading.Timer(0.05, gate.set).start()  # the thread that reads is waited for
        runtime.check_integrity()
        runtime.close()
        with pytest.raises(Exception, match="closed"):
            cold.result()
        gate.set()
        monkeypatch.setattr(runtime, "check_integrity", lambda: None)  # there is no loop any more
