"""`python -m trl_pool.run`: a training script with TRL patched, as if it had been started by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import trl_pool
from trl_pool import run

TELL = """
import json, sys
def annotated(x: int): ...
print(json.dumps({
    "name": __name__, "file": __file__, "argv": sys.argv, "path0": sys.path[0],
    "spec": getattr(__spec__, "name", None), "is main": vars(sys.modules["__main__"]).get("TELL_MARK"),
    "annotation": str(annotated.__annotations__["x"]),
}))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory to work in, with a TRL of two files beside it."""
    package = tmp_path / "site" / "trl" / "generation"
    package.mkdir(parents=True)
    for where in (package.parent, package):
        (where / "__init__.py").touch()
    (package / "vllm_client.py").write_text("class VLLMClient: ...\n")
    metadata = tmp_path / "site" / "trl-1.16.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.16.0\n")
    work = tmp_path / "work"
    (work / "jobs").mkdir(parents=True)
    (work / "jobs" / "train.py").write_text("TELL_MARK = 1" + TELL)
    (work / "jobs" / "__init__.py").touch()
    return work


def environment(place: Path, **variables: str) -> dict[str, str]:
    paths = [str(place.parent / "site"), str(Path(trl_pool.__file__).parents[1])]
    return {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths), **variables}


def start(place: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=place,
        env=environment(place, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def told(place: Path, *arguments: str, **variables: str) -> dict[str, Any]:
    """What a script that tells about itself says."""
    status, out, err = ended(start(place, *arguments, **variables))
    assert status == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


RUN = ("-m", "trl_pool.run")


@pytest.mark.parametrize(
    "arguments",
    [
        ("jobs/train.py",),
        ("jobs/train.py", "--lr", "1e-5", "-m", "x", "--", "-h"),
        ("-m", "jobs.train", "--lr", "1e-5"),
    ],
    ids=["script", "script with arguments", "module"],
)
def test_a_script_sees_what_it_would_see_without_us(place: Path, arguments: tuple[str, ...]) -> None:
    assert told(place, *RUN, *arguments) == told(place, *arguments)


def test_a_script_behind_a_link_has_the_real_directory_first_in_its_path(place: Path) -> None:
    (place / "link.py").symlink_to(place / "jobs" / "train.py")
    ours = told(place, *RUN, "link.py")
    assert ours == told(place, "link.py")
    assert ours["path0"] == str(place / "jobs")


def test_an_archive_with_a_main_module_runs_too(place: Path) -> None:
    with zipfile.ZipFile(place / "job.zip", "w") as archive:
        archive.writestr("__main__.py", "TELL_MARK = 1" + TELL)
    ours, theirs = told(place, *RUN, "job.zip"), told(place, "job.zip")
    assert ours.pop("argv") == [str(place / "job.zip")]
    assert theirs.pop("argv") == ["job.zip"]
    assert ours == theirs


def test_exit_functions_still_find_the_script_as_main(place: Path) -> None:
    (place / "late.py").write_text(
        "import atexit, pickle, sys\n"
        "class Result: ...\n"
        "atexit.register(lambda: print(len(pickle.dumps(Result())) > 0, sys.modules['__main__'].__file__))\n"
    )
    assert ended(start(place, *RUN, "late.py"))[1] == f"True {place / 'late.py'}\n"


def test_in_safe_path_mode_nothing_is_put_into_the_path(place: Path) -> None:
    ours = told(place, "-P", *RUN, "jobs/train.py")
    assert ours == told(place, "-P", "jobs/train.py")


PATCHED = """
import sys
assert not [name for name in sys.modules if name == "trl" or name.startswith("trl.")]
from trl.generation.vllm_client import VLLMClient
print(VLLMClient.__mro__[1].__name__, VLLMClient.settings.backends, VLLMClient.settings.config.max_attempts)
"""


def test_the_script_gets_the_pool_with_the_environments_settings(place: Path) -> None:
    (place / "patched.py").write_text(PATCHED)
    process = start(place, *RUN, "patched.py", BACKENDS="http://n1:8000,n2:8000", MAX_ATTEMPTS="7")
    status, out, err = ended(process)
    assert status == 0, err
    assert out == "TrainerClient http://n1:8000,http://n2:8000 7\n"
    assert err == ("trl_pool.run: <TrlPatch of TRL 1.16.0, in force: 0 replaced; http://n1:8000,http://n2:8000>\n")


def test_without_backends_the_scripts_own_url_counts(place: Path) -> None:
    (place / "patched.py").write_text(PATCHED)
    _, out, err = ended(start(place, *RUN, "patched.py", MAX_ATTEMPTS="7"))
    assert out == "TrainerClient None 7\n"
    assert "the URLs that TRL gives" in err


def test_only_the_first_rank_says_anything(place: Path) -> None:
    (place / "patched.py").write_text(PATCHED)
    status, _, err = ended(start(place, *RUN, "patched.py", RANK="1"))
    assert (status, err) == (0, "")


def test_a_script_that_patches_by_itself_has_its_own_patch(place: Path) -> None:
    (place / "own.py").write_text(
        "import trl_pool\n"
        "from trl.generation.vllm_client import VLLMClient\n"
        "with trl_pool.patch_trl(backends='http://own:8000') as patch:\n"
        "    from trl.generation.vllm_client import VLLMClient as Mine\n"
        "    print(Mine is patch.client, Mine is VLLMClient, Mine.settings.backends)\n"
        "from trl.generation.vllm_client import VLLMClient as After\n"
        "print(After.__mro__[1].__name__)\n"
    )
    status, out, err = ended(start(place, *RUN, "own.py", BACKENDS="http://n1:8000"))
    assert status == 0, err
    assert out == "True False http://own:8000\nobject\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(7)", 7), ("import sys; sys.exit('no data')", 1), ("raise KeyError('x')", 1), ("", 0)],
)
def test_the_scripts_exit_status_is_ours(place: Path, code: str, status: int) -> None:
    (place / "ends.py").write_text(code)
    assert ended(start(place, *RUN, "ends.py"))[0] == status


def test_ctrl_c_reaches_the_script_and_ends_as_it_would_without_us(place: Path) -> None:
    (place / "waits.py").write_text(
        "import time\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
        "    raise\n"
    )
    process = start(place, *RUN, "waits.py")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    status, out, err = ended(process)
    assert out == "interrupted\n"
    assert "KeyboardInterrupt" in err
    assert status == -signal.SIGINT


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), {}, "no script given"),
        (("-m",), {}, "-m needs a module's name"),
        (("-m", "no_such_package.train"), {}, "no module named 'no_such_package.train'"),
        (("-m", ".train"), {}, "no module named '.train'"),
        (("--lr", "1"), {}, "unknown option '--lr'; a script's options stand behind its name"),
        (("gone.py",), {}, "can't open 'gone.py': no such file (looked in "),
        (("jobs/train.py",), {"BACKENDS": "ftp://n1"}, "backend address 'ftp://n1'"),
        (("jobs/train.py",), {"MAX_ATTEMPTS": "many"}, "MAX_ATTEMPTS='many'"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line_with_status_2(
    place: Path, arguments: tuple[str, ...], variables: dict[str, str], message: str
) -> None:
    status, out, err = ended(start(place, *RUN, *arguments, **variables))
    assert (status, out) == (2, "")
    assert err.startswith("trl_pool.run: ")
    assert message in err
    assert "Traceback" not in err


def test_without_trl_it_says_so_and_runs_nothing(place: Path) -> None:
    (place.parent / "site" / "trl").rename(place.parent / "site" / "elsewhere")
    status, out, err = ended(start(place, *RUN, "jobs/train.py"))
    assert (status, out) == (2, "")
    assert err.startswith("trl_pool.run: TRL is not installed here")


def test_help_tells_the_three_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--help"]) == 0
    out = capsys.readouterr().out
    for form in ("-m trl_pool.run train.py", "-m trl_pool.run -m package.module", "accelerate launch", "BACKENDS"):
        assert form in out


def test_everything_behind_the_script_is_the_scripts() -> None:
    assert run.parse([__file__, "-h", "--m"]) == run.Target(__file__, False, ["-h", "--m"])
    assert run.parse(["-m", "pytest.x", "-m", "slow"]) == run.Target("pytest.x", True, ["-m", "slow"])
