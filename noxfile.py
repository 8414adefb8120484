"""Every check of PiKV. Plain `nox` runs what must be green before a change lands.

The default sessions run in the environment that nox itself was started from (`venv_backend="none"`): it was
installed once, pinned by constraints.txt, and installing torch again for each of them would take longer than the
checks. Activate it first, as README.md shows. Sessions that need other packages make an environment of their own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "mpi"]
nox.options.reuse_venv = "yes"

SIDE_BY_SIDE = ("--numprocesses=logical", "--dist=worksteal")  # a test uses one core
LONG = {"HYPOTHESIS_PROFILE": "long"}
OLDEST, NEWEST = "5.2.0", "5.24.0"  # transformers: the lower bound of pyproject.toml, and the last one tried
OF_TRANSFORMERS = ("hf-xet", "huggingface_hub", "tokenizers", "transformers", "typer")  # it chooses their versions
NOTHING_COLLECTED = 5  # pytest's exit status when no test carries the marker; pytest says so itself


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Style, format, and the direction of imports."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", "--no-logo")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Strict types of the core and the policies."""
    session.run("mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """All tests but the MPI ones and the slow ones, with full branch coverage of the core (without arguments)."""
    arguments = session.posargs or ["--cov", "--cov-report=term"]
    session.run("pytest", "-m", "not mpi and not peers and not slow", *SIDE_BY_SIDE, *arguments)


@nox.session(venv_backend="none")
def mpi(session: nox.Session) -> None:
    """The tests that start mpirun."""
    session.run("pytest", "-m", "mpi and not slow", *session.posargs)


@nox.session(venv_backend="none")
def properties(session: nox.Session) -> None:
    """The property tests, with many random examples each."""
    session.run("pytest", "-m", "property", *SIDE_BY_SIDE, *session.posargs, env=LONG)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """The kernels' tests on this machine's GPU, then under compute-sanitizer, where that is installed."""
    tests = ["tests/adapters/test_cupy_gpu.py", "tests/adapters/test_numba_cuda.py"]
    on_gpu = {"NUMBA_ENABLE_CUDASIM": "0"}
    session.run("python", "-c", "import cupy, torch; assert torch.cuda.is_available(), 'torch finds no GPU'")
    session.run("pytest", *(session.posargs or [*tests, "tests/adapters/test_cuda_sources.py"]), env=on_gpu)
    if shutil.which("compute-sanitizer") is None:
        session.log("compute-sanitizer is missing: memory and barriers were not checked")
        return
    for tool in ("memcheck", "racecheck", "synccheck"):
        checked = ["python", "-m", "pytest", "-m", "not slow", tests[0]]
        session.run("compute-sanitizer", f"--tool={tool}", "--error-exitcode=1", *checked, external=True, env=on_gpu)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """List the benchmarks, or run those named after `--`."""
    scripts = sorted(path.as_posix() for path in Path("benchmarks").glob("*.py"))
    if not scripts:
        session.skip("benchmarks/ holds no benchmark yet")
    for script in session.posargs:
        session.run("python", script)
    if not session.posargs:
        session.log("run one with `nox -s bench -- PATH`:\n%s", "\n".join(scripts))


@nox.session
def full(session: nox.Session) -> None:
    """What is too long for every change: slow tests, and property tests with many examples.

    Then the other sessions of the long set, `tasks`, `transformers_oldest` and `transformers_newest`.
    """
    session.install("-c", "constraints.txt", "-e", ".[all,dev]")
    session.run("pytest", "-m", "(slow or property) and not peers", *SIDE_BY_SIDE, *session.posargs, env=LONG)
    session.notify("tasks")
    session.notify("transformers_oldest")
    session.notify("transformers_newest")


@nox.session
def transformers_oldest(session: nox.Session) -> None:
    """The adapter and the suite for caches with the oldest supported version of transformers."""
    with_transformers(session, OLDEST)


@nox.session
def transformers_newest(session: nox.Session) -> None:
    """The adapter and the suite for caches with the newest version of transformers."""
    with_transformers(session, NEWEST)


def with_transformers(session: nox.Session, version: str) -> None:
    """Pin what the checks run with, but for transformers and what it chooses itself."""
    pins = Path("constraints.txt").read_text().splitlines()
    kept = [pin for pin in pins if not pin.startswith(OF_TRANSFORMERS)]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([*kept, f"transformers=={version}"]))
    session.install("-c", str(constraints), "-e", ".[numba,transformers,dev]")
    tests = ["tests/adapters/transformers", "tests/testing/test_cache_conformance.py"]
    session.run("pytest", "-m", "not mpi and not peers", *SIDE_BY_SIDE, *(session.posargs or tests))


@nox.session
def tasks(session: nox.Session) -> None:
    """The commands that README.md has under Tasks, in short form, in an environment of their own."""
    session.install("-c", "constraints.txt", "-e", ".[tasks]")
    short = [
        "--train_samples",
        "64",
        "--eval_samples",
        "16",
        "--num_epochs",
        "1",
        "--max_tokens",
        "128",
        "--cache",
        "int8",
    ]
    section = Path("README.md").read_text().split("### Tasks")[1].split("```bash\n")[1].split("```")[0]
    for line in section.strip().splitlines():
        session.run(*line.replace("/tmp", session.create_tmp()).split(), *short)


@nox.session
def peers(session: nox.Session) -> None:
    """Comparisons with libraries that pin old versions of their own dependencies."""
    session.install("-c", "constraints.txt", "-e", ".[peers,tasks,dev]")
    # hqq, which transformers imports where it is installed, compiles with a deprecated part of torch as it is imported.
    quiet = ("-W", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
    session.run("pytest", "-m", "peers", *quiet, *session.posargs, success_codes=[0, NOTHING_COLLECTED])


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with every warning an error."""
    if not Path("mkdocs.yml").exists():
        session.skip("mkdocs.yml is missing: docs/ is read as plain Markdown until there is a site")
    # Only the extra: mkdocstrings reads the sources without importing them, so neither pikv nor torch is installed.
    extras = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
    session.install(*extras["docs"])
    session.run("mkdocs", "build", "--strict")
