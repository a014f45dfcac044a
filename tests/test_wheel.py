"""The wheel is complete and trains without the checkout; the sdist gives the same wheel, and has the benchmarks too."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.harness import jobs

ROOT = jobs.ROOT


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **jobs.ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), cwd=ROOT)
    (path,) = folder.glob("distopt-*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A folder of installed packages with distopt alone in it."""
    target = wheel.parent / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    run(*pip, "--quiet", "--target", str(target), str(wheel), cwd=wheel.parent)
    return target


def files(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern)}


def test_everything_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    config = {f"distopt/conf/{name}" for name in files(ROOT / "conf", "*.yaml")}
    plugin = files(ROOT / "distopt" / "plugin", "*.py")
    code = {f"distopt/{name}" for name in files(ROOT / "distopt", "*.py")} - {
        f"distopt/plugin/{name}" for name in plugin
    }
    # Files other than Python: the C source that is compiled on the user's machine, the page of a report.
    data = {f"distopt/{name}" for name in files(ROOT / "distopt", "*.*") if not name.endswith((".py", ".pyc"))}
    assert len(config) > 20 and len(code) > 20 and len(plugin) > 5
    assert data >= {
        "distopt/kernels/cpu.c",
        "distopt/kernels/formats.c",
        "distopt/report/page.html",
        "distopt/report/page.js",
        "distopt/py.typed",
    }
    assert config >= {"distopt/conf/train.yaml", "distopt/conf/plan.yaml", "distopt/conf/optimizer/adamw.yaml"}
    assert config | code | plugin | data <= names
    assert {name.partition("/")[0] for name in names} == {"distopt", "hydra_plugins", f"{stem(wheel)}.dist-info"}
    # A namespace package, since other distributions have plugins in it; and no file twice.
    assert "hydra_plugins/__init__.py" not in names and not any(name.startswith("distopt/plugin") for name in names)
    assert f"{stem(wheel)}.dist-info/licenses/LICENSE" in names


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), cwd=ROOT)
    (path,) = folder.glob("distopt-*.tar.gz")
    return path


def test_the_benchmarks_are_in_the_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    programs = {f"benchmarks/{name}" for name in files(ROOT / "benchmarks", "*.py")}
    assert {"benchmarks/__main__.py", "benchmarks/ranks.py"} <= programs <= packed
    assert {"tests/harness/distributed.py", "conf/train.yaml", "CONTRIBUTING.md"} <= packed


def stem(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2])


def test_the_sdist_gives_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    """As pip builds it from an index where no wheel fits; without the checkout beside it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), cwd=source)
    (built,) = tmp_path.glob("distopt-*.whl")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(built) as theirs:
        assert {info.filename: info.CRC for info in ours.infolist()} == {
            info.filename: info.CRC for info in theirs.infolist()
        }


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment, in which pip has installed distopt's wheel by its name, from a folder.

    What it needs is that of this environment, whose folder is appended to its path: pip looks at no network.
    """
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    programs = folder / "bin"
    (packages,) = folder.glob("lib/python*/site-packages")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(programs / "python"))
    pip += ("install", "--quiet", "--no-deps", "--no-index", "--find-links", str(wheel.parent), "distopt")
    run(*pip, cwd=folder)
    site_packages = next(path for path in sys.path if (Path(path) / "click").is_dir())
    (packages / "needed.pth").write_text(f"{site_packages}\n")
    return programs


def test_in_a_clean_environment_the_command_answers(clean: Path, tmp_path: Path) -> None:
    """What somebody types first, in a folder of their own."""
    command = str(clean / "distopt")
    nothing = {"PYTHONPATH": "", "PATH": "/usr/bin:/bin"}
    import distopt

    assert run(command, "--version", cwd=tmp_path, **nothing).stdout == f"distopt {distopt.__version__}\n"
    assert "distopt train experiment=quickstart" in run(command, cwd=tmp_path, **nothing).stdout
    assert "groups (GROUP=CHOICE):" in run(command, "train", "--help", cwd=tmp_path, **nothing).stdout
    where = "import distopt, sys; print(distopt.__file__)"
    assert run(str(clean / "python"), "-c", where, cwd=tmp_path, **nothing).stdout.startswith(str(clean.parent))


def test_its_metadata_has_version_and_requirements(site: Path) -> None:
    import distopt

    (metadata,) = site.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert f"\nVersion: {distopt.__version__}\n" in text
    needed = "torch accelerate hydra-core transformers click rich matplotlib plotly tensorboard"
    for package in needed.split():
        assert f"\nRequires-Dist: {package}" in text
    for extra in ("all", "data", "deepspeed", "finetune", "sweep", "wandb"):
        assert f"\nProvides-Extra: {extra}\n" in text


def test_the_installed_package_trains(site: Path, tmp_path: Path) -> None:
    """From another folder, with the configuration inside the package, which the test changes."""
    config = site / "distopt" / "conf" / "train.yaml"
    config.write_text(config.read_text().replace("\nname: train ", "\nname: from-the-wheel "))
    jobs.write_text(tmp_path)
    words = jobs.overrides(train__steps="2", schedule__warmup_steps="0", checkpoint__every="2")
    done = run(sys.executable, "-W", "error", "-m", "distopt.train", *words, cwd=tmp_path, PYTHONPATH=str(site))
    training = [row for row in jobs.metrics(tmp_path / "runs" / "from-the-wheel") if "loss" in row]
    assert [row["step"] for row in training] == [1, 2]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["from-the-wheel"]
    (command,) = (line.removeprefix("resume:") for line in done.stdout.splitlines() if line.startswith("resume:"))
    assert "train" in shlex.split(command)[1:4]


SCRIPT = """
import hydra
import hydra_plugins.hydra_accelerate_launcher as plugin

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    return plugin.__file__

if __name__ == "__main__":
    main()
"""


def test_hydra_finds_the_installed_launcher(site: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ("-m", "hydra/launcher=accelerate", "hydra.sweep.dir=out", "+x=1")
    done = run(sys.executable, str(tmp_path / "script.py"), *words, cwd=tmp_path, PYTHONPATH=str(site))
    assert f"#0 +x=1: {site}/hydra_plugins/hydra_accelerate_launcher/__init__.py, " in done.stderr


def test_hydra_finds_the_launcher_of_an_editable_install(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    build = f"import hatchling.build; print(hatchling.build.build_editable({str(tmp_path)!r}))"
    built = tmp_path / run(sys.executable, "-c", build, cwd=ROOT).stdout.split()[-1]
    with zipfile.ZipFile(built) as archive:
        (added,) = (archive.read(name).decode().splitlines() for name in archive.namelist() if name.endswith(".pth"))
    words = ("--info", "plugins")
    done = run(sys.executable, str(tmp_path / "script.py"), *words, cwd=tmp_path, PYTHONPATH=os.pathsep.join(added))
    assert "AccelerateLauncher" in done.stdout


@pytest.fixture(scope="module")
def help_text(site: Path) -> str:
    return run(sys.executable, "-m", "distopt.train", "--help", cwd=site.parent, PYTHONPATH=str(site)).stdout


def test_help_of_the_installed_package(help_text: str) -> None:
    """It names no file that only a checkout has: launch/local.yaml once."""
    assert "optimizer: adafactor, adagrad, adam, adamw, adamw_schedule_free" in help_text
    usage = help_text.partition("groups (GROUP=CHOICE)")[0]
    assert "accelerate launch --multi_gpu --num_processes 2 -m distopt.train" in usage
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert [word for word in usage.split() if word.partition("/")[0] in folders and "/" in word] == []
    assert "--config_file" not in usage


@pytest.mark.matrix
def test_the_installed_package_is_launched_as_in_its_help(help_text: str, site: Path, tmp_path: Path) -> None:
    """Also on a machine without GPUs, where Accelerate may start one process instead of two."""
    (line,) = (line for line in help_text.splitlines() if "accelerate launch" in line)
    accelerate, launch, *options = line.partition("[")[0].split()
    words = [str(jobs.BIN / accelerate), launch, "--main_process_port", "0", *options]
    jobs.write_text(tmp_path)
    words += jobs.overrides(train__steps="2", schedule__warmup_steps="0", checkpoint__every="2", name="two")
    done = run(*words, cwd=tmp_path, PYTHONPATH=str(site))
    assert len(jobs.metrics(tmp_path / "runs" / "two")) > 2
    (command,) = (line for line in done.stdout.splitlines() if line.startswith("resume:"))
    assert "train --processes 2" in command
