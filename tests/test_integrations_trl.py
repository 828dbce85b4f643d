"""`patch_trl()` on trees of files that are laid out like TRL's."""

from __future__ import annotations

import contextlib
import importlib
import logging
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import received

import trl_pool
from trl_pool import ConfigurationError, PoolConfig, UnsupportedTRLError, VLLMClientPool, WeightSyncError
from trl_pool.integrations.parameter_walk import WalkGuard
from trl_pool.integrations.trainer_client import process_group_timeout, within_ddp_timeout
from trl_pool.integrations.weight_sync import repeatable
from trl_pool.sim import SimProcess

CLIENT = '''
class VLLMClient:
    """The stock client."""
'''

# A trainer of old: it has its own sync and one client on the main process.
TRAINER = """
from {client} import VLLMClient

class {name}:
    def __init__(self, accelerator, model, **client):
        self.vllm_mode = "server"
        self.accelerator = accelerator
        self.model = model
        if accelerator.is_main_process:
            self.vllm_client = VLLMClient(**client)

    def _move_model_to_vllm(self):
        for name, weights in self.model.walk():
            if self.accelerator.is_main_process:
                self.vllm_client.update_named_param(name, weights)
        if self.accelerator.is_main_process:
            self.vllm_client.reset_prefix_cache()
"""

GENERATION = """
from .vllm_client import VLLMClient

class VLLMGeneration:
    def __init__(self, accelerator, model, mode="server", url=None, host="0.0.0.0", port=8000):
        self.mode, self.accelerator, self.model = mode, accelerator, model
        self.server_base_url, self.server_host, self.server_port = url, host, port
        self._init_vllm()

    def _init_vllm(self):
        if self.mode == "server" and self.accelerator.is_main_process:
            url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
            self.vllm_client = VLLMClient(base_url=url, group_port=51216, connection_timeout=240.0)

    def sync_weights(self):
        if self.mode != "server":
            return "colocated"
        if self.accelerator.is_main_process:
            self.vllm_client.update_named_params([], self.model.walk())
            self.vllm_client.reset_prefix_cache()
        else:
            for _ in self.model.walk():
                pass
"""

TEACHER = """
class Distillation:
    def __init__(self, url):
        from trl.generation.vllm_client import VLLMClient
        self.teacher_client = VLLMClient(base_url=url, connection_timeout=60.0)
"""

BEFORE_028 = {
    "extras/vllm_client.py": CLIENT,
    "trainer/grpo_trainer.py": TRAINER.format(client="..extras.vllm_client", name="GRPOTrainer"),
    "trainer/rloo_trainer.py": TRAINER.format(client="..extras.vllm_client", name="RLOOTrainer"),
}
SINCE_028 = {
    "generation/vllm_client.py": CLIENT,
    "generation/vllm_generation.py": GENERATION,
    "trainer/grpo_trainer.py": "from ..generation.vllm_generation import VLLMGeneration",
    "experimental/online_dpo/online_dpo_trainer.py": TRAINER.format(
        client="...generation.vllm_client", name="OnlineDPOTrainer"
    ),
}
DISTILLATIONS = {
    "experimental/sdft/sdft_trainer.py": TEACHER,
    "experimental/async_grpo/vllm_client.py": CLIENT,
    "experimental/async_grpo/async_grpo_trainer.py": "from .vllm_client import VLLMClient",
}

LAYOUTS: dict[str, dict[str, str]] = {
    "0.24.0": {
        **BEFORE_028,
        "trainer/online_dpo_trainer.py": TRAINER.format(client="..extras.vllm_client", name="OnlineDPOTrainer"),
    },
    "0.27.0": {
        **BEFORE_028,
        "experimental/gold/gold_trainer.py": TRAINER.format(client="...extras.vllm_client", name="GOLDTrainer"),
    },
    "0.28.0": {
        **SINCE_028,
        "experimental/gold/gold_trainer.py": TRAINER.format(client="...generation.vllm_client", name="GOLDTrainer"),
    },
    "1.0.0": SINCE_028,
    "1.10.0": {**SINCE_028, **DISTILLATIONS},
    "1.11.0": {**SINCE_028, **DISTILLATIONS},
    "1.16.0": {**SINCE_028, **DISTILLATIONS},
}

BINDING = {
    "0.24.0": ["extras.vllm_client", "trainer.grpo_trainer", "trainer.online_dpo_trainer", "trainer.rloo_trainer"],
    "0.27.0": [
        "experimental.gold.gold_trainer",
        "extras.vllm_client",
        "trainer.grpo_trainer",
        "trainer.rloo_trainer",
    ],
    "0.28.0": [
        "experimental.gold.gold_trainer",
        "experimental.online_dpo.online_dpo_trainer",
        "generation.vllm_client",
        "generation.vllm_generation",
    ],
    **{
        version: [
            "experimental.online_dpo.online_dpo_trainer",
            "generation.vllm_client",
            "generation.vllm_generation",
        ]
        for version in ("1.0.0", "1.10.0", "1.11.0", "1.16.0")
    },
}
"""Modules that have the client's name after their import, by version."""

MakeTrl = Callable[..., Path]


@pytest.fixture
def make_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeTrl]:
    """`make_trl(version)`: a TRL on `sys.path`; forgotten after the test, with whatever patch is in force."""
    monkeypatch.delenv("BACKENDS", raising=False)

    def make(version: str | None = "1.16.0", files: dict[str, str] | None = None) -> Path:
        files = LAYOUTS[version] if files is None and version is not None else files or {}
        for name, source in files.items():
            path = tmp_path / "trl" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
            for package in path.relative_to(tmp_path).parents:
                if package.name:
                    (tmp_path / package / "__init__.py").touch()
        if version is not None:
            metadata = tmp_path / f"trl-{version}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        return tmp_path

    yield make
    trl_pool.unpatch_trl()
    for name in [name for name in sys.modules if name == "trl" or name.startswith("trl.")]:
        del sys.modules[name]


def load(version: str) -> dict[str, types.ModuleType]:
    """Imports every module of a layout, and gives those that bind the client's name."""
    names = ["trl." + name.removesuffix(".py").replace("/", ".") for name in LAYOUTS[version]]
    return {name.removeprefix("trl."): importlib.import_module(name) for name in names}


def clients(modules: dict[str, types.ModuleType]) -> dict[str, Any]:
    return {
        name: vars(module)["VLLMClient"]
        for name, module in modules.items()
        if "VLLMClient" in vars(module) and "async" not in name
    }


# Where it reaches


@pytest.mark.parametrize("version", LAYOUTS)
def test_modules_that_are_imported_before_the_patch_are_changed_and_given_back(
    make_trl: MakeTrl, version: str
) -> None:
    make_trl(version)
    modules = load(version)
    stock = clients(modules)
    assert sorted(stock) == BINDING[version]
    with trl_pool.patch_trl() as patch:
        assert set(clients(modules).values()) == {patch.client}
        assert {f"trl.{name}.VLLMClient" for name in stock} <= set(patch.replaced)
    assert clients(modules) == stock
    assert patch.replaced == ()


@pytest.mark.parametrize("version", LAYOUTS)
def test_modules_that_are_imported_after_the_patch_are_changed_and_given_back(make_trl: MakeTrl, version: str) -> None:
    make_trl(version)
    with trl_pool.patch_trl() as patch:
        assert not [name for name in sys.modules if name == "trl" or name.startswith("trl.")]
        modules = load(version)
        assert sorted(clients(modules)) == BINDING[version]
        assert set(clients(modules).values()) == {patch.client}
        assert issubclass(patch.client, VLLMClientPool)
    assert {client.__doc__ for client in clients(modules).values()} == {"The stock client."}


def test_the_order_of_the_imported_modules_does_not_matter(make_trl: MakeTrl) -> None:
    make_trl()
    user = importlib.import_module("trl.generation.vllm_generation")
    sys.modules["trl.generation.vllm_client"] = sys.modules.pop("trl.generation.vllm_client")  # to the end
    with trl_pool.patch_trl() as patch:
        assert user.VLLMClient is patch.client


def test_modules_imported_in_between_are_changed_too(make_trl: MakeTrl) -> None:
    make_trl()
    before = importlib.import_module("trl.generation.vllm_client")
    with trl_pool.patch_trl() as patch:
        after = importlib.import_module("trl.generation.vllm_generation")
        assert before.VLLMClient is after.VLLMClient is patch.client
    assert before.VLLMClient is after.VLLMClient is not patch.client


def test_the_asynchronous_trainers_class_of_the_same_name_stays(make_trl: MakeTrl) -> None:
    make_trl("1.16.0")
    with trl_pool.patch_trl() as patch:
        modules = load("1.16.0")
        for name in ("experimental.async_grpo.vllm_client", "experimental.async_grpo.async_grpo_trainer"):
            assert modules[name].VLLMClient is not patch.client


def test_a_function_that_imports_the_client_when_it_runs_gets_the_pool(
    make_trl: MakeTrl, made: list[dict[str, Any]]
) -> None:
    make_trl()
    trainer = importlib.import_module("trl.experimental.sdft.sdft_trainer")
    with trl_pool.patch_trl() as patch:
        assert type(trainer.Distillation("http://teacher:8000").teacher_client) is patch.client
    assert made[0]["base_url"] == "http://teacher:8000"


@pytest.mark.parametrize("version", LAYOUTS)
def test_every_sync_method_of_that_version_is_wrapped_and_given_back(make_trl: MakeTrl, version: str) -> None:
    make_trl(version)
    with trl_pool.patch_trl():
        modules = load(version)
        found = [
            (owner, name)
            for module in modules.values()
            for owner in vars(module).values()
            if isinstance(owner, type) and owner.__module__ == module.__name__
            for name in ("sync_weights", "_move_model_to_vllm")
            if name in vars(owner)
        ]
        assert found
        assert all(hasattr(vars(owner)[name], "__wrapped__") for owner, name in found)
    assert not any(hasattr(vars(owner)[name], "__wrapped__") for owner, name in found)


def test_a_module_changed_on_import_looks_as_if_it_had_been_imported_plainly(make_trl: MakeTrl) -> None:
    make_trl()
    with trl_pool.patch_trl():
        module = importlib.import_module("trl.generation.vllm_client")
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__


def test_a_module_that_fails_to_import_fails_as_without_the_patch(make_trl: MakeTrl) -> None:
    make_trl(files={"generation/vllm_client.py": CLIENT + "\nraise KeyError('of its own')"})
    with trl_pool.patch_trl() as patch, pytest.raises(KeyError, match="of its own"):
        importlib.import_module("trl.generation.vllm_client")
    assert patch.replaced == ()


def test_what_somebody_else_has_changed_since_is_left_as_it_is(
    make_trl: MakeTrl, caplog: pytest.LogCaptureFixture
) -> None:
    make_trl()
    patch = trl_pool.patch_trl()
    module = importlib.import_module("trl.generation.vllm_client")
    module.VLLMClient = "theirs"
    patch.undo()
    assert module.VLLMClient == "theirs"
    assert "trl.generation.vllm_client.VLLMClient has been changed by somebody else" in caplog.text


# What it says


def test_the_log_says_what_was_replaced_and_what_was_given_back(
    make_trl: MakeTrl, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trl_pool")
    make_trl("1.16.0")
    with trl_pool.patch_trl():
        assert "TRL 1.16.0: nothing of it that uses VLLMClient is imported yet" in caplog.text
        load("1.16.0")
    assert "TRL 1.16.0: replaced trl.generation.vllm_client.VLLMClient" in caplog.text
    assert "replaced trl.generation.vllm_generation.VLLMGeneration.sync_weights" in caplog.text
    assert "Gave TRL 1.16.0 back: trl.generation.vllm_client.VLLMClient" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize(("version", "age"), [("1.17.0.dev0", "newer"), ("2.0", "newer"), ("0.23.1", "older")])
def test_a_version_outside_the_tested_range_is_a_warning(
    make_trl: MakeTrl, caplog: pytest.LogCaptureFixture, version: str, age: str
) -> None:
    make_trl(version, files=LAYOUTS["1.16.0"])
    with trl_pool.patch_trl() as patch:
        assert importlib.import_module("trl.generation.vllm_client").VLLMClient is patch.client
    assert f"TRL {version} is {age} than the tested versions (0.24 – 1.16)" in caplog.text


def test_a_trl_without_version_is_a_warning(make_trl: MakeTrl, caplog: pytest.LogCaptureFixture) -> None:
    make_trl(None, files=SINCE_028)
    with trl_pool.patch_trl():
        assert "'unknown'" in caplog.text


def test_a_trl_with_nothing_to_replace_is_an_error_that_says_where_it_looked(make_trl: MakeTrl) -> None:
    where = make_trl("3.0.0", files={"generation/vllm_client.py": "class Client: ..."})
    with pytest.raises(UnsupportedTRLError) as caught:
        trl_pool.patch_trl()
    for word in ("TRL 3.0.0", str(where), "trl.generation.vllm_client", "trl.extras.vllm_client", "0.24 – 1.16"):
        assert word in str(caught.value)
    assert isinstance(caught.value, ImportError)
    trl_pool.unpatch_trl()


def test_without_trl_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UnsupportedTRLError, match=r"TRL is not installed here; install it \(pip install"):
        trl_pool.patch_trl()


def test_a_client_that_is_not_there_after_all_is_an_error_of_its_import(make_trl: MakeTrl) -> None:
    make_trl("1.16.0", files={"generation/vllm_client.py": CLIENT + "\ndel VLLMClient"})
    importlib.import_module("trl")
    with trl_pool.patch_trl(), pytest.raises(UnsupportedTRLError, match="defines no VLLMClient"):
        importlib.import_module("trl.generation.vllm_client")


# One at a time


def test_a_second_patch_is_refused_and_changes_nothing(make_trl: MakeTrl) -> None:
    make_trl()
    with trl_pool.patch_trl() as patch:
        with pytest.raises(RuntimeError, match=r"patched already .*unpatch_trl\(\) first"):
            trl_pool.patch_trl()
        assert importlib.import_module("trl.generation.vllm_client").VLLMClient is patch.client


def test_undoing_twice_and_unpatching_without_a_patch_do_nothing(make_trl: MakeTrl) -> None:
    make_trl()
    first = trl_pool.patch_trl()
    first.undo()
    with trl_pool.patch_trl() as second:
        first.undo()
        assert importlib.import_module("trl.generation.vllm_client").VLLMClient is second.client
    trl_pool.unpatch_trl()
    assert "undone" in repr(first)


def test_unpatch_undoes_the_patch_in_force(make_trl: MakeTrl) -> None:
    make_trl()
    patch = trl_pool.patch_trl(backends="http://n1:8000")
    assert repr(patch) == "<TrlPatch of TRL 1.16.0, in force: 0 replaced; http://n1:8000>"
    trl_pool.unpatch_trl()
    assert importlib.import_module("trl.generation.vllm_client").VLLMClient is not patch.client
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "ImportHook"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sync_retries": -1}, "sync_retries=-1"),
        ({"backends": "ftp://n1"}, "ftp"),
        ({"backends": ""}, "no backend address"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_changed(
    make_trl: MakeTrl, arguments: dict[str, Any], message: str
) -> None:
    make_trl()
    with pytest.raises(ConfigurationError, match=message):
        trl_pool.patch_trl(**arguments)
    with trl_pool.patch_trl():
        pass


def test_neither_importing_nor_patching_starts_or_imports_anything(make_trl: MakeTrl) -> None:
    """Every rank patches; only the main process may have threads and connections of the pool."""
    where = make_trl("1.16.0")
    script = (
        "import sys, threading\n"
        "import trl_pool\n"
        "assert not [m for m in sys.modules if m.startswith('trl_pool.integrations')]\n"
        "patch = trl_pool.patch_trl(backends='http://n1:8000')\n"
        "assert threading.active_count() == 1\n"
        "assert not {m.partition('.')[0] for m in sys.modules} & {'trl', 'torch', 'transformers', 'accelerate'}\n"
        "from trl.generation.vllm_generation import VLLMGeneration\n"
        "class Rank1: is_main_process = False\n"
        "VLLMGeneration(Rank1(), None)\n"
        "assert threading.active_count() == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{where}:{Path(trl_pool.__file__).parents[1]}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# The client that TRL gets


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of every pool that is made; none comes to life."""
    calls: list[dict[str, Any]] = []

    def record(
        self: Any, base_url: Any, host: Any, server_port: Any, group_port: Any, connection_timeout: Any, **rest: Any
    ) -> None:
        calls.append(
            {
                "base_url": base_url,
                "host": host,
                "server_port": server_port,
                "group_port": group_port,
                "connection_timeout": connection_timeout,
                **rest,
            }
        )

    monkeypatch.setattr(VLLMClientPool, "__init__", record)
    monkeypatch.setattr(VLLMClientPool, "__del__", lambda self: None)
    return calls


class Rank:
    """As much of accelerate's `Accelerator` as a sync needs."""

    def __init__(self, index: int = 0, ranks: int = 1, kind: str = "MULTI_GPU", zero_stage: int = 0) -> None:
        self.process_index, self.num_processes, self.distributed_type = index, ranks, kind
        self.is_main_process = index == 0
        plugin = types.SimpleNamespace(zero_stage=zero_stage)
        self.state = types.SimpleNamespace(deepspeed_plugin=plugin)


def test_a_list_of_urls_in_trls_own_setting_reaches_the_pool_unchanged(
    make_trl: MakeTrl, made: list[dict[str, Any]]
) -> None:
    make_trl()
    config = PoolConfig(max_attempts=3)
    with trl_pool.patch_trl(config=config):
        generation = importlib.import_module("trl.generation.vllm_generation").VLLMGeneration
        generation(Rank(), None, url="http://n1:8000,http://n2:8000")
    assert made == [
        {
            "base_url": "http://n1:8000,http://n2:8000",
            "host": "0.0.0.0",
            "server_port": 8000,
            "group_port": 51216,
            "connection_timeout": 240.0,
            "config": config,
        }
    ]


@pytest.mark.parametrize("version", LAYOUTS)
def test_backends_win_over_the_url_that_trl_gives(make_trl: MakeTrl, made: list[dict[str, Any]], version: str) -> None:
    make_trl(version)
    with trl_pool.patch_trl(backends=["http://n1:8000", "n2:8000/"]):
        if version in ("0.24.0", "0.27.0"):
            trainer = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
            trainer(Rank(), None, base_url="http://0.0.0.0:8000", connection_timeout=240.0)
        else:
            importlib.import_module("trl.generation.vllm_generation").VLLMGeneration(Rank(), None)
    assert [call["base_url"] for call in made] == ["http://n1:8000,http://n2:8000"]


def test_the_environment_gives_backends_and_with_them_the_settings(
    make_trl: MakeTrl, made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trl()
    monkeypatch.setenv("BACKENDS", "http://n1:8000, http://n2:8000")
    monkeypatch.setenv("MAX_ATTEMPTS", "7")
    with trl_pool.patch_trl():
        importlib.import_module("trl.generation.vllm_generation").VLLMGeneration(Rank(), None)
    assert made[0]["base_url"] == "http://n1:8000,http://n2:8000"
    assert made[0]["config"].max_attempts == 7


def test_backends_as_an_argument_leave_the_environments_settings_alone(
    make_trl: MakeTrl, made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trl()
    monkeypatch.setenv("BACKENDS", "http://n1:8000")
    monkeypatch.setenv("MAX_ATTEMPTS", "7")
    with trl_pool.patch_trl(backends="http://n3:8000"):
        importlib.import_module("trl.generation.vllm_generation").VLLMGeneration(Rank(), None)
    assert made[0]["base_url"] == "http://n3:8000"
    assert made[0]["config"] == PoolConfig()


def test_backends_are_no_teachers_servers(make_trl: MakeTrl, made: list[dict[str, Any]]) -> None:
    make_trl()
    with trl_pool.patch_trl(backends="http://n1:8000,http://n2:8000"):
        teacher = importlib.import_module("trl.experimental.sdft.sdft_trainer").Distillation
        importlib.import_module("trl.generation.vllm_generation").VLLMGeneration(Rank(), None, url="http://any:8000")
        teacher("http://teacher:8000")
    assert [call["base_url"] for call in made] == ["http://n1:8000,http://n2:8000", "http://teacher:8000"]
    assert made[1]["group_port"] == 51216


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("url", "asked"), [("http://any:8000", "http://any:8000"), (None, "http://0.0.0.0:8000")])
def test_a_teacher_that_is_the_trained_model_is_asked_at_the_backends_on_every_rank(
    make_trl: MakeTrl, made: list[dict[str, Any]], rank: int, url: str | None, asked: str
) -> None:
    """SDFT and SDPO: each rank scores at the server whose URL the generation has."""
    make_trl()
    with trl_pool.patch_trl(backends="http://n1:8000"):
        importlib.import_module("trl.generation.vllm_generation").VLLMGeneration(Rank(rank, 2), None, url=url)
        importlib.import_module("trl.experimental.sdft.sdft_trainer").Distillation(asked)
    assert [call["base_url"] for call in made][-1] == "http://n1:8000"


def test_a_url_list_that_reaches_the_patched_class_is_served_by_all_its_servers(
    make_trl: MakeTrl, fleet: Callable[[int], list[SimProcess]]
) -> None:
    sims = fleet(2)
    make_trl("1.10.0")
    with trl_pool.patch_trl():
        client = importlib.import_module("trl.generation.vllm_client").VLLMClient(
            base_url=",".join(sim.url for sim in sims), group_port=51216, connection_timeout=10.0
        )
    with client:
        answer = client.generate([f"prompt {i}" for i in range(8)], n=2, max_tokens=4)
        assert len(answer["completion_ids"]) == 16
        assert all(received(sims))
        assert "VLLMClientPool" in repr(client)


# total_timeout and ddp_timeout


def test_total_timeout_is_lowered_under_the_ranks_patience(caplog: pytest.LogCaptureFixture) -> None:
    config = PoolConfig(total_timeout=1000, max_attempts=3)
    lowered = within_ddp_timeout(config, 600.0)
    assert lowered.total_timeout == pytest.approx(540.0)
    assert lowered.max_attempts == 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "lowered from 1000 s to 540 s" in record.getMessage()


def test_lowering_the_default_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trl_pool")
    assert within_ddp_timeout(PoolConfig(), 1800.0).total_timeout == pytest.approx(1620.0)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


@pytest.mark.parametrize("ddp_timeout", [None, 1200.0])
def test_a_total_timeout_that_fits_stays(ddp_timeout: float | None) -> None:
    config = PoolConfig(total_timeout=1080)
    assert within_ddp_timeout(config, ddp_timeout) is config


class Options:
    def __init__(self, seconds: float) -> None:
        self._timeout = types.SimpleNamespace(total_seconds=lambda: seconds)


def fake_torch(ranks: int, *, initialized: bool = True, timeouts: dict[str, float] | None = None) -> Any:
    """A `torch` whose default process group has a backend per device."""
    group = types.SimpleNamespace()
    if timeouts is not None:
        group._device_types = list(timeouts)
        group._get_backend = lambda device: types.SimpleNamespace(options=Options(timeouts[device]))
    return types.SimpleNamespace(
        distributed=types.SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: initialized,
            get_world_size=lambda: ranks,
            group=types.SimpleNamespace(WORLD=group),
        )
    )


@pytest.mark.parametrize(
    ("torch", "seconds"),
    [
        (None, None),
        (fake_torch(2, initialized=False), None),
        (fake_torch(1, timeouts={"cpu": 60.0}), None),
        (fake_torch(2, timeouts={"cpu": 1800.0, "cuda": 600.0}), 600.0),
        (fake_torch(2), None),
    ],
    ids=["no torch", "no group", "one rank", "two backends", "a torch that does not tell"],
)
def test_the_process_groups_timeout_is_found_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, torch: Any, seconds: float | None
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert process_group_timeout() == seconds


def test_a_client_of_the_patch_has_the_lowered_timeout(
    make_trl: MakeTrl, made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trl()
    monkeypatch.setitem(sys.modules, "torch", fake_torch(2, timeouts={"cuda": 100.0}))
    with trl_pool.patch_trl():
        importlib.import_module("trl.generation.vllm_client").VLLMClient(base_url="http://n1:8000", group_port=1)
    assert made[0]["config"].total_timeout == pytest.approx(90.0)


# The repeatable sync


class Layer:
    def __init__(self) -> None:
        self.merged = False


class Model:
    """Parameters behind collectives: a walk that is not gone to its end leaves the adapters merged."""

    def __init__(self, *, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.layers = [Layer(), Layer()]
        self.walks = 0
        self.fail_at, self.error = fail_at, error

    def modules(self) -> list[Layer]:
        return self.layers

    def merge_adapter(self) -> None:
        for layer in self.layers:
            layer.merged = True

    def unmerge_adapter(self) -> None:
        for layer in self.layers:
            layer.merged = False

    def walk(self) -> Iterator[tuple[str, int]]:
        self.merge_adapter()
        for i in range(4):
            if i == self.fail_at:
                raise self.error or RuntimeError("out of memory")
            yield f"w{i}", i
        self.unmerge_adapter()
        self.walks += 1

    @property
    def merged(self) -> bool:
        return any(layer.merged for layer in self.layers)


def lost() -> WeightSyncError:
    return WeightSyncError("update", {"http://n1:8000": "connection lost"})


class FakeClient:
    """A client that does what is planned for the third tensor of each walk."""

    def __init__(self, *plan: Exception | None) -> None:
        self.plan = list(plan)
        self.sent: list[list[str]] = []
        self.resets = 0
        self.deferring = False
        self.kept: WeightSyncError | None = None
        self.blocks: list[str] = []

    @contextlib.contextmanager
    def deferred_update_errors(self) -> Iterator[None]:
        self.deferring, self.kept = True, None
        self.sent.append([])
        yield
        self.deferring = False

    def update_named_param(self, name: str, weights: int) -> None:
        if self.kept is not None:
            return
        if name == "w2" and self.plan and (error := self.plan.pop(0)) is not None:
            if not (self.deferring and isinstance(error, WeightSyncError)):
                raise error
            self.kept = error
            return
        self.sent[-1].append(name)

    def update_named_params(self, metadata: Any, named_params: Iterator[tuple[str, int]]) -> None:
        for name, weights in named_params:
            FakeClient.update_named_param(self, name, weights)

    @contextlib.contextmanager
    def weight_update(self) -> Iterator[None]:
        self.blocks.append("open")
        try:
            yield
        except BaseException:
            self.blocks.append("failed")
            raise
        self.blocks.append("published")

    def reset_prefix_cache(self) -> None:
        self.resets += 1
        if self.kept is not None:
            raise self.kept


class Client(WalkGuard, FakeClient):
    """As the patch makes it."""


class Trainer:
    """TRL's order of calls; `style` is that of 1.11 (one iterator) or of 1.10 and before (one call per tensor)."""

    mode = "server"

    def __init__(self, rank: Rank, client: FakeClient | None, model: Model, style: str = "1.11") -> None:
        self.accelerator, self.vllm_client, self.model, self.style = rank, client, model, style

    def sync_weights(self) -> None:
        client = self.vllm_client
        if client is None:
            for _ in self.model.walk():
                pass
        elif self.style == "1.11":
            client.update_named_params([], self.model.walk())
            client.reset_prefix_cache()
        elif self.style == "online DPO":
            with client.weight_update():
                for name, weights in self.model.walk():
                    client.update_named_param(name, weights)
            client.reset_prefix_cache()
        else:
            for name, weights in self.model.walk():
                client.update_named_param(name, weights)
            client.reset_prefix_cache()


STYLES = ["1.11", "1.10", "online DPO"]
ALL = ["w0", "w1", "w2", "w3"]


def sync(trainer: Trainer, retries: int = 2) -> None:
    repeatable(Trainer.sync_weights, retries)(trainer)


@pytest.mark.parametrize("style", STYLES)
def test_a_sync_that_succeeds_is_done_once(style: str) -> None:
    client, model = Client(), Model()
    sync(Trainer(Rank(), client, model, style))
    assert client.sent == [ALL]
    assert (client.resets, model.walks) == (1, 1)


@pytest.mark.parametrize("style", STYLES)
def test_a_lost_server_makes_the_sync_repeat_and_each_walk_goes_to_its_end(
    style: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, model = Client(lost(), lost()), Model()
    sync(Trainer(Rank(), client, model, style))
    assert client.sent == [["w0", "w1"], ["w0", "w1"], ALL]
    assert model.walks == 3
    assert not model.merged
    assert "attempt 1 of 3" in caplog.text
    assert "attempt 2 of 3" in caplog.text


@pytest.mark.parametrize("style", STYLES)
def test_after_the_last_attempt_the_pools_own_error_is_raised_and_nothing_stays_merged(style: str) -> None:
    errors = [lost(), lost(), lost()]
    client, model = Client(*errors), Model()
    with pytest.raises(WeightSyncError) as caught:
        sync(Trainer(Rank(), client, model, style))
    assert caught.value is errors[-1]
    assert model.walks == 3
    assert not model.merged


def test_without_retries_the_first_failure_is_the_last() -> None:
    client, model = Client(lost()), Model()
    with pytest.raises(WeightSyncError):
        sync(Trainer(Rank(), client, model), retries=0)
    assert model.walks == 1


@pytest.mark.parametrize("style", STYLES)
def test_another_error_of_the_client_is_raised_after_the_walk_and_not_repeated(style: str) -> None:
    client, model = Client(ValueError("no such dtype")), Model()
    with pytest.raises(ValueError, match="no such dtype"):
        sync(Trainer(Rank(), client, model, style))
    assert client.sent == [["w0", "w1"]]
    assert model.walks == 1
    assert not model.merged
    assert client.resets == 0, "a reset would publish what is not whole"


def test_a_block_in_which_a_tensor_was_dropped_ends_as_one_that_failed() -> None:
    client = Client(ValueError("no such dtype"))
    with pytest.raises(ValueError, match="no such dtype"):
        sync(Trainer(Rank(), client, Model(), "online DPO"))
    assert client.blocks == ["open", "failed"]


def test_a_block_that_cannot_begin_lets_the_walk_go_to_its_end() -> None:
    class Refusing(FakeClient):
        def weight_update(self) -> Any:
            raise lost()

    class Guarded(WalkGuard, Refusing):
        pass

    client, model = Guarded(), Model()
    with pytest.raises(WeightSyncError):
        sync(Trainer(Rank(), client, model, "online DPO"))
    assert model.walks == 3
    assert client.sent == [[], [], []]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failure_of_the_walk_itself_is_raised_at_once_and_the_adapters_are_unmerged(
    style: str, error: BaseException
) -> None:
    client, model = Client(), Model(fail_at=2, error=error)
    with pytest.raises(type(error)):
        sync(Trainer(Rank(), client, model, style))
    assert client.sent == [["w0", "w1"]]
    assert client.resets == 0
    assert not model.merged


def test_adapters_that_were_merged_before_stay_merged() -> None:
    class Plain(Model):
        def walk(self) -> Iterator[tuple[str, int]]:
            yield "w0", 0
            raise RuntimeError("out of memory")

    model = Plain()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="out of memory"):
        sync(Trainer(Rank(), Client(), model))
    assert model.merged


def test_outside_a_sync_the_client_raises_where_it_always_did() -> None:
    client = Client(ValueError("no such dtype"), ValueError("no such dtype"), ValueError("no such dtype"))
    client.sent.append([])
    with pytest.raises(ValueError, match="no such dtype"):
        client.update_named_param("w2", 2)
    with pytest.raises(ValueError, match="no such dtype"):
        client.update_named_params([], iter([("w2", 2)]))
    with pytest.raises(ValueError, match="no such dtype"), client.weight_update():
        client.update_named_param("w2", 2)
    client.reset_prefix_cache()
    assert client.resets == 1


def test_the_colocated_mode_is_left_alone(make_trl: MakeTrl) -> None:
    make_trl()
    with trl_pool.patch_trl():
        generation = importlib.import_module("trl.generation.vllm_generation").VLLMGeneration
        assert generation(Rank(0, 2), None, mode="colocate").sync_weights() == "colocated"


def test_a_client_made_before_the_patch_is_synced_as_before() -> None:
    client, model = FakeClient(), Model()
    client.sent.append([])
    sync(Trainer(Rank(), client, model))
    assert client.sent == [ALL]


# Several ranks


class Ranks:
    """Ranks as threads, with a broadcast that waits for all of them and knows who never came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 3) -> None:
        self.count = count
        self.broadcasts = 0
        self._barrier = threading.Barrier(count, timeout=10)
        self._told: Any = None
        self._rank = threading.local()
        utils = types.SimpleNamespace(broadcast_object_list=self._broadcast)
        monkeypatch.setitem(sys.modules, "accelerate", types.SimpleNamespace(utils=utils))
        monkeypatch.setitem(sys.modules, "accelerate.utils", utils)

    def _broadcast(self, objects: list[Any], from_process: int) -> None:
        assert from_process == 0
        if self._rank.index == 0:
            self._told = pickle.dumps(objects)
            self.broadcasts += 1
        self._barrier.wait()
        if self._rank.index != 0:
            objects[:] = pickle.loads(self._told)
        self._barrier.wait()

    def run(self, work: Callable[[int], None]) -> list[BaseException | None]:
        """Runs it on every rank and gives what each raised."""
        raised: list[BaseException | None] = [None] * self.count

        def one(index: int) -> None:
            self._rank.index = index
            try:
                work(index)
            except BaseException as error:
                raised[index] = error

        threads = [threading.Thread(target=one, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return raised


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def trainers(client: FakeClient, count: int = 3, kind: str = "MULTI_GPU", **model: Any) -> list[Trainer]:
    return [
        Trainer(Rank(index, count, kind), client if index == 0 else None, Model(**model if index == 0 else {}))
        for index in range(count)
    ]


def test_all_ranks_repeat_together(ranks: Ranks) -> None:
    team = trainers(Client(lost(), lost()))
    assert ranks.run(lambda index: sync(team[index])) == [None] * 3
    assert [trainer.model.walks for trainer in team] == [3, 3, 3]
    assert ranks.broadcasts == 3


def test_after_the_last_failure_every_rank_raises(ranks: Ranks) -> None:
    team = trainers(Client(lost(), lost(), lost()))
    raised = ranks.run(lambda index: sync(team[index]))
    assert [type(error) for error in raised] == [WeightSyncError] * 3
    assert {str(error) for error in raised} == {"update: http://n1:8000 connection lost"}
    assert raised[1] is not None
    assert raised[1].__notes__ == ["This was on the main process; process 1 waited."]
    assert [trainer.model.walks for trainer in team] == [3, 3, 3]
    assert not any(trainer.model.merged for trainer in team)


def test_the_main_process_decides_how_often(ranks: Ranks) -> None:
    team = trainers(Client(lost(), lost()))
    assert ranks.run(lambda index: sync(team[index], retries=2 if index == 0 else 0)) == [None] * 3


def test_another_error_of_the_main_process_reaches_the_others_as_a_failed_sync(ranks: Ranks) -> None:
    team = trainers(Client(ValueError("no such dtype")))
    raised = ranks.run(lambda index: sync(team[index]))
    assert isinstance(raised[0], ValueError)
    assert [type(error) for error in raised[1:]] == [WeightSyncError] * 2
    assert str(raised[2]) == "weight sync: the main process raised ValueError: no such dtype"
    assert ranks.broadcasts == 1


def test_an_error_that_cannot_be_sent_is_sent_as_words(ranks: Ranks) -> None:
    error = lost()
    error.__dict__["socket"] = threading.Lock()
    team = trainers(Client(error))
    raised = ranks.run(lambda index: sync(team[index], retries=0))
    assert raised[0] is error
    assert str(raised[1]) == "weight sync: the main process raised update: http://n1:8000 connection lost"


@pytest.mark.parametrize(
    ("kind", "zero_stage", "told"),
    [("MULTI_GPU", 0, True), ("DEEPSPEED", 2, True), ("DEEPSPEED", 3, False), ("FSDP", 0, False)],
)
def test_a_walk_that_broke_off_is_told_only_where_its_steps_are_no_collectives(
    ranks: Ranks, kind: str, zero_stage: int, told: bool
) -> None:
    """Sharded, the others wait in a gather: a broadcast would be taken for a part of it."""
    main = Trainer(Rank(0, 3, kind, zero_stage), Client(), Model(fail_at=2))
    team = [main, *trainers(Client())[1:]]

    def work(index: int) -> None:
        if told or index == 0:
            sync(team[index])

    raised = ranks.run(work)
    assert isinstance(raised[0], RuntimeError)
    assert not raised[0].__dict__.get("__notes__")
    assert ranks.broadcasts == int(told)
    assert [isinstance(error, WeightSyncError) for error in raised[1:]] == [told, told]


def test_sharded_ranks_are_told_of_what_happened_after_the_walk(ranks: Ranks) -> None:
    team = trainers(Client(ValueError("no such dtype")), kind="FSDP")
    raised = ranks.run(lambda index: sync(team[index]))
    assert [type(error) for error in raised] == [ValueError, WeightSyncError, WeightSyncError]


def test_an_error_of_another_rank_is_its_own_and_keeps_nobody_waiting(ranks: Ranks) -> None:
    team = trainers(Client())
    team[1].model = Model(fail_at=1)
    raised = ranks.run(lambda index: sync(team[index]))
    assert [type(error) for error in raised] == [type(None), RuntimeError, type(None)]


def test_a_broadcast_that_fails_does_not_hide_why_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(objects: list[Any], from_process: int) -> None:
        raise RuntimeError("connection closed by peer")

    utils = types.SimpleNamespace(broadcast_object_list=broken)
    monkeypatch.setitem(sys.modules, "accelerate.utils", utils)
    with pytest.raises(WeightSyncError) as caught:
        sync(trainers(Client(lost()))[0])
    assert caught.value.__notes__ == ["The other ranks could not be told of it: connection closed by peer"]
    with pytest.raises(RuntimeError, match="closed by peer"):
        sync(trainers(Client())[0])
